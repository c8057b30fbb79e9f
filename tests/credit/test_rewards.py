"""Reward processing: each formula by hand, against a slow version written from the deck, and its true sign facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.credit.rewards import (
    answer_reward,
    boost_or_dampen,
    chain_rewards,
    clip_to_answer,
    combined_scores,
    progress_baseline,
    progress_change,
    progress_effect,
    progress_factor,
    sibling_rewards,
    thought_multiplier,
    z_scores,
)

CRITIC = {
    "std_epsilon": 1e-6,
    "boost": 1.0,
    "dampen": 0.5,
    "progress_window": 3,
    "progress_gain": 10.0,
    "progress_loss": 10.0,
    "critic_scale": 10.0,
    "thought_divisor": 10.0,
}
CHAIN: dict[str, Any] = {
    **CRITIC,
    "overall": "every_segment",
    "normalise": False,
    "answer_scale": 1.0,
    "floor_multiplier": None,
    "ceiling_offset": None,
    "answered": True,
}


def changed(**settings: Any) -> dict[str, Any]:
    """Those of a chain, with some others."""
    return {**CHAIN, **settings}


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# --- one formula each, by hand


def test_z_scores_by_hand():
    # mean 4, squares 4 + 0 + 4, σ = sqrt(8/3 + 1/3)
    got = z_scores(doubles(2, 4, 6), std_epsilon=1 / 3)
    torch.testing.assert_close(got, doubles(-2, 0, 2) / 3**0.5)


def test_epsilon_stands_inside_the_root():
    # mean 1/2, variance 1/4, ε 3/4: σ = 1. Outside the root it would be 1/2 + 3/4.
    torch.testing.assert_close(z_scores(doubles(0, 1), std_epsilon=0.75), doubles(-0.5, 0.5))


def test_boost_or_dampen_by_hand():
    assert boost_or_dampen(doubles(-2, 0, 3), boost=2.0, dampen=0.25).tolist() == [-0.5, 0, 6]


def test_progress_baseline_by_hand():
    got = progress_baseline(doubles(2, 4, 9, 1, 5), window=2)
    assert got.tolist() == [2, 2, 3, 6.5, 5]  # itself; 2; (2+4)/2; (4+9)/2; (9+1)/2
    assert progress_baseline(doubles(2, 4, 9), window=1).tolist() == [2, 2, 4]
    assert progress_baseline(doubles(3, 6, 9, 2), window=100).tolist() == [3, 3, 4.5, 6]


def test_progress_change_and_factor_by_hand():
    change = progress_change(doubles(6, 2, 5), doubles(2, 5, 5))
    assert change.tolist() == [4, -3, 0]
    got = progress_factor(change, doubles(6, 2, 5), progress_gain=3.0, progress_loss=4.0, critic_scale=10.0)
    # sqrt(4) · 6 / 3; -log(1 + 3) · (10 - 2) / 4; 0
    torch.testing.assert_close(got, doubles(4, -2 * math.log(4), 0))


def test_the_remaining_formulas_by_hand():
    assert thought_multiplier(doubles(8, 2), thought_divisor=4.0).tolist() == [2, 0.5]
    assert progress_effect(doubles(3, -2), doubles(2, 0.5)).tolist() == [6, -1]
    standardised, effect = doubles(1, -0.5), doubles(0.25, 0)
    every = combined_scores(6.0, standardised, effect, overall="every_segment")
    shared = combined_scores(6.0, standardised, effect, overall="shared")
    assert every.tolist() == [7.25, 5.5]
    assert shared.tolist() == [4.25, 2.5]
    assert answer_reward(6.0, answer_scale=0.5) == 3
    with pytest.raises(ValueError, match="want 'every_segment' or 'shared'"):
        combined_scores(6.0, standardised, effect, overall="last")


@pytest.mark.parametrize(
    ("floor_multiplier", "ceiling_offset", "expected"),
    [
        (None, None, [-3, 4, 9]),
        (0.5, None, [2, 4, 9]),  # floor 0.5 · 4
        (None, 1.0, [-3, 4, 5]),  # ceiling 4 + 1
        (0.5, 1.0, [2, 4, 5]),
        (1.0, -1.0, [3, 3, 3]),  # ceiling 3 below floor 4: the ceiling wins
    ],
)
def test_the_clip_by_hand(floor_multiplier, ceiling_offset, expected):
    got = clip_to_answer(
        doubles(-3, 4, 9), 4.0, floor_multiplier=floor_multiplier, ceiling_offset=ceiling_offset
    )
    assert got.tolist() == expected


def test_a_floor_pays_the_segments_of_a_wrong_answer():
    got = clip_to_answer(doubles(-3, -1), 0.0, floor_multiplier=0.5, ceiling_offset=None)
    assert got.tolist() == [0, 0]


# --- the whole, against plain Python from the deck's page


def slow_chain(scores, progress, overall_score, *, answered, **s):
    """The deck's formulas with k from 1 to M, in Python floats."""
    count = len(scores)
    thought = {k + 1: x for k, x in enumerate(scores)}
    reached = {k + 1: x for k, x in enumerate(progress)}

    def standardise(values):
        mu = sum(values.values()) / count
        sigma = math.sqrt(sum((x - mu) ** 2 for x in values.values()) / count + s["std_epsilon"])
        return {k: (x - mu) / sigma for k, x in values.items()}

    record = {name: {} for name in ("standardised", "baseline", "change", "factor", "multiplier", "effect")}
    combined = {}
    for k, z in standardise(thought).items() if count else ():
        standardised = (s["boost"] if z >= 0 else s["dampen"]) * z
        if k == 1:
            baseline = reached[1]
        else:
            past = [reached[j] for j in range(max(1, k - s["progress_window"]), k)]
            assert len(past) == min(s["progress_window"], k - 1)
            baseline = math.fsum(past) / len(past)
        change = reached[k] - baseline
        if abs(change) < 1e-9:  # equal up to rounding
            factor = 0.0
        elif change > 0:
            factor = math.sqrt(change) * reached[k] / s["progress_gain"]
        else:
            factor = -math.log(1 + abs(change)) * (s["critic_scale"] - reached[k]) / s["progress_loss"]
        multiplier = thought[k] / s["thought_divisor"]
        share = overall_score if s["overall"] == "every_segment" else overall_score / count
        combined[k] = share + standardised + factor * multiplier
        for name, value in zip(
            record, (standardised, baseline, change, factor, multiplier, factor * multiplier), strict=True
        ):
            record[name][k] = value
    answer = s["answer_scale"] * overall_score
    rewards = []
    for _, reward in sorted((standardise(combined) if s["normalise"] else combined).items()) if count else ():
        if s["floor_multiplier"] is not None:
            reward = max(reward, s["floor_multiplier"] * answer)
        if s["ceiling_offset"] is not None:
            reward = min(reward, answer + s["ceiling_offset"])
        rewards.append(reward)
    return {
        **{name: list(values.values()) for name, values in record.items()},
        "combined": list(combined.values()),
        "rewards": [*rewards, answer] if answered else rewards,
    }


