"""Settings -> phases, and epochs -> steps, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from graft.algorithm_settings import GRPO, SFT
from graft.config import Optimizer
from graft.config_file import check_config
from graft.phases import Phase, phases_of
from graft.report.metrics import Moment, Stage


def phases(rows: int = 100, **changes: Any) -> list[Phase]:
    least = {"run": "r", "model": {"name": "m"}, "data": {}, "training": {"steps": 10}}
    return phases_of(check_config({**least, **changes}, where="test"), training_rows=rows)


def test_one_phase():
    assert phases(algorithm={"group_size": 4}, optimizer={"learning_rate": 1e-4}) == [
        Phase(
            stage=Stage.TRAIN,
            settings=GRPO(group_size=4),
            optimizer=Optimizer(learning_rate=1e-4),
            rows_per_step=8,
            steps=10,
            after=Moment.AFTER,
        )
    ]


def test_a_warm_start_comes_first_with_an_optimizer_of_its_own():
    first, second = phases(warm_start={"worked": "key:w", "steps": 3, "rows_per_step": 5})
    assert first == Phase(
        stage=Stage.WARM_START,
        settings=SFT(worked="key:w"),
        optimizer=Optimizer(learning_rate=2e-5),
        rows_per_step=5,
        steps=3,
        after=Moment.AFTER_WARM_START,
    )
    assert [second] == phases()


def test_a_phase_ends_with_its_steps_or_with_its_tokens():
    [by_steps] = phases()
    assert not by_steps.ended(steps=9, generated_tokens=10**9)
    assert by_steps.ended(steps=10, generated_tokens=0)
    [by_tokens] = phases(training={"generated_tokens": 500})
    assert by_tokens.steps is None
    assert not by_tokens.ended(steps=10**9, generated_tokens=499)
    assert by_tokens.ended(steps=1, generated_tokens=500)


@pytest.mark.parametrize(
    ("rows", "epochs", "per_step", "steps"),
    [
        (100, 1, 10, 10),
        (101, 1, 10, 11),  # the last step is short of rows
        (101, 3, 10, 31),  # 303 rows: epochs run into each other
        (3, 1, 10, 1),
        (8, 2, 8, 2),
    ],
)
def test_epochs_become_steps(rows, epochs, per_step, steps):
    [phase] = phases(rows, training={"epochs": epochs, "prompts_per_step": per_step})
    assert phase.steps == steps
    assert phase.rows_per_step == per_step
