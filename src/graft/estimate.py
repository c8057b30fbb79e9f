"""What a run would take: tokens, time and memory, from its settings and a few speeds. Pure arithmetic.

The speeds and the lengths of completions are measured by `trial.py` on the machine that is to run it; everything
here follows from them by counting. Imports no torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graft.estimated import Estimate, Facts, Item


@dataclass(frozen=True, slots=True)
class SamplingSpeeds:
    """What the engine and the grader take, seconds."""

    prefill_token: float = 0.0
    """One token of a prompt."""

    decode_step: float = 0.0
    """One token for all completions that grow side by side: the part that does not depend on their number."""

    decode_row: float = 0.0
    """One token for each of them."""

    grade: float = 0.0
    """Judging one completion."""

    def scaled(self, factor: float) -> SamplingSpeeds:
        """Those of an engine that takes so many times as long."""
        return SamplingSpeeds(
            self.prefill_token * factor, self.decode_step * factor, self.decode_row * factor, self.grade
        )


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured. Seconds, unless the name says otherwise."""

    start: float
    """Reading rows, loading the model, building the engine."""

    measuring: SamplingSpeeds
    """For completions of held-out rows, few of which begin alike."""

    training: SamplingSpeeds
    """For the groups of a step: the engine computes what their members share once."""

    hand_over: float
    """Giving the engine new weights."""

    train_token: Mapping[str, float]
    """Forward and backward of one token, by phase, value model included."""

    score_token: Mapping[str, float]
    """Forward of one token without gradient, by phase: the policy, and the value model if there is one."""

    anchor_token: float
    """Forward of one token by the KL anchor."""

    optimizer: Mapping[str, float]
    """One step of the optimiser, by phase; the value model's own included where it has one."""

    write_byte: float
    """Writing one byte durably."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """A call of the engine: completions for some prompts."""

    prompts: int
    samples: int
    """Completions for each prompt."""

    prompt_tokens: float
    """Of one prompt, on average."""

    lengths: Sequence[int]
    """Tokens of typical completions; taken in turn."""

    @property
    def completions(self) -> int:
        """All of the call."""
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Drawn in the call."""
        return self.completions * _mean(self.lengths)

    def engine_bytes(self, memory: Memory, *, slots: int, max_new_tokens: int) -> float:
        """What the engine holds during the call besides its weights: keys and values, and each prompt's logits."""
        tokens = self.prompts * self.prompt_tokens + min(slots, self.completions) * max_new_tokens
        return tokens * memory.cached_token + self.prompts * memory.prompt_logits


@dataclass(frozen=True, slots=True)
class GrownTree:
    """A tree with groups at every prefix, on average; measured, since no list of lengths describes it."""

    tokens: float
    """Drawn for it."""

    seconds: float
    """To draw it, beside others."""

    paths: float
    """Completions that are graded."""


@dataclass(frozen=True, slots=True)
class Critiques:
    """What the critic takes for the completions of one prompt, on average."""

    seconds: float = 0.0
    tokens: float = 0.0
    """Drawn by the policy."""


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """The optimiser steps of one phase."""

    name: str
    steps: int
    batch: Sampling
    """Completions that a step trains on, drawn or worked."""

    drawn: bool
    """Whether the engine draws them; else the rows bring them."""

    rounds: Sequence[int] = ()
    """Prompts of each round of dynamic sampling in a step; empty: one round, all of which trains."""

    grown: GrownTree | None = None
    """None where whole completions are drawn."""

    critiques: Critiques = field(default_factory=Critiques)

    passes: int = 1
    """Over each batch, forward and backward."""

    optimizer_steps: int = 1
    """On each batch."""

    scorings: float = 0.0
    """Forward passes of the policy that sampled over a batch, a step, on average."""

    anchor_scorings: float = 0.0
    """The same of the KL anchor."""

    scores_all: bool = False
    """Whether these see every token drawn, or those alone that train."""

    trained_share: float = 1.0
    """Of the groups; those whose scores are all equal do not go through the network."""

    read_share: float = 1.0
    """Tokens of completions that the network reads, of those drawn: equal beginnings are read once, and a last token
    not at all."""

    @property
    def prompts_drawn(self) -> int:
        """In a step, rounds of dynamic sampling together."""
        return sum(self.rounds) if self.rounds else self.batch.prompts

    @property
    def tokens_a_prompt(self) -> float:
        """Drawn for its completions."""
        return self.batch.samples * _mean(self.batch.lengths) if self.grown is None else self.grown.tokens

    @property
    def sampled_tokens(self) -> float:
        """Drawn in a step, for what is discarded and for the critic, too; as the run's `generated_tokens` counts."""
        if not self.drawn:
            return 0.0
        return self.prompts_drawn * self.tokens_a_prompt + self.batch.prompts * self.critiques.tokens

    @property
    def batch_tokens(self) -> float:
        """Tokens of a batch that the network reads, prompts once a group."""
        own = self.batch.prompt_tokens + self.tokens_a_prompt * self.read_share
        return self.batch.prompts * own

    @property
    def update_tokens(self) -> float:
        """Tokens that go through the network in one pass of the update."""
        return self.trained_share * self.batch_tokens

    @property
    def scored_tokens(self) -> float:
        """Tokens that each scoring sees."""
        return self.batch_tokens if self.scores_all else self.update_tokens