# Tenths and not all floats: a change of 1e-12 is 0 to the slow version.
score = st.integers(0, 100).map(lambda tenths: tenths / 10)
chains = st.lists(st.tuples(score, score), max_size=12)


@given(
    chains,
    score,
    st.fixed_dictionaries(
        {
            "answered": st.booleans(),
            "std_epsilon": st.sampled_from([1e-6, 0.1]),
            "boost": st.floats(0.1, 3),
            "dampen": st.floats(0.1, 3),
            "progress_window": st.integers(1, 5),
            "progress_gain": st.floats(0.5, 20),
            "progress_loss": st.floats(0.5, 20),
            "critic_scale": st.just(10.0),
            "thought_divisor": st.floats(0.5, 20),
            "overall": st.sampled_from(["every_segment", "shared"]),
            "normalise": st.booleans(),
            "answer_scale": st.floats(0.1, 2),
            "floor_multiplier": st.none() | st.floats(0, 1),
            "ceiling_offset": st.none() | st.floats(0, 3),
        }
    ),
)
def test_a_chain_against_the_slow_version(chain, overall_score, settings):
    scores, progress = doubles(*(s for s, _ in chain)), doubles(*(p for _, p in chain))
    got = chain_rewards(scores, progress, overall_score, **settings)
    expected = slow_chain(scores.tolist(), progress.tolist(), overall_score, **settings)
    for name, values in got._asdict().items():
        # 1e-6: what a rounding error of 1e-15 in equal scores becomes when divided by sqrt(1e-6), twice
        torch.testing.assert_close(values, doubles(*expected[name]), atol=1e-6, rtol=1e-9, msg=name)


