"""The recipes run: a few steps of each with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.config_file import load_config
from graft.graders import grader_spec, open_grader
from graft.report.run_folder import RunFolder
from graft.runs import start_run
from tests.grading.samples import sample

RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_multi_grader_trains_and_reports_its_parts(tmp_path, tiny_model_folder):
    config = load_config(
        RECIPES / "multi_grader" / "config.toml",
        [
            f"run={tmp_path / 'run'}",
            f"model.name={tiny_model_folder}",
            "data.rows=20",
            "data.held_out=4",
            "training.steps=3",
            "training.prompts_per_step=2",
            "sampling.max_new_tokens=8",
        ],
    )
    run = start_run(config)
    records = RunFolder.open(run.path).read_metrics()
    steps = [record for record in records if record["stage"] == "train"]
    assert len(steps) == 3
    for record in steps:
        parts = [record[f"part_{name}_mean"] for name in ("right", "form", "near")]
        assert record["reward_mean"] == pytest.approx(0.8 * parts[0] + 0.1 * parts[1] + 0.1 * parts[2])
        assert record["grades_failed"] == 0
    assert any(record["part_near_mean"] > 0 for record in steps)
    assert all("held_out_part_near_mean" in record for record in records if record["stage"] == "evaluation")


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("3 + 4 = 7\nAnswer: 7", 0.95, 1.0), ("Answer: 8", 0.1, 0.2), ("7", 0.0, 0.11), ("", 0.0, 0.0)],
)
def test_what_the_multi_grader_pays(text, least, most):
    folder = RECIPES / "multi_grader"
    config = load_config(folder / "config.toml")
    assert config.grader is not None
    grader = open_grader(grader_spec(config.grader, folder), config.grading, base=folder)
    [grade] = grader([sample(text, answer="7")])
    assert grade.score is not None
    assert least <= grade.score <= most
