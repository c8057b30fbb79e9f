"""Estimates against published and enumerated values; a measurement with an engine that knows its own answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from graft.errors import GraderError
from graft.evaluation import Evaluation, estimate, evaluate, pass_at_k
from graft.rollout.engine import Continuation
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.types import Grade, Outcome, Prompt, Purpose, Sample, StopReason, Tokens, reaches
from tests.engines import PlannedEngine


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_as_published(right, count, low, high):
    found = estimate([1.0] * right + [0.0] * (count - right))
    assert found.mean == pytest.approx(right / count)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    mirrored = estimate([0.0] * right + [1.0] * (count - right))
    assert mirrored.low == pytest.approx(1 - found.high)
    assert mirrored.high == pytest.approx(1 - found.low)


def test_shares_of_a_row_have_an_interval_over_rows():
    # mean 1/2, squares (1/4)^2 + 0 + (1/4)^2 = 1/8 over N - 1 = 2: standard error sqrt(1/16 / 3)
    found = estimate([0.25, 0.5, 0.75])
    half = 1.959963984540054 * math.sqrt(1 / 16 / 3)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - half)
    assert found.high == pytest.approx(0.5 + half)


def test_an_interval_stays_between_0_and_1():
    found = estimate([0.0, 0.0, 0.1])
    assert found.low == 0.0
    assert estimate([1.0, 1.0, 0.9]).high == 1.0


def test_nothing_to_estimate():
    assert all(math.isnan(x) for x in (estimate([]).mean, estimate([]).low, estimate([]).high))


@pytest.mark.parametrize("drawn", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(drawn):
    for right in range(drawn + 1):
        for k in range(1, drawn + 1):
            subsets = list(combinations([1] * right + [0] * (drawn - right), k))
            assert pass_at_k(drawn, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples, got 3"):
        pass_at_k(3, 1, k)


def scripted(script: Sequence[Sequence[int]]) -> PlannedEngine:
    """Sample j of row i is the token `script[i][j]`, followed by 9 where it is truncated (a negative entry)."""

    def planned(index: int, place: int, prefix: Tokens, limit: int) -> Continuation:
        token = script[index][place]
        tokens = [token] if token >= 0 else [-token, 9]
        return Continuation(
            np.array(tokens, np.int32),
            np.full(len(tokens), -1.0, np.float32),
            StopReason.EOS if token >= 0 else StopReason.LENGTH,
        )

    return PlannedEngine(planned)


def score(samples: Sequence[Sample]) -> list[Grade]:
    """Token 1: 1; token 2: 0.5; token 3: no score; else 0."""
    known = {"1": Grade(1.0), "2": Grade(0.5), "3": Grade(None, Outcome.TIMED_OUT)}
    return [known.get(sample.text.split()[0], Grade(0.0)) for sample in samples]


def measure(
    script: Sequence[Sequence[int]], *, threshold: float = 1.0, engine: PlannedEngine | None = None
) -> Evaluation:
    prompts = [
        Prompt(row=10 + i, messages=(), item={}, tokens=np.array([5], np.int32), question=str(i))
        for i in range(len(script))
    ]
    return evaluate(
        engine or scripted(script),
        prompts,
        score,
        lambda tokens: " ".join(map(str, tokens.tolist())),
        samples=max(map(len, script)),
        sampling=SamplingSettings(8),
        threshold=threshold,
        seed=3,
        max_failure_rate=0.5,
    )


def test_a_measurement_by_hand():
    found = measure([[1, 0, 2, -1], [0, 0, 0, 0], [1, 1, 3, -1]])
    assert found.accuracy.mean == pytest.approx((2 / 4 + 0 + 3 / 3) / 3)  # the failed one leaves its row
    assert found.accuracy == estimate([0.5, 0.0, 1.0])
    assert set(found.pass_at) == {1, 2, 4}
    assert found.pass_at[1].mean == pytest.approx(found.accuracy.mean)
    assert found.pass_at[2].mean == pytest.approx((5 / 6 + 0 + 1) / 3)  # of two of four, one pair has neither
    assert found.pass_at[4].mean == pytest.approx((1 + 0) / 2)  # the third row has three samples only
    assert found.reward_mean == pytest.approx((1 + 0 + 0.5 + 1 + 0 + 1 + 1 + 1) / 11)
    assert found.length_mean == pytest.approx(14 / 12)
    assert found.generated_tokens == 14
    assert found.truncated_share == pytest.approx(2 / 12)
    assert (found.failed, found.rows) == (1, 3)
    assert [own[1].score for own in found.grades] == [1.0, 0.0, 1.0]
    assert len(found.trees) == 3


def test_the_threshold_says_what_is_solved():
    script = [[2, 0], [1, 2]]
    assert measure(script).accuracy.mean == pytest.approx(0.25)
    assert measure(script, threshold=0.5).accuracy.mean == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("score", "threshold", "solved"),
    [
        (0.7 + 0.2 + 0.1, 1.0, True),
        (1.0, 1.0, True),
        (0.999999, 1.0, False),
        (7.2 * 0.1 * 10, 7.2, True),
        (0, 0.5, False),
    ],
)
def test_a_rounding_error_decides_nothing(score, threshold, solved):
    assert reaches(score, threshold) == solved


@pytest.mark.parametrize(("samples", "ks"), [(1, {1}), (2, {1, 2}), (6, {1, 2, 4, 6}), (8, {1, 2, 4, 8})])
def test_which_k_are_reported(samples, ks):
    assert set(measure([[1] * samples]).pass_at) == ks


def test_a_row_without_any_score_is_left_out_of_the_means():
    found = measure([[3, 3], [1, 0]])
    assert found.accuracy == estimate([0.5])
    assert (found.failed, found.rows) == (2, 2)


def test_too_many_failures_stop():
    with pytest.raises(GraderError, match="3 of 4 samples could not be graded"):
        measure([[3, 3], [3, 0]])


def test_the_random_streams_are_those_of_evaluation_and_always_the_same():
    script = [[1, 0], [0, 0]]
    engine = scripted(script)
    measure(script, engine=engine)
    assert engine.keys == [
        [stream_key(3, Purpose.EVALUATION, 0, row, 0, place) for place in range(2)] for row in (10, 11)
    ]
