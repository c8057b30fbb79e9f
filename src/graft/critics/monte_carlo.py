"""The critic `monte_carlo`: how often does the policy come to a right answer from here?

p_k = share of n continuations from the state after thought k that are solved; p_0 from the prompt.
P_k = B p_k; S_k = B (1 + p_k - p_{k-1}) / 2, so that a thought that changes nothing has B/2; G = B x the grade's score.
Source of the estimate: VinePPO, arXiv:2410.01679, which takes p_k - p_{k-1} as the advantage.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from graft.critics.scores import failed, grade_each, overall_score, share_of_time, total_usage
from graft.rollout.engine import Engine
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.segments.text_stream import Decode
from graft.types import Chain, Critique, Grade, Grader, Prompt, Purpose, Sample, StopReason, Tokens, reaches


@dataclass(slots=True, eq=False)
class _State:
    """A place in a chain from which continuations are drawn; chains that share it share them."""

    prompt: Prompt
    drawn: Tokens
    """The completion so far."""

    samples: list[Sample] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)
    new_tokens: int = 0

    def solved(self, threshold: float) -> float | None:
        """The share that is solved; None if nothing could be graded."""
        scores = [grade.score for grade in self.grades if grade.score is not None and not grade.failed]
        return sum(reaches(score, threshold) for score in scores) / len(scores) if scores else None


class MonteCarloCritic:
    """Draws continuations with the policy's own engine, which must have its weights, and grades them."""

    def __init__(
        self,
        engine: Engine,
        grader: Grader,
        decode: Decode,
        *,
        sampling: SamplingSettings,
        scale: float,
        continuations: int,
        threshold: float,
        seed: int,
    ) -> None:
        """
        Args:
            engine: what samples.
            grader: of whole completions.
            decode: token ids -> text, as graders see it.
            sampling: the policy's. Its longest completion holds for thoughts and continuation together.
            scale: B, the highest score.
            continuations: n, for each state.
            threshold: a score of at least this is solved.
            seed: of the run. With a state's row and tokens it keys the random streams: other chains in the same call
                change nothing, and a state that is met again gets the same numbers.
        """
        self._engine, self._grader, self._decode, self._sampling = engine, grader, decode, sampling
        self._scale, self._continuations, self._threshold, self._seed = scale, continuations, threshold, seed

    def __call__(self, chains: Sequence[Chain]) -> list[Critique]:
        """Critiques in the order of the chains. Tokens of a state that chains share count for the first of them.

        Raises:
            GraftError: what engine or grader raise.
        """
        began = time.perf_counter()
        states: dict[tuple[int, bytes, bytes], _State] = {}
        paths: list[list[_State]] = []
        for chain in chains:
            path = []
            for drawn in _prefixes(chain):
                key = (chain.prompt.row, chain.prompt.tokens.tobytes(), drawn.tobytes())
                path.append(states.setdefault(key, _State(chain.prompt, drawn)))
            paths.append(path)
        self._sample(list(states.values()))
        self._grade(list(states.values()))
        counted: set[int] = set()
        critiques = []
        for chain, path in zip(chains, paths, strict=True):
            own = [state for state in path if id(state) not in counted]
            counted |= {id(state) for state in own}
            critiques.append(self._judge(chain, path, own))
        return share_of_time(critiques, began)

    def _sample(self, states: Sequence[_State]) -> None:
        """Draw the continuations of all states at once. One that has reached the limit is its own only sample."""
        limit = self._sampling.max_new_tokens
        open_states = []
        for state in states:
            if len(state.drawn) < limit:
                open_states.append(state)
            else:
                state.samples = [self._whole(state, state.drawn, StopReason.LENGTH)]
        if not open_states:
            return
        grown = self._engine.grow(
            [np.concatenate([state.prompt.tokens, state.drawn]) for state in open_states],
            [self._keys(state) for state in open_states],
            self._sampling,
            limits=[limit - len(state.drawn) for state in open_states],
        )
        for state, continuations in zip(open_states, grown, strict=True):
            state.new_tokens = sum(len(continuation.tokens) for continuation in continuations)
            for continuation in continuations:
                tokens = np.concatenate([state.drawn, continuation.tokens])
                state.samples.append(self._whole(state, tokens, continuation.stop))

    def _grade(self, states: Sequence[_State]) -> None:
        samples = [sample for state in states for sample in state.samples]
        grades = iter(grade_each(self._grader, samples) if samples else [])
        for state in states:
            state.grades = [next(grades) for _ in state.samples]

    def _judge(self, chain: Chain, path: Sequence[_State], own: Sequence[_State]) -> Critique:
        grades = [grade for state in own for grade in state.grades]
        cost = {
            "calls": len(grades),
            "usage": total_usage(grades),
            "sampled_tokens": sum(state.new_tokens for state in own),
        }
        rates: list[float] = []
        for state in path:
            rate = state.solved(self._threshold)
            if rate is None:
                return failed(state.grades[0].outcome, state.grades[0].reason, **cost)
            rates.append(rate)
        steps = list(pairwise(rates))
        return Critique(
            overall=overall_score(chain.grade, self._scale),
            thoughts=tuple(self._scale * (1 + after - before) / 2 for before, after in steps),
            progress=tuple(self._scale * after for _, after in steps),
            initial_progress=self._scale * rates[0] if rates else None,
            reasons=tuple(f"solved {before:.3g} -> {after:.3g}" for before, after in steps),
            **cost,
        )

    def _whole(self, state: _State, tokens: Tokens, stop: StopReason) -> Sample:
        return Sample(state.prompt, self._decode(tokens), len(tokens), stop)

    def _keys(self, state: _State) -> list[int]:
        digest = hashlib.blake2b(state.drawn.tobytes(), digest_size=8).digest()
        place = int.from_bytes(digest, "little")
        return [
            stream_key(self._seed, Purpose.MONTE_CARLO, 0, state.prompt.row, 0, place, number)
            for number in range(self._continuations)
        ]


def _prefixes(chain: Chain) -> list[Tokens]:
    """What was drawn before and after each thought: M + 1 states, none for a chain without thoughts."""
    spans = chain.spans[: len(chain.thoughts)]
    nothing = np.array([], dtype=np.int32)
    return [np.concatenate([nothing, *spans[:k]]) for k in range(len(spans) + 1)] if spans else []
