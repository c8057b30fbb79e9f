"""The tables of sizes in docs/methods/rft.md and grft.md, computed again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.algorithm_settings import GRFT, Rewards
from graft.credit.rewards import chain_rewards
from graft.crediting import Evidence
from graft.crediting_trees import credit_siblings
from graft.tree import ROOT, Kind, Tree
from graft.types import Critique, Grade, Prompt
from tests.trees import add_segment

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
def test_a_group_of_thoughts_and_answers(row):
    """Behind a line with S 10 and P 2.5: three lines, a right answer and a wrong one."""
    named = dict(re.findall(r"`(?:rewards\.)?(\w+)` \"?([\w.]+)", row[0]))
    compare = named.pop("compare")
    settings = GRFT.model_validate({"compare": compare, "rewards": named})
    tree = Tree(Prompt(row=0, messages=(), item={}, tokens=np.zeros(1, dtype=np.int32), question=""))
    line = add_segment(tree, ROOT, 1, tree.new_group(), Kind.THOUGHT)
    group = tree.new_group()
    lines = [add_segment(tree, line, 1, group, Kind.THOUGHT) for _ in range(3)]
    right, wrong = (add_segment(tree, line, 1, group, Kind.ANSWER) for _ in range(2))
    critiques = {
        node: Critique(None, (10.0, own), (2.5, progress))
        for node, own, progress in zip(lines, (10.0, 10.0, 0.0), (5.0, 5.0, 2.5), strict=True)
    }
    critiques |= {right: Critique(10.0, (10.0,), (2.5,)), wrong: Critique(0.0, (10.0,), (2.5,))}
    grades = {right: Grade(1.0), wrong: Grade(0.0)}
    found = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings).details[0]
    siblings = (*lines, right, wrong)
    assert numbers(row[1]) == pytest.approx([found[node]["value"] for node in siblings], abs=0.00501)
    assert numbers(row[2]) == pytest.approx([found[node]["A"] for node in siblings], abs=0.00501)
