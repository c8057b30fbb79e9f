"""What flows between the stages, besides the token tree itself (`tree.py`).

Imports no torch: a viewer, a grader or a data tool can use these records without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
"""Token ids, shape [length]."""

LogProbs = npt.NDArray[np.float32]
"""Natural logarithms of probabilities, shape [length], nats."""

Message = Mapping[str, Any]
"""One chat message: `role` and `content`, as in OpenAI's format."""


class StopReason(StrEnum):
    """Why the engine stopped extending a span."""

    EOS = "eos"  # the model sampled one of its end-of-sequence tokens
    LENGTH = "length"  # the token limit came first: the completion is truncated
    CUT = "cut"  # a cutter found the end of a segment; the path goes on in its children


class Purpose(StrEnum):
    """What a sample is for; keeps the random streams of training, evaluation and Monte Carlo apart."""

    TRAIN = "train"
    EVALUATION = "evaluation"
    MONTE_CARLO = "monte_carlo"


def last_asked(messages: Sequence[Message]) -> int:
    """Place of the last user message; of the last of all where there is none."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return users[-1] if users else len(messages) - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to be continued by the model."""

    row: int
    """Index of the row in its data set: names the row in logs and keys its random streams."""

    messages: Sequence[Message]
    """The conversation that the model continues."""

    item: Mapping[str, Any]
    """All keys of the row, for graders (`{"answer": "12", ...}`)."""

    tokens: Tokens
    """The templated conversation, generation prompt included."""

    question: str
    """The last user message as it stands in the row, without `data.suffix`: what critics judge thoughts by. The last
    message of all where there is no user's."""

    @property
    def earlier(self) -> Sequence[Message]:
        """The messages before the question: system or developer, examples, earlier turns."""
        return self.messages[: last_asked(self.messages)] if self.messages else ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as graders see it."""

    prompt: Prompt
    text: str
    """The completion decoded, without special tokens."""

    tokens: int
    """Length of the completion in tokens, the end-of-sequence token counted."""

    stop: StopReason


class Outcome(StrEnum):
    """What became of the attempt to grade a sample. "Wrong" and "could not be graded" are different facts."""

    GRADED = "graded"
    UNPARSEABLE = "unparseable"  # the model's fault: it scores 0 and trains
    TIMED_OUT = "timed_out"  # ours: no score; the sample leaves its group and is counted
    CRASHED = "crashed"  # ours: no score; the sample leaves its group and is counted
    NOT_FINITE = "not_finite"  # ours: the grader returned NaN or an infinity
    OVER_LIMIT = (
        "over_limit"  # ours: the grader's code used more memory or wrote more than the sandbox allows
    )
    SANDBOX_FAILED = "sandbox_failed"  # ours: the sandbox itself broke, whatever the code did


OUR_FAULT = frozenset(
    {
        Outcome.TIMED_OUT,
        Outcome.CRASHED,
        Outcome.NOT_FINITE,
        Outcome.OVER_LIMIT,
        Outcome.SANDBOX_FAILED,
    }
)
"""Outcomes that say nothing about the completion."""


class Fault(StrEnum):
    """What went wrong on the way to a grade, by the names of OpenAI's run response."""

    FORMULA_PARSE = "formula_parse_error"
    SAMPLE_PARSE = "sample_parse_error"
    TRUNCATED_OBSERVATION = "truncated_observation_error"
    UNRESPONSIVE_REWARD = "unresponsive_reward_error"
    INVALID_VARIABLE = "invalid_variable_error"
    OTHER = "other_error"
    PYTHON_GRADER_SERVER = "python_grader_server_error"
    PYTHON_GRADER_RUNTIME = "python_grader_runtime_error"
    MODEL_GRADER_SERVER = "model_grader_server_error"
    MODEL_GRADER_REFUSAL = "model_grader_refusal_error"
    MODEL_GRADER_PARSE = "model_grader_parse_error"


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that a judge model took, as its server counted them."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    """Part of the prompt that the server had in its cache."""

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached
        )

    @property
    def total(self) -> int:
        """Prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Grade:
    """The judgement of one sample."""

    score: float | None
    """Finite, or None when the outcome says that there is no score."""

    outcome: Outcome = Outcome.GRADED
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named components of the score, each reported as a metric of its own."""

    reason: str = ""
    """For people: why this score, or what went wrong."""

    faults: Mapping[Fault, str] = field(default_factory=dict)
    """What went wrong on the way, each with details for people."""

    usage: Mapping[str, TokenUsage] = field(default_factory=dict)
    """Judge model -> tokens that this grade took; what came from the cache took none."""

    @property
    def scored(self) -> bool:
        """Whether the sample has a score to train on."""
        return self.score is not None

    @property
    def failed(self) -> bool:
        """Whether the sample could not be graded for a reason that is ours, whatever score it then got."""
        return self.score is None or self.outcome in OUR_FAULT


def reaches(score: float, threshold: float) -> bool:
    """Whether a score counts as solved. 0.7 + 0.2 + 0.1, a sum of weights, is a rounding error short of 1 and does."""
    return score >= threshold - 1e-9


Values = Mapping[int, npt.NDArray[np.float32]]
"""Node id -> one number for each token of the node."""

States = Mapping[int, npt.NDArray[np.float32]]
"""Node id -> one vector for each token of the node, `[length, width]`."""

Weights = Mapping[int, npt.NDArray[np.float64]]
"""Node id -> share of each token of the node in the loss of a whole optimiser step."""


@dataclass(frozen=True, slots=True, eq=False)
class Appraisal:
    """What networks that stay as they are during a step say of one tree's tokens. Empty: not asked."""

    old_logprobs: Values = field(default_factory=dict)
    """Of the policy that sampled, by the trainer's own forward pass, nats."""

    anchor_logprobs: Values = field(default_factory=dict)
    """Of the KL anchor, nats."""

    kl: Values = field(default_factory=dict)
    """KL(policy that sampled || anchor) over the whole vocabulary at the place of each token, nats."""

    anchor_states: States = field(default_factory=dict)
    """Of the KL anchor: the last hidden state that predicts each token, from which its head gives the distribution."""

    old_values: Values = field(default_factory=dict)
    """Of the value model: the value of the state before each token."""


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """What one tree's tokens are trained on. Nodes that are not named in `weights` do not train."""

    advantages: Values
    """Positive means "more of this"."""

    weights: Weights
    """Share of each token in the loss of the whole optimiser step: the reduction, denominators included."""

    value_targets: Values = field(default_factory=dict)
    """What the value of the state before each token is trained towards."""

    value_weights: Weights = field(default_factory=dict)
    """The same shares for the value loss; 0 at a token whose state is not a state of the method."""


