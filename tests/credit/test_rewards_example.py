"""docs/methods/rewards_example.md: its numbers worked by hand, and the page as it would be written now."""

from __future__ import annotations

import math

import pytest

from scripts.rewards_example import PAGE, compute, render


def test_the_numbers_by_hand():
    got = compute()
    sigma = math.sqrt((1 + 9 + 25 + 9 + 4) / 5 + 1e-6)  # scores 8 10 2 10 5, mean 7
    standardised = [1 / sigma, 3 / sigma, -2.5 / sigma, 3 / sigma, -1 / sigma]  # the third and fifth halved
    effect = [
        0,
        math.sqrt(3) * 0.5 * 1.0,  # 5 after 2
        math.sqrt(1.5) * 0.5 * 0.2,  # 5 after (2 + 5) / 2
        math.sqrt(4) * 0.8 * 1.0,  # 8 after (2 + 5 + 5) / 3
        -math.log(2) * 0.5 * 0.5,  # 5 after (5 + 5 + 8) / 3
    ]
    rewards = [7 + s + q for s, q in zip(standardised, effect, strict=True)]
    assert got.standardised.tolist() == pytest.approx(standardised)
    assert got.baseline.tolist() == pytest.approx([2, 2, 3.5, 4, 6])
    assert got.change.tolist() == pytest.approx([0, 3, 1.5, 4, -1])
    assert got.effect.tolist() == pytest.approx(effect)
    assert got.rewards.tolist() == pytest.approx([*rewards, 7])


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render(), "write it anew: python scripts/rewards_example.py"
