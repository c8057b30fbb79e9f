"""TensorBoard files: the declared names with their values, no step twice after resuming."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from graft.errors import ConfigError
from graft.report.metrics import Moment
from graft.report.tensorboard import FOLDER, TensorBoardWriter
from tests.report.synthetic import evaluation_metrics, warm_start_metrics

pytest.importorskip("tensorboard")


def read(run: Path, stage: str, name: str) -> list[tuple[int, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / FOLDER / stage))
        events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def step(number: int, reward: float) -> dict[str, Any]:
    return {"step": number, "stage": "train", "reward_mean": reward, "kl_to_initial": None}


def test_records_come_back_under_their_names_by_stage(tmp_path: Path):
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(evaluation_metrics(0, Moment.BEFORE, 0.125))
        writer.write(warm_start_metrics(1))
        writer.write(evaluation_metrics(0, Moment.AFTER_WARM_START, 0.25))
        writer.write(step(1, 0.5))
        writer.write(step(2, 0.75))
        writer.write(evaluation_metrics(2, Moment.AFTER, 0.5))
    assert read(tmp_path, "train", "reward_mean") == [(1, 0.5), (2, 0.75)]
    assert read(tmp_path, "warm_start", "learning_rate") == [(1, pytest.approx(2e-5))]
    assert read(tmp_path, "evaluation_before", "held_out_accuracy") == [(0, 0.125)]
    assert read(tmp_path, "evaluation", "held_out_accuracy") == [(0, 0.25), (2, 0.5)]
    with pytest.raises(KeyError):
        read(tmp_path, "train", "kl_to_initial")


def test_resuming_shows_no_step_twice_and_keeps_the_other_stages(tmp_path: Path):
    with TensorBoardWriter(tmp_path) as writer:
        for number in range(1, 11):
            writer.write(warm_start_metrics(number))
        for number in range(1, 8):
            writer.write(step(number, 0.0))
    with TensorBoardWriter(tmp_path) as writer:
        for number in range(5, 10):
            writer.write(step(number, 1.0))
    assert read(tmp_path, "train", "reward_mean") == [(n, 0.0 if n < 5 else 1.0) for n in range(1, 10)]
    assert [number for number, _ in read(tmp_path, "warm_start", "loss")] == list(range(1, 11))


def test_an_undeclared_name_is_refused(tmp_path: Path):
    with TensorBoardWriter(tmp_path) as writer, pytest.raises(ValueError, match="not declared"):
        writer.write({"step": 1, "stage": "train", "my_number": 1.0})
    assert not (tmp_path / FOLDER).exists()


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=r'pip install "graft-rl\[track\]"'):
        TensorBoardWriter(tmp_path)