@given(chains, score, st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.booleans())
def test_both_precisions_are_kept_and_finite(chain, overall_score, dtype, normalise, answered):
    scores = torch.tensor([s for s, _ in chain], dtype=dtype)
    progress = torch.tensor([p for _, p in chain], dtype=dtype)
    settings = {**CHAIN, "normalise": normalise, "answered": answered}
    got = chain_rewards(scores, progress, overall_score, **settings)
    for values in got:
        assert values.dtype == dtype
        assert torch.isfinite(values).all()
    exact = chain_rewards(scores.double(), progress.double(), overall_score, **settings)
    if not normalise:  # of nearly equal numbers it divides rounding errors by sqrt(ε)
        torch.testing.assert_close(got.rewards.double(), exact.rewards, atol=2e-3, rtol=1e-4)


@given(
    st.lists(
        st.tuples(st.floats(-(2.0**40), 2.0**40, width=32), st.floats(-(2.0**40), 2.0**40, width=32)),
        max_size=6,
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scores_off_the_scale_give_no_nan(chain, dtype):
    scores = torch.tensor([s for s, _ in chain], dtype=dtype)
    progress = torch.tensor([p for _, p in chain], dtype=dtype)
    for values in (
        *chain_rewards(scores, progress, 3.0, **CHAIN),
        *sibling_rewards(scores, progress, progress, **CRITIC),
    ):
        assert torch.isfinite(values).all()


# --- edges


def test_no_thoughts():
    none = doubles()
    assert chain_rewards(none, none, 7.0, **changed(answer_scale=0.5)).rewards.tolist() == [3.5]
    shared = {**CHAIN, "overall": "shared", "normalise": True, "answered": False}
    assert chain_rewards(none, none, 7.0, **shared).rewards.tolist() == []


def test_one_thought_has_nothing_to_be_compared_with():
    got = chain_rewards(doubles(9), doubles(4), 7.0, **CHAIN)
    assert got.standardised.tolist() == [0]
    assert got.change.tolist() == [0]
    assert got.effect.tolist() == [0]
    assert got.rewards.tolist() == [7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_and_progress_are_exactly_without_effect(dtype):
    tenths = torch.full((7,), 0.1, dtype=dtype)  # whose naive mean over three is off by a rounding error
    got = chain_rewards(tenths, tenths, 7.0, **CHAIN)
    assert got.change.tolist() == [0] * 7
    assert got.effect.tolist() == [0] * 7
    torch.testing.assert_close(got.rewards, torch.full((8,), 7.0, dtype=dtype), atol=1e-4, rtol=0)


def test_normalising_takes_the_overall_score_out():
    scores, progress = doubles(8, 10, 2), doubles(2, 5, 5)
    settings = {**CHAIN, "normalise": True, "answered": False}
    low = chain_rewards(scores, progress, 1.0, **settings)
    high = chain_rewards(scores, progress, 9.0, **settings)
    torch.testing.assert_close(low.rewards, high.rewards)
    assert low.rewards.mean().item() == pytest.approx(0, abs=1e-12)
    assert low.rewards.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_long_chain():
    torch.manual_seed(0)
    scores, progress = (10 * torch.rand(2, 500, dtype=torch.float64)).unbind()
    got = chain_rewards(scores, progress, 7.0, **CHAIN)
    expected = slow_chain(scores.tolist(), progress.tolist(), 7.0, **CHAIN)
    torch.testing.assert_close(got.rewards, doubles(*expected["rewards"]))


# --- what is true of the formulas, wanted or not (the list in the module's docstring)

positions = st.data()


def _changed(values: torch.Tensor, place: int, value: float) -> torch.Tensor:
    return values.index_fill(0, torch.tensor([place]), value)


@given(chains, score, score, st.sampled_from(["every_segment", "shared"]))
def test_rewards_rise_with_the_overall_score(chain, low, high, overall):
    assume(low < high)
    scores, progress = doubles(*(s for s, _ in chain)), doubles(*(p for _, p in chain))
    settings = {**CHAIN, "overall": overall}
    worse = chain_rewards(scores, progress, low, **settings).rewards
    better = chain_rewards(scores, progress, high, **settings).rewards
    assert (better > worse).all()


@given(st.lists(score, min_size=2, max_size=8), score, positions)
def test_the_standardised_score_rises_with_the_score(scores, other, data):
    place = data.draw(st.integers(0, len(scores) - 1))
    low, high = sorted([scores[place], other])
    assume(low < high)
    of = [
        boost_or_dampen(
            z_scores(_changed(doubles(*scores), place, value), std_epsilon=1e-6), boost=1.0, dampen=0.5
        )[place]
        for value in (low, high)
    ]
    assert of[1] > of[0]


@given(chains)
def test_progress_is_never_punished_and_regress_never_rewarded(chain):
    scores, progress = doubles(*(s for s, _ in chain)), doubles(*(p for _, p in chain))
    got = chain_rewards(scores, progress, 5.0, **CHAIN)
    assert (got.effect[got.change > 0] >= 0).all()
    assert (got.effect[got.change < 0] <= 0).all()


def test_a_better_thought_that_goes_back_loses_more():
    change, progress = doubles(-3, -3, -3), doubles(2, 2, 2)
    factor = progress_factor(change, progress, progress_gain=10.0, progress_loss=10.0, critic_scale=10.0)
    effect = progress_effect(factor, thought_multiplier(doubles(0, 5, 10), thought_divisor=10.0))
    assert effect[0] == 0
    assert 0 > effect[1] > effect[2]


@given(st.lists(st.tuples(score, score), min_size=1, max_size=8), score)
def test_a_higher_first_progress_only_lowers_what_follows(chain, other):
    scores, progress = doubles(*(s for s, _ in chain)), doubles(*(p for _, p in chain))
    low, high = sorted([progress[0].item(), other])
    less = chain_rewards(scores, _changed(progress, 0, low), 5.0, **CHAIN).rewards
    more = chain_rewards(scores, _changed(progress, 0, high), 5.0, **CHAIN).rewards
    assert more[0] == less[0]
    assert (more <= less + 1e-12).all()


def test_repeating_a_true_line_pays_while_the_overall_score_stands_in_every_segment():
    def total(overall: str, segments: int) -> float:
        same = torch.full((segments,), 8.0, dtype=torch.float64)
        return chain_rewards(same, same, 7.0, **changed(overall=overall)).rewards.sum().item()

    assert total("every_segment", 6) == pytest.approx(total("every_segment", 3) + 21)
    assert total("shared", 6) == pytest.approx(total("shared", 3))


# --- siblings


def test_siblings_by_hand():
    got = sibling_rewards(doubles(2, 4, 6), doubles(5, 2, 4), doubles(9, 3, 4, 5), **CRITIC)
    assert got.baseline.tolist() == [4, 4, 4]  # (3 + 4 + 5) / 3
    assert got.change.tolist() == [1, -2, 0]
    z = 2 / (8 / 3 + 1e-6) ** 0.5
    fall = -math.log(3) * 8 / 10 * 0.4
    torch.testing.assert_close(got.effect, doubles(0.5 * 0.2, fall, 0))
    torch.testing.assert_close(got.rewards, doubles(-z / 2 + 0.1, fall, z))
    assert got.combined.tolist() == got.rewards.tolist()


def test_siblings_without_a_thought_before_them_are_their_own_baseline():
    got = sibling_rewards(doubles(2, 6), doubles(1, 9), doubles(), **CRITIC)
    assert got.effect.tolist() == [0, 0]
    z = 2 / (4 + 1e-6) ** 0.5
    torch.testing.assert_close(got.rewards, doubles(-z / 2, z))


@given(st.lists(st.tuples(score, score), min_size=1, max_size=9), st.integers(1, 4))
def test_a_thought_has_the_progress_effect_that_it_has_in_its_chain(chain, window):
    scores, progress = doubles(*(s for s, _ in chain)), doubles(*(p for _, p in chain))
    whole = chain_rewards(scores, progress, 5.0, **{**CHAIN, "progress_window": window})
    last = sibling_rewards(scores[-1:], progress[-1:], progress[:-1], **{**CRITIC, "progress_window": window})
    assert last.effect.item() == pytest.approx(whole.effect[-1].item(), abs=1e-7)
