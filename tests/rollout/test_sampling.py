"""Random streams against SplitMix64 in plain integers; kept sets by hand; draws against a loop over the tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.rollout.sampling import SamplingSettings, draw, keep_mask, stream_key, uniforms
from graft.types import Purpose


def settings(**changes) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=1, **changes)


def split_mix_64(seed: int):
    """Steele, Lea and Flood (2014), with Python's own integers: yields 64-bit numbers."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def test_split_mix_64_itself_gives_the_published_numbers():
    # the sequence of seed 1234567 that Rosetta Code and other implementations list
    numbers = split_mix_64(1234567)
    assert [next(numbers) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(0, 2**64 - 1))
def test_uniforms_are_split_mix_64(key):
    count = 20
    numbers = split_mix_64(key)
    expected = [(next(numbers) >> 11) / 2**53 for _ in range(count)]
    got = uniforms(np.full(count, key, dtype=np.uint64), np.arange(count))
    assert got.dtype == np.float64
    assert got.tolist() == expected
    assert 0 <= got.min() <= got.max() < 1


def test_the_largest_and_the_smallest_number_are_in_the_range():
    # the 64-bit result is a bijection of key + golden: invert the last steps to hit both ends
    def undo_shift(z: int, by: int) -> int:
        result = z
        for _ in range(64 // by):
            result = z ^ (result >> by)
        return result

    def key_for(number: int) -> int:
        z = undo_shift(number, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        z = undo_shift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        return (undo_shift(z, 30) - 0x9E3779B97F4A7C15) % 2**64

    keys = np.array([key_for(0), key_for(2**64 - 1)], dtype=np.uint64)
    assert uniforms(keys, np.zeros(2, dtype=np.int64)).tolist() == [0.0, 1 - 2**-53]


def test_batching_changes_no_number():
    keys = np.array([stream_key(0, Purpose.TRAIN, 1, row, 0) for row in range(5)], dtype=np.uint64)
    positions = np.array([0, 7, 3, 3, 100])
    alone = [float(uniforms(keys[i : i + 1], positions[i : i + 1])[0]) for i in range(5)]
    order = [3, 1, 4, 0, 2]
    assert uniforms(keys, positions).tolist() == alone
    assert uniforms(keys[order], positions[order]).tolist() == [alone[i] for i in order]
    assert len(set(alone)) == 5


def test_each_part_of_a_key_counts():
    parts = [
        (seed, purpose, step, row, attempt, place)
        for seed in (0, 1)
        for purpose in Purpose
        for step in (0, 1, 11)
        for row in (0, 1, 11)
        for attempt in (0, 1)
        for place in (0, 1)
    ]
    keys = [stream_key(*part) for part in parts]
    assert len(set(keys)) == len(parts) == 216
    assert all(0 <= key < 2**64 for key in keys)
    assert keys == [stream_key(*part) for part in parts]
    # numbers that stand next to each other do not run together, and a path has a length
    assert stream_key(0, Purpose.TRAIN, 1, 11, 0) != stream_key(0, Purpose.TRAIN, 11, 1, 0)
    assert stream_key(0, Purpose.TRAIN, 1, 1, 0, 1, 2) != stream_key(0, Purpose.TRAIN, 1, 1, 0, 12)
    assert stream_key(0, Purpose.TRAIN, 1, 1, 0) != stream_key(0, Purpose.TRAIN, 1, 1, 0, 0)


def test_a_key_does_not_change_from_one_version_to_the_next():
    # `printf 7:train:3:12:0:5 | b2sum -l 64` gives 406d8957a9df13c3; its bytes are read from the last to the first
    assert stream_key(7, Purpose.TRAIN, 3, 12, 0, 5) == 0xC313DFA957896D40


# Probabilities; the most likely token is not the first.
P = [0.05, 0.4, 0.25, 0.2, 0.1]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),  # the most likely alone has enough
        ({"top_p": 0.45}, [1, 2]),  # 0.4 is not enough, 0.65 is
        ({"top_p": 0.8}, [1, 2, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.2}, [1, 2, 3, 4]),  # at least 0.08
        ({"min_p": 0.6}, [1, 2]),  # at least 0.24
        ({"min_p": 1.0}, [1]),
        # top-p counts in what top-k kept: 0.4 / 0.65 = 0.615 alone, so 0.6 needs one token, and 0.62 two
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.62}, [1, 2]),
        ({"top_k": 4, "min_p": 0.45}, [1, 2, 3]),
        ({"top_p": 0.8, "min_p": 0.6}, [1, 2]),
        ({"top_k": 3, "top_p": 0.7, "min_p": 0.7}, [1]),
    ],
)
def test_the_kept_set_by_hand(filters, kept):
    logits = torch.tensor([P, P[::-1]]).log() + 3.0
    mask = keep_mask(logits, settings(**filters))
    assert mask.shape == (2, 5)
    assert mask[0].nonzero()[:, 0].tolist() == kept
    assert mask[1].flip(0).nonzero()[:, 0].tolist() == kept


