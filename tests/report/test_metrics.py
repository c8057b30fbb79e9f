"""The table of metrics: what it lets through, what it refuses, and the page made from it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from graft.cli.docs import render_metrics
from graft.report.metrics import (
    METRICS,
    check_record,
    find_metric,
    without_wall_clock,
)
from graft.report.text import format_value

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def test_the_reference_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == render_metrics(), (
        "docs/reference/metrics.md is out of date; write it anew with python -m graft.cli.docs"
    )


def test_every_metric_has_a_row_with_its_meaning():
    rows = [line for line in render_metrics().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS.values(), strict=True):
        assert row.startswith(f"| `{metric.name}` |")
        assert metric.meaning.endswith(".")
        assert len(row.replace("\\|", "").split("|")) == 8


def test_metrics_of_one_chart_have_one_unit():
    charts: dict[str, set[str]] = {}
    for metric in METRICS.values():
        if metric.chart:
            charts.setdefault(metric.chart, set()).add(metric.unit)
    assert all(len(units) == 1 for units in charts.values())


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward_mean", "reward_mean"),
        ("held_out_pass_at_1", "held_out_pass_at_<k>"),
        ("held_out_pass_at_16", "held_out_pass_at_<k>"),
        ("part_format_mean", "part_<name>_mean"),
        ("part_a.b c_mean", "part_<name>_mean"),
    ],
)
def test_a_declared_name_is_found(name, declared):
    assert find_metric(name).name == declared


@pytest.mark.parametrize(
    "name",
    ["rewards_mean", "held_out_pass_at_0", "held_out_pass_at_k", "held_out_pass_at_<k>", "part__mean", ""],
)
def test_an_undeclared_name_is_refused(name):
    with pytest.raises(ValueError, match="not declared"):
        find_metric(name)


def test_the_refusal_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'reward_mean'"):
        check_record({"step": 1, "stage": "train", "rewards_mean": 1.0})


def test_a_record_becomes_plain_and_loses_what_was_not_measured():
    record = check_record(
        {
            "step": np.int64(3),
            "stage": "train",
            "reward_mean": np.float32(0.25),
            "kl_to_initial": None,
            "loss": 0,
        }
    )
    assert record == {"step": 3, "stage": "train", "reward_mean": 0.25, "loss": 0}
    assert [type(value) for value in record.values()] == [int, str, float, int]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"stage": "train"}, "needs 'step' and 'stage'"),
        ({"step": 1}, "needs 'step' and 'stage'"),
        ({"step": None, "stage": "train"}, "needs 'step' and 'stage'"),
        ({"step": 1, "stage": "training"}, "not a valid Stage"),
        ({"step": 1, "stage": "evaluation"}, "says its 'moment'"),
        ({"step": 1, "stage": "train", "moment": "after"}, "says its 'moment'"),
        ({"step": 1, "stage": "evaluation", "moment": "later"}, "not a valid Moment"),
        ({"step": 1, "stage": "train", "reward_mean": "0.5"}, "wants a number, got '0.5'"),
        ({"step": 1, "stage": "train", "reward_mean": True}, "wants a number, got True"),
        ({"step": 1, "stage": "train", "reward_mean": [0.5]}, "wants a number"),
        ({"step": 1, "stage": 3}, "wants a word, got 3"),
    ],
)
def test_a_record_that_means_nothing_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        check_record(record)


def test_only_the_machine_s_metrics_are_left_out_of_comparisons():
    record = {
        "step": 1,
        "stage": "train",
        "loss": 0.5,
        "step_seconds": 2.0,
        "tokens_per_s": 9.0,
        "peak_memory_gb": 1.0,
    }
    assert without_wall_clock(record) == {"step": 1, "stage": "train", "loss": 0.5}


def test_which_metrics_depend_on_the_machine():
    assert {metric.name for metric in METRICS.values() if metric.wall_clock} == {
        "tokens_per_s",
        "sample_seconds",
        "grade_seconds",
        "update_seconds",
        "critic_seconds",
        "load_seconds",
        "step_seconds",
        "evaluation_seconds",
        "peak_memory_gb",
    }


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("solved_share", 0.435, "43.5 %"),
        ("tokens_sampled", 12345, "12,345"),
        ("reward_mean", 0.123456, "0.1235"),
        ("tokens_per_s", 98765.4, "98,765"),
        ("loss", math.nan, "NaN"),
        ("gradient_norm", -math.inf, "−∞"),
        ("value_explained_variance", -0.0004, "0.0 %"),
        ("value_explained_variance", -0.0006, "-0.1 %"),
        ("critic_agreement", 7.495e-18, "0"),
        ("critic_agreement", -1e-17, "0"),
        ("learning_rate", 2e-7, "2e-07"),
    ],
)
def test_values_for_people(name, value, text):
    assert format_value(find_metric(name), value) == text