class Grader(Protocol):
    """Judges samples. Anything with this call works; nothing to inherit or register."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Grade]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One completion as critics see it: its thoughts in order, then its answer."""

    prompt: Prompt
    thoughts: tuple[str, ...]
    """Text of each thought."""

    answer: str | None
    """Text of the answer segment; None where the chain has not come to it: it still grows, or was cut off."""

    spans: tuple[Tokens, ...]
    """Token ids of each thought, and then of the answer if there is one."""

    grade: Grade | None = None
    """Of the whole completion; None where there is none yet."""


@dataclass(frozen=True, slots=True)
class Critique:
    """What a critic says of one chain with M thoughts. Scores go from 0 to the critic's `scale`, B.

    A critic that failed says so by its outcome, and has no scores.
    """

    overall: float | None = None
    """G, the score of the whole completion; None where the chain has no score yet."""

    thoughts: tuple[float, ...] = ()
    """S_1..S_M, how good each thought is by itself."""

    progress: tuple[float, ...] = ()
    """P_1..P_M, how far the chain has come by the end of each thought."""

    reasons: tuple[str, ...] = ()
    """For people, one for each thought; empty where there is nothing to say."""

    outcome: Outcome = Outcome.GRADED
    problem: str = ""
    """What went wrong, where the outcome is not `GRADED`."""

    calls: int = 0
    """Requests to judges, graders or functions."""

    usage: Mapping[str, TokenUsage] = field(default_factory=dict)
    """Judge model -> tokens that this critique took."""

    sampled_tokens: int = 0
    """Tokens that the policy drew for this critique. They count in every budget."""

    seconds: float = 0.0
    """Wall-clock time; of critics that judge many chains at once an equal share."""

    initial_progress: float | None = None
    """P_0, how far the prompt alone is; None: the critic does not say."""

    @property
    def scored(self) -> bool:
        """Whether there are scores to train on."""
        return self.outcome is Outcome.GRADED


class Critic(Protocol):
    """Scores the thoughts of chains. Anything with this call works; nothing to inherit or register."""

    def __call__(self, chains: Sequence[Chain]) -> Sequence[Critique]: ...
