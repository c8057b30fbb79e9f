"""Lines that are no tree records: each is named with what is wrong, the others pass unchanged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import main
from graft.report.html import write_report
from graft.report.page_data import read_run
from graft.report.run_folder import RunFolder
from graft.report.tree_lines import well_formed
from tests.report.synthetic import write_run


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", steps=3)
    return list(folder.read_trees())


def told(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return list(well_formed(records, said.append)), said


def test_what_graft_writes_passes_unchanged(records):
    assert len(records) > 10
    assert {record["stage"] for record in records} == {"train", "evaluation"}
    found, said = told(records)
    assert said == []
    assert [id(record) for record in found] == [id(record) for record in records]


def dropped(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.pop(name)


def changed(*path: Any) -> Callable[[dict[str, Any]], None]:
    """`changed("nodes", 1, "parent", "x")` sets what is there to "x"."""

    def change(record: Any) -> None:
        *keys, last, value = path
        for key in keys:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (dict.clear, "line 3: step: field required"),
        (dropped("stage"), "line 3: stage: field required"),
        (dropped("nodes"), "line 3: nodes: field required"),
        (changed("stage", "tarin"), "line 3: stage: input should be 'warm_start', 'train' or 'evaluation'"),
        (changed("step", "1"), "line 3: step: input should be a valid integer"),
        (changed("nodes", []), "line 3: nodes: list should have at least 1 item"),
        (changed("nodes", 1, "tokens", None), "line 3: nodes.1.tokens: input should be a valid list"),
        (changed("nodes", 1, {}), "line 3: nodes.1.parent: field required"),
        (changed("nodes", 1, "parent", 1), "line 3: node 1 has parent 1"),
        (changed("nodes", 1, "parent", 9), "line 3: node 1 has parent 9"),
        (changed("nodes", 1, "parent", -1), "line 3: node 1 has parent -1"),
        (changed("grades", "1", "good"), "line 3: grades.1: input should be"),
        (changed("messages", "hello"), "line 3: messages: input should be a valid list"),
        (changed("nodes", 1, "kind", "idea"), "line 3: nodes.1.kind: input should be 'prompt', 'thought'"),
        (changed("nodes", 1, "group", None), "line 3: nodes.1.group: input should be a valid integer"),
        (changed("numbers", {"1": {"S": None}}), "line 3: numbers.1.S"),
        (changed("numbers", {"1": 5}), "line 3: numbers.1: input should be a valid dictionary"),
        (
            changed("critiques", {"1": {"reasons": "no"}}),
            "line 3: critiques.1.reasons: input should be a valid list",
        ),
        (changed("survivors", [1, 99]), "line 3: survivors: there is no node 99 below the prompt"),
        (changed("survivors", [0]), "line 3: survivors: there is no node 0 below the prompt"),
        (changed("moment", "later"), "line 3: moment: input should be"),
    ],
)
def test_a_line_that_is_no_tree_record_is_named_and_left_out(records, spoil, message):
    lines = copy.deepcopy(records[:5])
    spoil(lines[2])
    found, said = told(lines)
    assert found == [*records[:2], *records[3:5]]
    assert len(said) == 1
    assert said[0].startswith(f"trees.jsonl, {message}")


def test_advantages_that_are_not_finite_are_text_in_the_file(records):
    lines = copy.deepcopy(records[-1:])
    lines[0]["advantages"] = {"1": "NaN"}
    assert told(lines) == (lines, [])


def test_the_rest_of_the_report_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "run", steps=3)
    write_report(folder.path)
    whole = read_run(folder, max_trees=400)
    trees = folder.path / "trees.jsonl"
    lines = trees.read_text().splitlines()
    spoilt = next(i for i, line in enumerate(lines) if json.loads(line)["stage"] == "train")
    lines.insert(spoilt, json.dumps({"step": 1, "stage": "train", "<b>": 1}))
    trees.write_text("\n".join(lines) + "\n")

    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder.path)])
    assert ended.value.code == 0
    said = capsys.readouterr()
    where = f"trees.jsonl, line {spoilt + 1}: row: field required"
    assert said.err == f"{folder.path}: left out of the report: {where}\n"
    assert said.out == f"{folder.path / 'report.html'}\n"
    again = read_run(RunFolder.open(folder.path), max_trees=400)
    assert again.left_out == [where]
    assert (again.shown_steps, again.pairs) == (whole.shown_steps, whole.pairs)
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert f"1 line is no tree record and left out: {where}." in page
