"""What counts as a sample, and which groups have a signal, algorithm by algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.cli.readings import GROUPED, READINGS
from graft.report.doctor.check import Verdict
from graft.report.doctor.evidence import COMPARE_PARTS, COMPARE_SAMPLES, read_evidence
from graft.report.run_folder import RunFolder
from graft.types import StopReason
from tests.report.doctor.runs import (
    OTHER_ROWS,
    STEPS,
    Drawn,
    all_scored,
    chain_grown,
    each,
    findings,
    healthy,
    not_ok,
    with_,
    write_run,
)


def chain_grown_run(path: Path, **changes: Any) -> RunFolder:
    """A run of GRFT in the shape of a chain, with four of five sibling groups with signal."""
    recorded = {"groups_with_signal": 0.8, "segments_per_completion": 3.8}
    return write_run(
        path, **{"algorithm": "grft", "group": chain_grown, "metrics": lambda step: recorded, **changes}
    )


def test_a_healthy_run_of_chains_grown_by_survivors_has_no_false_verdict(tmp_path):
    """Eight of its thirteen paths are candidates that were cut and dropped: no samples."""
    folder = chain_grown_run(tmp_path / "run")
    evidence = read_evidence(folder)
    assert {len(group.samples) for group in evidence.groups} == {5}
    assert {sample.segments for sample in evidence.samples} == {3, 4}
    found = findings(folder, topic="topic", elsewhere=OTHER_ROWS)
    unmeasured = (
        *("coverage", "difficulty_weight", "critic_agreement", "uncriticised", "value_model"),
        *("distinct_completions", "agreed_wrong_answers"),  # they share thoughts: not drawn apart
    )
    assert not_ok(found) == dict.fromkeys(unmeasured, Verdict.NOT_MEASURED)
    assert found["ends"].text == "100.0 % of 1000 completions end by themselves"
    assert (found["ends"].value, found["leaks"].value) == (1.0, 0.0)
    assert found["step_count"].text.startswith("3.8 → 3.8 segments a completion")
    for name in ("distinct_completions", "agreed_wrong_answers"):
        assert "go on from shared segments" in found[name].text


def test_what_a_dropped_candidate_says_is_no_sample(tmp_path):
    """With template marks and loops in all of them, and fewer and fewer of them at the first depth."""

    def spoilt(step: int, index: int) -> list[Drawn]:
        drawn = chain_grown(step, index)
        gone_on = {sample.after for sample in drawn}
        for place, sample in enumerate(drawn):
            if sample.stop is StopReason.CUT and place not in gone_on:
                drawn[place] = with_(sample, text="<|im_start|>" + "x" * 90)
        return drawn + [Drawn("y", None, StopReason.CUT, after=None)] * (STEPS - step)

    found = findings(chain_grown_run(tmp_path / "run", group=spoilt, accuracies=(0.4, 0.42)))
    assert [found[name].verdict for name in ("ends", "leaks", "loops", "step_count")] == [Verdict.OK] * 4
    assert (found["ends"].value, found["leaks"].value) == (1.0, 0.0)


def test_completions_of_a_chain_that_were_drawn_apart_are_compared(tmp_path):
    """Where candidates end the completion at once, nothing is shared."""

    def at_once(step: int, index: int) -> list[Drawn]:
        return [Drawn("same", 0.0)] * 4 if index < 9 else chain_grown(step, index)

    found = findings(chain_grown_run(tmp_path / "run", group=at_once))
    assert (found["distinct_completions"].verdict, found["distinct_completions"].value) == (Verdict.BAD, 0.25)
    assert (found["agreed_wrong_answers"].verdict, found["agreed_wrong_answers"].value) == (Verdict.BAD, 1.0)


@pytest.mark.parametrize(
    ("group", "cause", "change"),
    [
        (all_scored(1.0), "all right 100 %", "Harder rows"),
        (all_scored(0.0), "all wrong 100 %", "Easier rows"),
        (all_scored(0.5), "all equal 100 %", "finer scores"),
        (all_scored(0.0, StopReason.LENGTH), "all cut off 100 %", "`sampling.max_new_tokens`"),
    ],
)
def test_why_groups_have_no_signal(tmp_path, group, cause, change):
    found = findings(write_run(tmp_path / "run", group=group))["zero_signal"]
    assert cause in found.text
    assert change in found.change


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo", "rft", "vineppo", "spo_chain"])
def test_equal_scores_are_no_lack_of_signal_where_groups_are_not_compared(tmp_path, algorithm):
    folder = write_run(
        tmp_path / "run", algorithm=algorithm, groups=1, group=all_scored(0.0), **recorded_signal(None)
    )
    found = findings(folder, topic="topic")
    for name in ("zero_signal", "coverage"):
        assert found[name].verdict is Verdict.NOT_MEASURED
        assert "not compared within a group" in found[name].text
        assert f"`{algorithm}`" in found[name].text


@pytest.mark.parametrize("algorithm", ["process_grpo", "grft", "spo_tree"])
@pytest.mark.parametrize(("share", "verdict"), [(0.9, Verdict.OK), (0.4, Verdict.LOOK), (0.1, Verdict.BAD)])
def test_where_parts_are_compared_the_recorded_share_counts(tmp_path, algorithm, share, verdict):
    """All samples of every group have the same grade: what is compared are scores of parts."""
    folder = write_run(
        tmp_path / "run", algorithm=algorithm, groups=1, group=all_scored(0.0), **recorded_signal(share)
    )
    found = findings(folder, topic="topic")
    assert (found["zero_signal"].verdict, found["zero_signal"].value) == (verdict, pytest.approx(1 - share))
    assert "`algorithm.critic`" in found["zero_signal"].change
    assert found["coverage"].verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize("algorithm", ["process_grpo", "grft", "spo_tree"])
def test_where_nothing_had_a_score_no_share_was_recorded(tmp_path, algorithm):
    folder = write_run(tmp_path / "run", algorithm=algorithm, groups=0, **recorded_signal(None))
    assert (
        findings(folder)["zero_signal"].text == "no step recorded `groups_with_signal`: nothing had a score"
    )


def test_who_compares_what_is_what_the_settings_say():
    recorders = {
        name for reading in READINGS if reading.metric == "groups_with_signal" for name in reading.methods
    }
    assert COMPARE_SAMPLES == GROUPED
    assert recorders - GROUPED == COMPARE_PARTS


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (lambda step, index: healthy(step, index)[:1], "no late group has two samples with a score"),
        (each(lambda s, g, i, d: with_(d, score=None)), "no sample of training has a score"),
    ],
)
def test_why_no_group_has_two_scores(tmp_path, group, reason):
    folder = write_run(tmp_path / "run", group=group, groups=1, **recorded_signal(None))
    found = findings(folder)
    assert (found["zero_signal"].text, found["agreed_wrong_answers"].text) == (reason, reason)
    recorded = findings(write_run(tmp_path / "recorded", group=group, groups=1, **recorded_signal(0.0)))[
        "zero_signal"
    ]
    assert (recorded.verdict, recorded.value) == (Verdict.BAD, 1.0)
    assert f"{reason}, so nothing says why" in recorded.text


def recorded_signal(share: float | None) -> dict[str, Any]:
    return {"metrics": lambda step: {"groups_with_signal": share}}


def test_groups_without_signal_are_counted_without_trees_too(tmp_path):
    found = findings(write_run(tmp_path / "run", groups=0, **recorded_signal(0.1)))["zero_signal"]
    assert (found.verdict, found.value) == (Verdict.BAD, pytest.approx(0.9))
    assert "nothing says why" in found.text
