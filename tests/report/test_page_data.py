"""What the page is given: which charts, which steps, in which order. Columns and cuts: `test_html.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.report import page_data
from graft.report.metrics import METRICS, Stage
from graft.report.page_data import chart_meaning, chart_titles, charts, read_run, run_seconds
from graft.report.run_folder import RunFolder
from tests.report.synthetic import grown_record, write_run, write_trees


def test_every_declared_chart_once_the_featured_first_and_the_loss_last():
    titles = chart_titles()
    assert len(set(titles)) == len(titles)
    assert set(titles) == {metric.chart for metric in METRICS.values() if metric.chart}
    assert titles[:2] == ["Reward", "Held-out accuracy"]
    assert titles[-1] == "Loss"
    assert all(chart_meaning(title) for title in titles)


def test_a_chart_needs_a_value_and_the_loss_of_reinforcement_is_none(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        folder.append_metrics({"step": 1, "stage": "warm_start", "loss": 2.0})
        folder.append_metrics({"step": 1, "stage": "train", "loss": 0.0, "reward_mean": 0.5})
    found = [(chart["title"], chart["stage"]) for chart in charts(read_run(folder, max_trees=9))]
    assert found == [("Reward", "train"), ("Warm-start loss", "warm_start")]


def test_charts_of_thoughts_come_where_they_were_measured(tmp_path: Path):
    folder = write_trees(tmp_path / "run", [], [])
    titles = [chart["title"] for chart in charts(read_run(folder, max_trees=9))]
    assert titles == [
        "Reward",
        "Segments a completion",
        "Critic scores",
        "Reward parts",
        "Critic and grader",
        "Segments clipped",
        "Failed critiques",
        "Value model",
    ]
    plain = read_run(write_run(tmp_path / "plain", steps=2), max_trees=9)
    assert not {chart["title"] for chart in charts(plain)} & set(titles[1:])


def test_metrics_of_one_chart_are_told_apart(tmp_path: Path):
    for title in chart_titles():
        labels = [metric.label for metric in METRICS.values() if metric.chart == title]
        assert len(labels) <= 3
        assert len(labels) == 1 or (len(set(labels)) == len(labels) and all(labels))
    shared = charts(read_run(write_trees(tmp_path / "run", [], []), max_trees=9))[2]
    assert shared["metrics"] == ["critic_thought_mean", "critic_progress_mean", "critic_overall_mean"]
    assert shared["labels"] == ["S", "P", "G"]


def test_each_part_of_a_grader_is_a_line_of_one_chart(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        folder.append_metrics({"step": 1, "stage": "train", "reward_mean": 0.5, "part_form_mean": 1.0})
        folder.append_metrics(
            {"step": 2, "stage": "train", "part_right\x1b_mean": 0.25, "part_form_mean": 0.5}
        )
        folder.append_metrics(
            {"step": 2, "stage": "evaluation", "moment": "after", "held_out_part_form_mean": 0.5}
        )
    _, parts = charts(read_run(folder, max_trees=9))
    assert (parts["title"], parts["stage"], parts["unit"]) == ("Parts of the score", "train", "score")
    assert parts["metrics"] == ["part_form_mean", "part_right\x1b_mean"]
    assert parts["labels"] == ["form", "right␛"]


def test_the_suffix_of_the_settings_is_no_part_of_a_rows_prompt(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1)
    config = (folder.path / "config.toml").read_text().replace("[data]", '[data]\nsuffix = "="')
    (folder.path / "config.toml").write_text(config)
    trees = (folder.path / "trees.jsonl").read_text()
    lines = [json.loads(line) for line in trees.splitlines()]
    for line in lines:
        line["item"]["question"] = line["item"]["question"].removesuffix("=")
    (folder.path / "trees.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(folder, max_trees=9)
    shown = [run.shown_steps[1][0], *page_data.page_data(run)["pairs"]]
    assert all(list(prompt["item"]) == ["answer"] for prompt in shown)


def test_the_page_explains_the_numbers_that_it_shows(tmp_path: Path):
    grown = grown_record(1, [2, 2])
    grown["numbers"]["1"]["own"] = 1.0
    run = read_run(write_trees(tmp_path / "run", [grown]), max_trees=9)
    assert page_data.numbers_shown(run) == ["S", "P", "value", "own", "A"]
    assert [entry["meaning"] == "" for entry in page_data.page_data(run)["numbers"]] == [False] * 3 + [
        True,
        False,
    ]


def test_seconds_are_those_of_steps_and_evaluations():
    records = [{"step_seconds": 1.5}, {"evaluation_seconds": 4.0}, {"loss": 1.0}]
    assert run_seconds(records) == 5.5


@pytest.mark.parametrize("max_trees", [1, 7, 400])
def test_steps_keep_their_order_first_and_last(tmp_path: Path, max_trees: int):
    run = read_run(
        write_run(tmp_path / "run", steps=9, prompts_per_step=2, evaluate=False), max_trees=max_trees
    )
    shown = list(run.shown_steps)
    assert shown == sorted(shown)
    assert sum(len(prompts) for prompts in run.shown_steps.values()) <= max_trees
    assert set(shown) <= {record["step"] for record in run.of_stage(Stage.TRAIN)}
    if max_trees >= 4:
        assert (shown[0], shown[-1]) == (1, 9)


def test_texts_that_would_make_the_page_slow_leave_fewer_steps(tmp_path: Path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=8, evaluate=False)
    whole = read_run(folder, max_trees=400).shown_steps
    size = sum(page_data._characters(prompt) for prompts in whole.values() for prompt in prompts)
    monkeypatch.setattr(page_data, "CHARACTERS_ON_PAGE", size // 2)
    assert list(whole) == list(range(1, 9))
    assert len(read_run(folder, max_trees=400).shown_steps) == 4


def test_texts_that_would_fill_the_memory_leave_fewer_steps_while_they_are_read(tmp_path: Path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=9, evaluate=False)
    size = sum(
        page_data._characters(prompt)
        for prompts in read_run(folder, max_trees=400).shown_steps.values()
        for prompt in prompts
    )
    monkeypatch.setattr(page_data, "CHARACTERS_HELD", size // 2)
    assert list(read_run(folder, max_trees=400).shown_steps) == [1, 4, 6, 9]
    monkeypatch.setattr(page_data, "CHARACTERS_HELD", 1)
    assert list(read_run(folder, max_trees=400).shown_steps) == [9]


def test_without_an_evaluation_section_solved_is_a_score_of_one(tmp_path: Path):
    assert read_run(RunFolder.create(tmp_path / "a", ""), max_trees=1).threshold == 1.0
    own = RunFolder.create(tmp_path / "b", "[evaluation]\nthreshold = 0.5\n")
    assert read_run(own, max_trees=1).threshold == 0.5
