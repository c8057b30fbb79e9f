"""`graft report`. What the page holds stands in `tests/report`; that it is written again in `test_train.py`."""

from __future__ import annotations

from tests.report.synthetic import write_run


def test_of_a_folder_without_a_run(tmp_path, graft):
    result = graft("report", tmp_path)
    assert (result.code, result.out) == (3, "")
    assert "not a run folder" in result.err


def test_while_the_run_goes_on_the_half_written_line_is_left_out(tmp_path, graft):
    folder = write_run(tmp_path / "run", steps=2, finished=False)
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "sta')
    result = graft("report", folder.path)
    assert (result.code, result.err) == (0, "")
    assert "2 steps" in (folder.path / "report.html").read_text(encoding="utf-8")