@dataclass(frozen=True, slots=True)
class EvaluationWork:
    """Measurements on held-out rows."""

    name: str
    times: int
    call: Sampling


@dataclass(frozen=True, slots=True)
class ValidationWork:
    """Measurements of the loss on held-out rows."""

    phase: str
    times: int
    tokens: float
    """That the network reads each time."""


@dataclass(frozen=True, slots=True)
class Workload:
    """All that a run is to do."""

    phases: Sequence[PhaseWork]
    evaluations: Sequence[EvaluationWork]
    validations: Sequence[ValidationWork]
    written_bytes: int
    """Of all checkpoints."""

    slots: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, unless the name says tokens. Peaks were measured, the others follow from model and settings."""

    sampling_peak: int
    """While a small group was sampled, before there was an optimiser."""

    update_peak: int
    """While a micro-batch trained, optimiser and copies included."""

    tried_tokens: int
    """Of that micro-batch."""

    microbatch_tokens: int
    """Of the run's largest one."""

    gradients: int

    optimizer: int
    """Its moments."""

    copies: int
    """Of weights besides the policy's: the KL anchor, the value model's trunk, older weights that sample; 0 without."""

    held_states: int
    """The anchor's hidden states of a step's tokens, which the exact KL holds; 0 without."""

    cached_token: int
    """Keys and values of one token in the engine."""

    prompt_logits: int
    """Logits of one prompt in the engine."""

    sampled: float
    """What the engine held, weights aside, at `sampling_peak`."""

    def peak(self, largest_call: float) -> float:
        """The most that the run holds at once.

        What a micro-batch needs besides weights, gradients and optimiser grows with its tokens.

        Args:
            largest_call: bytes that the engine holds, weights aside, in the largest call.
        """
        kept = self.sampling_peak + self.optimizer + self.copies + self.held_states
        activations = max(0, self.update_peak - kept - self.gradients)
        larger = max(1.0, self.microbatch_tokens / self.tried_tokens)
        update = max(self.update_peak + self.held_states, kept + self.gradients + activations * larger)
        return max(update, kept + max(0.0, largest_call - self.sampled))


def estimate(
    facts: Facts,
    work: Workload,
    speeds: Speeds,
    memory: Memory,
    *,
    assumptions: Sequence[str],
) -> Estimate:
    """Count what a workload takes at the given speeds."""
    calls = [largest_call(phase) for phase in work.phases if phase.drawn] + [e.call for e in work.evaluations]
    held = [call.engine_bytes(memory, slots=work.slots, max_new_tokens=work.max_new_tokens) for call in calls]
    unsignalled = [replace(p, trained_share=0.0) if p.trained_share < 1 else p for p in work.phases]
    least = _items(replace(work, phases=unsignalled), speeds)
    return Estimate(
        facts=facts,
        items=_items(work, speeds),
        seconds_without_signal=math.fsum(item.seconds for item in least),
        memory_bytes=memory.peak(max(held, default=0.0)),
        tokens_sampled_training=math.fsum(p.steps * p.sampled_tokens for p in work.phases),
        tokens_sampled_measuring=math.fsum(e.times * e.call.tokens for e in work.evaluations),
        tokens_trained=math.fsum(p.steps * p.passes * p.update_tokens for p in work.phases),
        tokens_scored=math.fsum(
            p.steps * (p.scorings + p.anchor_scorings) * p.scored_tokens for p in work.phases
        ),
        steps={phase.name: phase.steps for phase in work.phases},
        assumptions=assumptions,
    )


