"""Curves, figures over seeds, table and plot of a comparison, by hand."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.errors import ConfigError
from graft.report.comparison import (
    curve_of,
    first_and_last,
    first_reaching,
    markdown_page,
    run_result,
    spread,
    summarise,
    table_of,
)
from graft.report.comparison_plot import read_off, write_plot
from tests.report.doctor.runs import write_run

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results" / "token_level" / "runs"


def train(tokens: int, seconds: float) -> dict[str, Any]:
    return {"stage": "train", "step": 1, "generated_tokens": tokens, "step_seconds": seconds}


def evaluation(moment: str, accuracy: float, step: int = 0) -> dict[str, Any]:
    return {
        "stage": "evaluation",
        "moment": moment,
        "step": step,
        "held_out_accuracy": accuracy,
        "held_out_rows": 9,
    }


def points(*curve: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"generated_tokens": t, "seconds": s, "accuracy": a} for t, s, a in curve]


def test_a_curve_begins_where_training_does():
    records = [
        evaluation("before", 0.1),
        {"stage": "warm_start", "step": 1, "step_seconds": 100.0},
        evaluation("after_warm_start", 0.3),
        train(50, 2.0),
        train(90, 1.5),
        evaluation("during", 0.4, 2),
        train(130, 2.5),
        evaluation("after", 0.6, 3),
    ]
    assert [(p["generated_tokens"], p["seconds"], p["accuracy"]) for p in curve_of(records)] == [
        (0, 0.0, 0.3),
        (90, 3.5, 0.4),
        (130, 6.0, 0.6),
    ]
    assert [p["step"] for p in curve_of(records)] == [0, 2, 3]


def test_the_result_of_a_run_folder(tmp_path):
    metrics = {
        "groups_with_signal": 0.25,
        "judge_prompt_tokens": 3,
        "judge_completion_tokens": 2,
        "critic_prompt_tokens": 70,
        "critic_completion_tokens": 25,
        "step_seconds": 2.0,
    }
    result = run_result(write_run(tmp_path / "run", groups=0, metrics=lambda step: metrics))
    assert (result["steps"], result["generated_tokens"], result["judge_tokens"]) == (20, 70_000, 2_000)
    assert (result["seconds"], result["groups_with_signal"]) == (40.0, 0.25)
    assert [p["accuracy"] for p in result["curve"]] == [0.3, 0.45, 0.6]


def test_the_ends_of_a_run_are_fifths_of_the_steps_that_have_the_metric(tmp_path):
    def metrics(step: int) -> dict[str, Any]:  # of 20 steps 18 have it: fifths of 4
        counted = {} if step in (3, 17) else {"segments_per_completion": float(step)}
        return {**counted, "completion_length_mean": 10.0 * step}

    result = run_result(write_run(tmp_path / "run", groups=0, metrics=metrics))
    assert result["segments_per_completion"] == {
        "first": (1 + 2 + 4 + 5) / 4,
        "last": (16 + 18 + 19 + 20) / 4,
    }
    assert result["completion_length_mean"] == {"first": 25.0, "last": 185.0}
    assert first_and_last([{"x": 2.0}], "x") == {"first": 2.0, "last": 2.0}
    uncut = run_result(write_run(tmp_path / "uncut", groups=0))
    assert uncut["segments_per_completion"] is None


def result(label: str, seed: int, curve: list[dict[str, Any]], judge: int = 0) -> dict[str, Any]:
    last = curve[-1]
    return {
        "label": label,
        "algorithm": "grpo",
        "seed": seed,
        "steps": 3,
        "judge_tokens": judge,
        "curve": curve,
        "generated_tokens": last["generated_tokens"],
        "seconds": last["seconds"],
        "groups_with_signal": 0.5,
    }


RESULTS = [
    result("a", 0, points((0, 0, 0.2), (50, 5, 0.6), (100, 10, 0.5))),
    result("a", 1, points((0, 0, 0.2), (60, 8, 0.4), (120, 16, 0.7))),
    result("b", 0, points((0, 0, 0.2), (100, 20, 0.3))),
]


def comparison(results: list[dict[str, Any]] = RESULTS, target: float | None = 0.6) -> dict[str, Any]:
    lines = summarise(results, target=target)
    return {
        "generated_tokens": 100,
        "seeds": [0, 1],
        "runs_to_do": 1,
        "target": target,
        "lines": lines,
        "runs": results,
    }


def test_figures_over_seeds():
    a, b = summarise(RESULTS, target=0.6)
    assert a["final_accuracy"] == pytest.approx({"mean": 0.6, "low": 0.5, "high": 0.7, "std": 0.1 * 2**0.5})
    assert a["best_accuracy"]["mean"] == pytest.approx(0.65)
    assert (a["reached_target"], a["tokens_to_target"]["mean"], a["seconds_to_target"]["mean"]) == (
        2,
        85,
        10.5,
    )
    assert b["final_accuracy"] == {"mean": 0.3, "low": 0.3, "high": 0.3}
    assert (b["reached_target"], b["tokens_to_target"]) == (0, None)
    assert spread([None, None]) is None
    assert first_reaching(RESULTS[0]["curve"], 0.6) == RESULTS[0]["curve"][1]


def test_the_table():
    assert markdown_page(comparison()).splitlines() == [
        "|  | seeds | start | final | best | tokens to 60 % | seconds to 60 % | tokens | training, s | "
        "groups with signal |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 2 | 20.0 % | 60.0 % (50.0 to 70.0) | 65.0 % (60.0 to 70.0) | 85 (50 to 120) | 10 (5 to 16) | "
        "110 (100 to 120) | 13 (10 to 16) | 50.0 % |",
        "| b | 1 | 20.0 % | 30.0 % | 30.0 % | not reached | not reached | 100 | 20 | 50.0 % |",
        "",
        "Held-out accuracy: mean over seeds (lowest to highest). Training time without measuring and warm start. "
        "Budget of a run: 100 generated tokens, the step that reaches it included. Still to run: 1.",
    ]
    part = [*RESULTS[:1], result("a", 1, points((0, 0, 0.2), (9, 9, 0.3)), judge=40)]
    page = markdown_page(comparison(part))
    assert "| 50, 1 of 2 seeds |" in page
    assert "judge tokens" in page
    assert "tokens to" not in markdown_page(comparison(target=None))


def ends(first: float, last: float) -> dict[str, float]:
    return {"first": first, "last": last}


FOLLOWED = [
    {**RESULTS[0], "segments_per_completion": ends(4, 6), "completion_length_mean": ends(1000, 1400)},
    {**RESULTS[1], "segments_per_completion": ends(5, 9), "completion_length_mean": ends(1001, 1500)},
    {**RESULTS[2], "segments_per_completion": None, "completion_length_mean": ends(30, 20)},
]


def test_segments_and_length_of_a_completion_are_shown_where_any_run_has_them():
    a, b = summarise(FOLLOWED, target=None)
    assert a["segments_per_completion"]["seeds"] == 2
    assert a["segments_per_completion"]["first"] == pytest.approx(
        {"mean": 4.5, "low": 4, "high": 5, "std": 0.5**0.5}
    )
    assert a["segments_per_completion"]["last"]["mean"] == 7.5
    assert b["segments_per_completion"] is None
    headings, rows = table_of(comparison(FOLLOWED))
    assert headings[-2:] == ["segments a completion", "tokens a completion"]
    assert [cells[-2:] for cells in rows] == [
        ["4.5 → 7.5", "1,000.5 → 1,450.0"],
        ["–", "30.0 → 20.0"],
    ]
    assert "first and of the last fifth" in markdown_page(comparison(FOLLOWED))
    only_lengths = table_of(comparison([FOLLOWED[2]]))[0]
    assert "tokens a completion" in only_lengths
    assert "segments a completion" not in only_lengths


def test_results_from_before_these_were_kept_stand_beside_later_ones():
    headings, rows = table_of(comparison([RESULTS[0], FOLLOWED[1], RESULTS[2]]))
    assert headings[-2:] == ["segments a completion", "tokens a completion"]
    assert [cells[-2:] for cells in rows] == [
        ["5.0 → 9.0, 1 of 2 seeds", "1,001.0 → 1,500.0, 1 of 2 seeds"],
        ["–", "–"],
    ]


def test_the_published_results_still_make_a_table():
    paths = sorted(PUBLISHED.glob("*/seed-*.json"))
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert stored
    headings, rows = table_of(comparison(stored))
    assert {cells[0] for cells in rows} == {path.parent.name for path in paths}
    assert {len(cells) for cells in rows} == {len(headings)}


def test_curves_are_read_off_at_the_same_places_up_to_where_the_first_ends():
    places, accuracies = read_off([r["curve"] for r in RESULTS[:2]], "generated_tokens")
    assert (places[0], places[-1]) == (0, 100)
    assert {50, 60} <= set(places)
    at = {float(place): accuracies[:, i] for i, place in enumerate(places)}
    np.testing.assert_allclose(at[50], [0.6, 0.2 + 0.2 * 50 / 60])
    np.testing.assert_allclose(at[100], [0.5, 0.4 + 0.3 * 40 / 60])
    places, accuracies = read_off([points((0, 0, 0.2), (0, 9, 0.8))], "generated_tokens")
    assert places.tolist() == [0]


def test_the_plot_is_a_picture(tmp_path):
    path = write_plot(comparison(), tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_is_refused_by_a_clear_word(tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install 'graft-rl\\[plots\\]'"):
        write_plot(comparison(), tmp_path / "plot.png")
