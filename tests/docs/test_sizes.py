"""The tables of sizes in docs/methods/rft.md and grft.md, computed again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.algorithm_settings import Rewards, ThoughtRewards
from graft.credit.group import group_relative_advantages
from graft.credit.rewards import answer_reward, chain_rewards, sibling_rewards

METHODS = Path(__file__).parents[2] / "docs" / "methods"
RIGHT = ((10, 10, 10, 10), (2.5, 5, 7.5, 10), 10)
WRONG = ((10, 10, 0, 10), (2.5, 5, 5, 7.5), 0)
"""S, P and G on a scale of 10."""


def sizes_in(page: str) -> list[list[str]]:
    """Cells of the rows of the section's table."""
    [section] = re.findall(r"^## Sizes.*?(?=^## )", (METHODS / page).read_text(), re.M | re.S)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return rows[2:]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.split()]


def doubles(scores: Sequence[float], factor: float = 1.0) -> torch.Tensor:
    return factor * torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("row", sizes_in("rft.md"), ids=lambda row: row[0])
def test_rewards_of_a_right_and_a_wrong_chain(row):
    named = dict(re.findall(r"`([\w.]+)` \"?([\w.]+)", row[0]))
    assert named or row[0] == "default"
    scale = float(named.pop("critic.scale", 10))
    settings: dict[str, Any] = {key.removeprefix("rewards."): value for key, value in named.items()}
    rewards = Rewards.model_validate(settings).model_dump(exclude={"whiten"})
    for cell, (scores, progress, overall) in zip(row[1:], (RIGHT, WRONG), strict=True):
        own = chain_rewards(
            doubles(scores, scale / 10),
            doubles(progress, scale / 10),
            overall * scale / 10,
            answered=True,
            critic_scale=scale,
            **rewards,
        )
        assert numbers(cell) == pytest.approx(own.rewards.tolist(), abs=0.00501)


@pytest.mark.parametrize("row", sizes_in("grft.md"), ids=lambda row: row[0])
def test_a_group_of_thoughts_and_an_answer(row):
    rewards = ThoughtRewards(answer_scale=float(row[0]))
    thoughts = sibling_rewards(
        doubles((10, 10, 0)),
        doubles((5, 5, 2.5)),
        doubles((2.5,)),
        critic_scale=10.0,
        **rewards.model_dump(exclude={"answer_scale"}),
    )
    answer = answer_reward(10.0, answer_scale=rewards.answer_scale)
    scores = torch.cat([thoughts.rewards, doubles((answer,))])
    advantages = group_relative_advantages(scores, torch.zeros(4, dtype=torch.int64), scale="group_std")
    assert numbers(row[1]) == pytest.approx(scores.tolist(), abs=0.00501)
    assert numbers(row[2]) == pytest.approx(advantages.tolist(), abs=0.00501)
