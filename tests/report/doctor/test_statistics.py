"""By hand, and against slow or library versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.report.doctor.statistics import chance_of_order, share_error, trend


def test_a_trend_by_hand():
    line = trend([0, 1, 2], [0, 3, 0])  # flat at 1; residuals -1, 2, -1; slope's error sqrt(6 / 1 / 2)
    assert (line.first, line.last) == pytest.approx((1, 1))
    assert line.error == pytest.approx(2 * math.sqrt(3))
    assert line.sure_rise == 0
    exact = trend([2, 4, 6], [1, 2, 3])
    assert (exact.first, exact.last, exact.sure_rise) == pytest.approx((1, 3, 2))
    rising = trend([0, 1, 2, 3], [0, 3, 4, 7])  # slope 2.2; residuals -0.2, 0.6, -0.6, 0.2
    assert rising.sure_rise == pytest.approx(6.6 - 2 * 3 * math.sqrt(0.8 / 2 / 5))
    assert trend([1, 2], [5, 9]).sure_rise == 0  # two points: nothing tells the noise


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20))
def test_a_trend_is_numpys_line(values):
    places = list(range(len(values)))
    line = trend(places, values)
    slope, start = np.polyfit(places, values, 1)
    assert (line.first, line.last) == pytest.approx((start, start + slope * places[-1]), abs=1e-6)


def test_the_error_of_a_share():
    assert share_error(0.5, 100) == pytest.approx(0.05)
    assert 0 < share_error(0.0, 100) < 0.01
    assert share_error(1.0, 100) == pytest.approx(share_error(0.0, 100))


numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(numbers, numbers)
def test_the_chance_of_order_counts_pairs(higher, lower):
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in higher for b in lower]
    assert chance_of_order(higher, lower) == pytest.approx(sum(pairs) / len(pairs))
