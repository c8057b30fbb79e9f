"""The top of the page by hand, from a run that is a few records. Whole pages: `test_html.py`."""

from __future__ import annotations

from typing import Any

import pytest

from graft.report.page_data import Run
from graft.report.page_head import footer, head, page_title


def make_run(
    summary: dict[str, Any] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    steps: int = 3,
    records: list[dict[str, Any]] | None = None,
    name: str = "first",
) -> Run:
    trained = [{"step": n, "stage": "train", "reward_mean": n / 10} for n in range(1, steps + 1)]
    return Run(
        name=name,
        settings=settings or {},
        config="",
        summary=summary or {},
        records=[*trained, *(records or [])],
        shown_steps={},
        pairs=[],
        left_out=[],
    )


def measured(moment: str, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"step": 3, "stage": "evaluation", "moment": moment, "held_out_accuracy": accuracy, **more}


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"status": "finished", "steps": 3}, "finished after 3 steps"),
        ({"status": "failed", "steps": 10}, "failed after 3 of 10 steps"),
        ({"status": "interrupted", "steps": 1200}, "interrupted after 3 of 1,200 steps"),
        ({"status": "running", "steps": 10}, "3 of 10 steps when this page was made, not finished"),
        ({}, "3 steps; no summary: cut short or still running"),
    ],
)
def test_how_far_the_run_came(summary, said):
    assert f">{said}</span>" in head(make_run(summary))


def test_a_run_that_failed_says_why_and_nothing_in_it_is_markup():
    page = head(make_run({"status": "failed", "error": "<b>loss</b> is nan", "model": "x"}, name="<i>"))
    assert '<p class="warning">&lt;b&gt;loss&lt;/b&gt; is nan</p>' in page
    assert "<i>" not in page + footer(make_run(name="<i>"))
    assert page_title(make_run()) == "first · graft"


def test_before_and_after_in_points():
    rows = {"held_out_rows": 400}
    records = [
        measured("before", 0.25, held_out_low=0.21, held_out_high=0.3, **rows),
        measured("after_warm_start", 0.5, held_out_low=0.45, held_out_high=0.55, **rows),
        measured("after", 0.45, held_out_low=0.4, held_out_high=0.5, **rows),
    ]
    page = head(make_run(settings={"algorithm": {"name": "grpo"}}, records=records))
    assert "+20.0 points on 400 rows. The warm start gave +25.0 points, GRPO −5.0 points." in page
    assert "overlap" not in page  # before ends at 30 %, after begins at 40 %


def test_measured_once_there_is_nothing_to_compare():
    page = head(make_run(records=[measured("before", 0.25)]))
    assert "Held-out accuracy, before" in page
    assert "Measured once: nothing to compare it with yet." in page


@pytest.mark.parametrize(
    ("summary", "facts"),
    [
        ({}, ["<dd>3</dd>"]),
        ({"training_rows": 2000, "held_out_rows": 0}, ["2,000 training, 0 held out"]),
        (
            {"device": "cpu", "dtype": "bf16", "engine": "fast", "threads": 2},
            ["cpu, bf16, fast engine, 2 threads"],
        ),
        (
            {"started_at": "2025-03-02T14:03:00+00:00", "finished_at": "2025-03-02T14:05:30+00:00"},
            ["2 March 2025, 14:03 UTC", "2 min 30 s"],
        ),
        ({"started_at": "yesterday"}, ["<dd>yesterday</dd>"]),
    ],
)
def test_facts_that_are_known_are_shown_and_others_left_out(summary, facts):
    page = head(make_run(summary))
    for fact in facts:
        assert fact in page
    assert "None" not in page
    assert ("<dt>Parameters</dt>" in page) == ("parameters" in summary)


def test_samples_a_step_are_prompts_times_group():
    settings = {"training": {"prompts_per_step": 8}, "algorithm": {"name": "grpo", "group_size": 4}}
    assert "<dd>8 prompts × 4</dd>" in head(make_run(settings=settings))
    assert "<dd>8 prompts</dd>" in head(make_run(settings={"training": {"prompts_per_step": 8}}))
