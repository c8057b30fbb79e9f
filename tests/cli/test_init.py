"""`graft init`: the task that it writes is whole and runs."""

from __future__ import annotations

import json
import subprocess
import sys

from graft.report.run_folder import RunFolder


def test_it_writes_a_task_that_can_be_tried_and_trained(tmp_path, tiny_model_folder, graft, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = graft("init", "task")
    assert written.code == 0
    assert written.out.splitlines() == ["task/config.toml", "task/rows.jsonl", "task/grader.py"]
    for command in (
        "graft train task/config.toml --dry-run",
        "graft train task/config.toml ",
        "graft eval runs/first",
    ):
        assert f"  {command}" in written.err

    tiny = ("--set", f"model.name={tiny_model_folder}", "--set", "training.steps=1")
    estimated = graft("train", "task/config.toml", "--dry-run", *tiny)
    assert estimated.code == 0, estimated.err
    assert "8 to train on, 2 held out" in estimated.out

    trained = graft("train", "task/config.toml", *tiny)
    assert (trained.code, trained.out) == (0, "runs/first\n")
    assert RunFolder.open(tmp_path / "runs" / "first").read_summary()["status"] == "finished"
    assert graft("eval", "runs/first").code == 0


def test_without_a_folder_it_is_written_here(tmp_path, graft, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert graft("init").out.splitlines() == ["config.toml", "rows.jsonl", "grader.py"]


def test_nothing_is_overwritten(tmp_path, graft):
    (tmp_path / "grader.py").write_text("mine")
    result = graft("init", tmp_path)
    assert result.code == 2
    assert f"{tmp_path / 'grader.py'}: there already" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["grader.py"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, graft):
    (tmp_path / "file").touch()
    result = graft("init", tmp_path / "file" / "task")
    assert result.code == 2
    assert "cannot be written" in result.err


def test_the_rows_are_ten_and_the_grader_passes_its_own_checks(tmp_path, graft):
    graft("init", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert len({row["prompt"] for row in rows}) == 10
    assert all(isinstance(row["answer"], int) for row in rows)
    subprocess.run([sys.executable, tmp_path / "grader.py"], check=True, timeout=30)