def _items(work: Workload, speeds: Speeds) -> list[Item]:
    """The run's parts in order; those that never come are left out."""
    items = [Item("start", 1, speeds.start)]
    items += [
        Item(
            e.name,
            e.times,
            speeds.hand_over + calls_seconds([e.call], speeds.measuring, slots=work.slots),
        )
        for e in work.evaluations
    ]
    for phase in work.phases:
        if phase.drawn:
            sampling = speeds.hand_over + drawing_seconds(phase, speeds.training, slots=work.slots)
            items.append(Item(f"{phase.name}: sampling", phase.steps, sampling))
            critic = phase.batch.prompts * phase.critiques.seconds
            if critic:
                items.append(Item(f"{phase.name}: critic", phase.steps, critic))
        scoring = scoring_seconds(phase, speeds)
        if scoring:
            items.append(Item(f"{phase.name}: scoring", phase.steps, scoring))
        items.append(Item(f"{phase.name}: update", phase.steps, update_seconds(phase, speeds)))
    items += [
        Item(f"{v.phase}: validation loss", v.times, v.tokens * speeds.score_token[v.phase])
        for v in work.validations
    ]
    items.append(Item("writing checkpoints", 1, work.written_bytes * speeds.write_byte))
    return [item for item in items if item.times]


def sampling_seconds(call: Sampling, speeds: SamplingSpeeds, *, slots: int) -> float:
    """Prompts once, then decoding: fixed cost x steps of the engine + cost a row x tokens.

    The first token of each completion comes from its prompt, without a decoding step.
    """
    lengths = [call.lengths[i % len(call.lengths)] for i in range(call.completions)]
    decoding = speeds.decode_step * decode_steps(lengths, slots=slots)
    decoding += speeds.decode_row * sum(length - 1 for length in lengths)
    return call.prompts * call.prompt_tokens * speeds.prefill_token + decoding


def calls_seconds(calls: Sequence[Sampling], speeds: SamplingSpeeds, *, slots: int) -> float:
    """Sampling and grading, one call after another."""
    return sum(
        sampling_seconds(call, speeds, slots=slots) + call.completions * speeds.grade for call in calls
    )


def largest_call(phase: PhaseWork) -> Sampling:
    """The call of the engine with the most prompts in a step."""
    return replace(phase.batch, prompts=max(phase.rounds, default=phase.batch.prompts))


def drawing_seconds(phase: PhaseWork, speeds: SamplingSpeeds, *, slots: int) -> float:
    """Drawing and grading in a step, all rounds."""
    if phase.grown is not None:
        return phase.prompts_drawn * (phase.grown.seconds + phase.grown.paths * speeds.grade)
    calls = [replace(phase.batch, prompts=n) for n in phase.rounds or (phase.batch.prompts,)]
    return calls_seconds(calls, speeds, slots=slots)


def update_seconds(phase: PhaseWork, speeds: Speeds) -> float:
    """Every pass over the batch, and every step of the optimiser."""
    tokens = phase.passes * phase.update_tokens
    return tokens * speeds.train_token[phase.name] + phase.optimizer_steps * speeds.optimizer[phase.name]


def scoring_seconds(phase: PhaseWork, speeds: Speeds) -> float:
    """What networks that stand still say of the batch, before the update."""
    policy = phase.scorings * speeds.score_token[phase.name]
    return phase.scored_tokens * (policy + phase.anchor_scorings * speeds.anchor_token)


def decode_steps(lengths: Sequence[int], *, slots: int) -> int:
    """Steps that the engine makes until all completions are done: waiting ones enter where others left.

    Args:
        lengths: tokens of each completion, in the order in which they enter, each at least 1.
        slots: completions that grow side by side.
    """
    free_at = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heappush(free_at, heapq.heappop(free_at) + length - 1)
    return max(free_at, default=0)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
