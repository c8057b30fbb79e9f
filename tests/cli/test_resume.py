"""`graft resume`: how a run that was stopped ends stands in `test_train.py`; here, one that needs nothing more."""

from __future__ import annotations

import json

from graft.report.run_folder import RunFolder


def test_a_finished_run_stays_as_it_is(task, graft):
    graft("train", task / "config.toml")
    folder = RunFolder.open(task / "run")
    metrics, trees = (folder.path / "metrics.jsonl").read_bytes(), (folder.path / "trees.jsonl").read_bytes()
    result = graft("resume", task / "run", "--json")
    assert result.code == 0
    summary = json.loads(result.out)
    assert (summary["run"], summary["status"]) == (str(task / "run"), "finished")
    assert (folder.path / "metrics.jsonl").read_bytes() == metrics
    assert (folder.path / "trees.jsonl").read_bytes() == trees


def test_a_run_that_was_moved_goes_on_where_it_is_now(task, graft):
    graft("train", task / "config.toml", "--set", "checkpoints.every=1")
    moved = (task / "run").rename(task / "elsewhere")
    result = graft("resume", moved)
    assert (result.code, result.out) == (0, f"{moved}\n")
    assert not (task / "run").exists()


def test_settings_that_were_edited_are_checked(task, graft):
    graft("train", task / "config.toml", "--set", "training.steps=1")
    config = task / "run" / "config.toml"
    config.write_text(config.read_text().replace("group_size = 2", "group_size = 0"))
    result = graft("resume", task / "run")
    assert result.code == 2
    assert f"{config}: algorithm.group_size = 0" in result.err
