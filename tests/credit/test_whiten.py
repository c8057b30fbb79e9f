"""Whitening: by hand, by repetition of the values, and where there is no spread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.credit.whiten import whiten


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_by_hand():
    values = doubles(1, 3, 5)  # mean 3, squares 4 + 0 + 4, over N - 1: deviation 2
    assert whiten(values, how="none").tolist() == [1, 3, 5]
    torch.testing.assert_close(whiten(values, how="scale"), doubles(0.5, 1.5, 2.5))
    torch.testing.assert_close(whiten(values, how="full"), doubles(-1, 0, 1))


def test_scaling_keeps_signs_and_ratios_where_full_does_not():
    values = doubles(-1, 2, 4)
    scaled, full = whiten(values, how="scale"), whiten(values, how="full")
    torch.testing.assert_close(scaled / scaled[1], values / 2)
    assert full[1] > 0 > full[0]
    assert full.mean().item() == pytest.approx(0, abs=1e-12)


def test_counts_are_repetitions():
    values, counts = doubles(1, 4, -2), torch.tensor([3, 1, 2])
    repeated = values.repeat_interleave(counts)
    for how in ("scale", "full"):
        torch.testing.assert_close(
            whiten(values, how=how, counts=counts).repeat_interleave(counts), whiten(repeated, how=how)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[], [0.7], [0.0, 0.0], [0.1] * 7, [-3.3] * 1000])
def test_without_spread_scaling_leaves_alone_and_full_gives_nothing(values, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    assert whiten(tensor, how="scale").tolist() == tensor.tolist()
    assert whiten(tensor, how="full").tolist() == [0.0] * len(values)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="want 'none', 'scale' or 'full'"):
        whiten(doubles(1, 2), how="mean")


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=10),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["scale", "full"]),
)
def test_any_finite_values_stay_finite(values, dtype, how):
    tensor = torch.tensor(values, dtype=dtype)
    got = whiten(tensor, how=how)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20), st.sampled_from([1e-3, 7.0, 1e6]))
def test_the_unit_does_not_matter(values, factor):
    tensor = torch.tensor(values, dtype=torch.float64)
    for how in ("scale", "full"):
        once, scaled = whiten(tensor, how=how), whiten(tensor * factor, how=how)
        if tensor.std() > 1e-3 * tensor.abs().max():
            torch.testing.assert_close(scaled, once)
            assert once.std().item() == pytest.approx(1)