def test_ties():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]])
    assert keep_mask(logits, settings(top_k=2)).int().tolist() == [[0, 1, 1, 1, 0]]  # all at the k-th place
    assert keep_mask(logits, settings(min_p=1.0)).int().tolist() == [[0, 1, 1, 1, 0]]
    # top-p takes the smallest set, whichever of the equal ones: each has 0.285
    assert keep_mask(logits, settings(top_p=0.5)).sum().item() == 2


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary():
    """A running sum in fp32 reaches 1 before its end."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 49152)
    assert keep_mask(logits, settings(top_p=1.0)).all()


def slow_draw(logits: list[float], uniform: float, temperature: float, kept: list[int]) -> tuple[int, float]:
    """The first token at which the summed probability of the kept ones exceeds `uniform`, and its log-probability."""
    top = max(logits[i] / temperature for i in kept)
    weights = {i: math.exp(logits[i] / temperature - top) for i in kept}
    total = math.fsum(weights.values())
    reached = 0.0
    for token in sorted(kept):
        reached += weights[token] / total
        if reached > uniform:
            return token, math.log(weights[token] / total)
    raise AssertionError("past the end")


@pytest.mark.parametrize(
    ("temperature", "filters"),
    [(1.0, {}), (0.5, {}), (2.0, {}), (1.0, {"top_k": 4}), (0.7, {"top_p": 0.8}), (1.3, {"min_p": 0.1})],
)
def test_draw_is_the_loop_over_tokens(temperature, filters):
    torch.manual_seed(1)
    rows, vocabulary = 200, 30
    logits = 2 * torch.randn(rows, vocabulary)
    uniform = torch.rand(rows, dtype=torch.float64)
    asked = settings(temperature=temperature, **filters)
    tokens, logprobs, kept = draw(logits, uniform, asked)
    assert (kept is not None) == bool(filters)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    allowed = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
    assert torch.equal(allowed, keep_mask(logits / temperature, asked))
    for row in range(rows):
        token, logprob = slow_draw(
            logits[row].tolist(), float(uniform[row]), temperature, allowed[row].nonzero()[:, 0].tolist()
        )
        assert int(tokens[row]) == token
        assert float(logprobs[row]) == pytest.approx(logprob, abs=2e-6)
    assert len(set(tokens.tolist())) > 5


def test_each_token_has_the_interval_of_its_cumulative_probability():
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    edges = [0.0, 0.125, 0.625, 0.875, 1.0]
    for token, (low, high) in enumerate(pairwise(edges)):
        for uniform in (low + 1e-6, (low + high) / 2, high - 1e-6):
            drawn, logprob, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), settings())
            assert drawn.item() == token
            assert logprob.item() == pytest.approx(float(logits[0, token]), abs=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}])
def test_the_ends_of_the_range_never_draw_what_cannot_be_drawn(filters):
    impossible = -torch.inf
    logits = torch.tensor([[impossible, impossible, 2.0, 1.9, impossible], [-90.0, -200.0, 0.3, 0.2, -300.0]])
    for uniform, token in ((0.0, 2), (1 - 2**-53, 3)):
        drawn, logprob, _ = draw(logits, torch.full((2,), uniform, dtype=torch.float64), settings(**filters))
        assert drawn[0].item() == token
        assert torch.isfinite(logprob).all()
        if uniform:  # at 0 the second row's e^-90 may still be drawn
            assert drawn[1].item() == token


def test_a_number_just_below_one_on_a_large_vocabulary():
    torch.manual_seed(2)
    logits = torch.randn(64, 50_000)
    logits[:, -1000:] = -torch.inf
    drawn, logprob, _ = draw(logits, torch.full((64,), 1 - 2**-53, dtype=torch.float64), settings())
    assert drawn.max().item() < 49_000
    assert torch.isfinite(logprob).all()


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.9}]
)
def test_log_probabilities_are_renormalised_over_the_kept_tokens(filters):
    torch.manual_seed(3)
    logits = torch.randn(1, 12)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs, kept = draw(logits.expand(4000, -1), grid, settings(temperature=0.8, **filters))
    assert kept is not None
    found = {int(t): float(p) for t, p in zip(tokens, logprobs, strict=True)}
    assert sorted(found) == kept[0].nonzero()[:, 0].tolist()
    assert 1 < len(found) < 12
    assert math.fsum(math.exp(p) for p in found.values()) == pytest.approx(1, abs=1e-6)
    for token, logprob in found.items():  # a grid hits an interval as often as it is wide
        assert int((tokens == token).sum()) == pytest.approx(4000 * math.exp(logprob), abs=1)


def test_the_frequencies_of_drawn_tokens():
    """Chi-square over 20,000 draws with the streams of 200 samples; 99.9 % quantile for 7 degrees: 24.3."""
    torch.manual_seed(4)
    logits = torch.randn(8)
    keys = np.array([stream_key(0, Purpose.TRAIN, 1, row, 0, 0) for row in range(200)], dtype=np.uint64)
    count = np.zeros(8)
    for position in range(100):
        uniform = torch.from_numpy(uniforms(keys, np.full(200, position)))
        tokens, _, _ = draw(logits.expand(200, -1), uniform, settings(temperature=1.5))
        count += np.bincount(tokens.numpy(), minlength=8)
    expected = 20_000 * (logits / 1.5).softmax(-1).double().numpy()
    assert ((count - expected) ** 2 / expected).sum() < 24.3
    untempered = 20_000 * logits.softmax(-1).double().numpy()
    assert ((count - untempered) ** 2 / untempered).sum() > 100  # the test can tell distributions apart
