"""Each check on a run folder that triggers each of its verdicts, and on healthy ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from graft.cli.settings import read_sections
from graft.report.doctor.check import Measured, Verdict
from graft.report.doctor.diagnosis import CHECKS, as_record
from graft.report.doctor.evidence import read_evidence
from graft.report.doctor.signal import CAUSES, PARTS_ALIKE, ratio
from graft.types import StopReason
from tests.report.doctor.runs import (
    LATE,
    OTHER_ROWS,
    SIZE,
    STEPS,
    Drawn,
    all_scored,
    chained,
    each,
    findings,
    healthy,
    not_ok,
    with_,
    write_run,
)


def test_a_healthy_run_is_ok_throughout(tmp_path):
    found = findings(write_run(tmp_path / "run"), topic="topic", elsewhere=OTHER_ROWS)
    verdicts = {name: finding.verdict for name, finding in found.items()}
    absent = {"distinct_segments", "step_count", "critic_agreement", "uncriticised", "value_model"}
    assert {name for name, verdict in verdicts.items() if verdict is Verdict.NOT_MEASURED} == absent
    assert {name for name, verdict in verdicts.items() if verdict is not Verdict.OK} == absent


def test_a_healthy_run_of_segments_is_ok_throughout(tmp_path):
    recorded = {"value_explained_variance": 0.6}
    folder = write_run(tmp_path / "run", algorithm="rft", group=chained, metrics=lambda step: recorded)
    found = findings(folder, topic="topic", elsewhere=OTHER_ROWS)
    unmeasured = ("difficulty_weight", "zero_signal", "coverage")
    assert not_ok(found) == dict.fromkeys(unmeasured, Verdict.NOT_MEASURED)
    assert "given to segments" in found["difficulty_weight"].text


def some_groups(tenths: int, made: Callable[[int, int], Sequence[Drawn]], base=healthy):
    """The first so many of ten groups are made; the others stay."""
    return lambda step, index: made(step, index) if index < tenths else base(step, index)


def longer_wrong_answers(growth: float):
    """Wrong completions grow from 20 characters in a line to (1 + growth) times as many."""

    def change(step: int, index: int, i: int, sample: Drawn) -> Drawn:
        length = 20 if sample.score else round(20 * (1 + growth * (step - 1) / (STEPS - 1)))
        return with_(sample, text=(sample.text * 3)[:length])

    return each(change)


def copies(distinct: int):
    """Only so many of the eight completions differ."""

    def made(step: int, index: int) -> list[Drawn]:
        own = healthy(step, index)
        return [with_(sample, text=own[i % distinct].text) for i, sample in enumerate(own)]

    return made


def wrong_of_one_mind(tenths: int):
    """Eight of ten groups are wholly wrong; in so many tenths of all groups the answers are the same."""

    def made(step: int, index: int) -> list[Drawn]:
        return [
            Drawn(s.text.rsplit(" ", 1)[0] + f"\n{7 if index < tenths else i}", 0.0 if index < 8 else s.score)
            for i, s in enumerate(healthy(step, index))
        ]

    return made


def weights(factor: float):
    """Groups with 2 or 6 of 8 solved weigh so many times as much."""

    def made(step: int, index: int) -> list[Drawn]:
        own = healthy(step, index)
        edge = sum(s.score or 0 for s in own) in (2, 6)
        return [with_(s, weight=factor if edge else 1.0) for s in own]

    return made


def repeated(share: float):
    """So much of each completion is one letter."""
    return each(
        lambda step, index, i, s: with_(s, text=s.text + "x" * round(len(s.text) * share / (1 - share)))
    )


def alike_at_last(kept: int):
    """In the late steps only so many of a group's eight samples have words of their own."""
    return lambda step, index: copies(kept)(step, index) if step in LATE else healthy(step, index)


def more_thoughts(growth: float):
    """Chains whose number of thoughts goes from 5 to (1 + growth) x 5 in a line."""

    def change(step: int, index: int, i: int, sample: Drawn) -> Drawn:
        count = round(5 * (1 + growth * (step - 1) / (STEPS - 1)))
        return with_(sample, thoughts=[f"{i} {k}\n" for k in range(count)])

    return each(change, chained)


def critic(right: float):
    """In so many of the late steps' samples a right completion's thoughts score 6, in the others 4; wrong ones 5."""

    def change(step: int, index: int, i: int, sample: Drawn) -> Drawn:
        place = (SIZE * step + i) % 20
        score = 5.0 if not sample.score else 6.0 if place < 20 * right else 4.0
        return with_(sample, critique={"overall": None, "thoughts": [score]})

    return each(change, chained)


def uncriticised(step: int, index: int) -> list[Drawn]:
    """Of the eight chains the first could not be scored."""
    failed = {"overall": None, "thoughts": [], "outcome": "timed_out"}
    return [with_(s, critique=failed) if i == 0 else s for i, s in enumerate(chained(step, index))]


def copied_segments(distinct: int):
    """Each sample has the same chain of 10 thoughts, of which so many differ."""
    return each(
        lambda step, index, i, s: with_(s, text="a", thoughts=[f"{k % distinct}\n" for k in range(10)]),
        chained,
    )


def metric(name: str, value: float | None):
    return {"metrics": lambda step: {name: value}, "groups": 0}


LATE_STEPS_METRIC = {
    "entropy look": {"metrics": lambda step: {"entropy": 0.2 if step in LATE else 0.5}},
    "entropy bad": {"metrics": lambda step: {"entropy": 0.04 if step in LATE else 0.5}},
}

CASES: list[tuple[str, Verdict, dict[str, Any], float | None]] = [
    ("learning", Verdict.LOOK, {"groups": 0, "accuracies": (0.4, 0.44)}, None),
    ("learning", Verdict.BAD, {"groups": 0, "accuracies": (0.6, 0.3)}, None),
    ("learning", Verdict.NOT_MEASURED, {"groups": 0, "accuracies": ()}, None),
    (
        "generalisation_gap",
        Verdict.LOOK,
        {
            "groups": 1,
            "accuracies": (0.4, 0.4),
            "held_out_rows": 20_000,
            "metrics": lambda s: {"solved_share": 0.4 + 0.01 * s},
        },
        None,
    ),
    (
        "generalisation_gap",
        Verdict.BAD,
        {
            "groups": 1,
            "accuracies": (0.4, 0.4),
            "held_out_rows": 20_000,
            "metrics": lambda s: {"solved_share": 0.3 + 0.03 * s},
        },
        None,
    ),
    ("generalisation_gap", Verdict.NOT_MEASURED, {"metrics": lambda step: {"solved_share": None}}, None),
    (
        "held_out_loss",
        Verdict.LOOK,
        {"groups": 0, "accuracies": (0.3, 0.70, 0.66), "held_out_rows": 10_000},
        None,
    ),
    (
        "held_out_loss",
        Verdict.BAD,
        {"groups": 0, "accuracies": (0.3, 0.7, 0.6), "held_out_rows": 10_000},
        None,
    ),
    ("held_out_loss", Verdict.NOT_MEASURED, {"groups": 0, "accuracies": ()}, None),
    ("zero_signal", Verdict.LOOK, {"group": some_groups(5, all_scored(1.0))}, 0.7),
    ("zero_signal", Verdict.BAD, {"group": some_groups(6, all_scored(0.0))}, 0.8),
    ("zero_signal", Verdict.NOT_MEASURED, metric("groups_with_signal", None), None),
    (
        "ungraded",
        Verdict.LOOK,
        {"group": some_groups(2, each(lambda s, g, i, d: with_(d, score=None) if i == 0 else d))},
        2 / 80,
    ),
    (
        "ungraded",
        Verdict.BAD,
        {"group": some_groups(8, each(lambda s, g, i, d: with_(d, score=None) if i == 0 else d))},
        8 / 80,
    ),
    ("ungraded", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("ratio", Verdict.LOOK, metric("ratio_max", 3.0), 3.0),
    ("ratio", Verdict.BAD, metric("ratio_max", 20.0), 20.0),
    ("ratio", Verdict.NOT_MEASURED, metric("ratio_max", None), None),
    ("clipped", Verdict.LOOK, metric("clipped_share", 0.3), 0.3),
    ("clipped", Verdict.BAD, metric("clipped_share", 0.5), 0.5),
    ("clipped", Verdict.NOT_MEASURED, metric("clipped_share", None), None),
    ("value_model", Verdict.OK, metric("value_explained_variance", 0.6), 0.6),
    ("value_model", Verdict.LOOK, metric("value_explained_variance", 0.2), 0.2),
    ("value_model", Verdict.BAD, metric("value_explained_variance", -0.3), -0.3),
    ("value_model", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("kl", Verdict.LOOK, metric("kl_to_initial", 0.1), 0.1),
    ("kl", Verdict.BAD, metric("kl_to_initial", 0.9), 0.9),
    ("kl", Verdict.BAD, metric("kl_to_initial", math.nan), math.nan),
    ("kl", Verdict.NOT_MEASURED, metric("kl_to_initial", None), None),
    ("engine_gap", Verdict.LOOK, metric("engine_gap_mean", 0.06), 0.06),
    ("engine_gap", Verdict.BAD, metric("engine_gap_mean", 0.3), 0.3),
    ("engine_gap", Verdict.NOT_MEASURED, metric("engine_gap_mean", None), None),
    (
        "ends",
        Verdict.LOOK,
        {"group": some_groups(6, each(lambda s, g, i, d: with_(d, stop=StopReason.LENGTH)))},
        0.4,
    ),
    ("ends", Verdict.BAD, {"group": each(lambda s, g, i, d: with_(d, stop=StopReason.LENGTH))}, 0.0),
    ("ends", Verdict.NOT_MEASURED, {"groups": 0}, None),
    (
        "leaks",
        Verdict.LOOK,
        {
            "group": some_groups(
                4, each(lambda s, g, i, d: with_(d, text=d.text + "<|im_end|>") if i == 0 else d)
            )
        },
        4 / 80,
    ),
    (
        "leaks",
        Verdict.BAD,
        {"group": some_groups(2, each(lambda s, g, i, d: with_(d, text="42\nuser\nand 3?")))},
        0.2,
    ),
    ("leaks", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("doubled_start", Verdict.LOOK, {"question": lambda index: "ssay" if index < 6 else "say"}, 0.6),
    ("doubled_start", Verdict.BAD, {"question": lambda index: "ssay"}, 1.0),
    ("doubled_start", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("length_of_wrong_answers", Verdict.LOOK, {"group": longer_wrong_answers(0.5)}, None),
    ("length_of_wrong_answers", Verdict.BAD, {"group": longer_wrong_answers(1.5)}, None),
    ("length_of_wrong_answers", Verdict.NOT_MEASURED, {"group": all_scored(0.0)}, None),
    ("truncated", Verdict.LOOK, metric("truncated_share", 0.1), 0.1),
    ("truncated", Verdict.BAD, metric("truncated_share", 0.4), 0.4),
    ("truncated", Verdict.NOT_MEASURED, metric("truncated_share", None), None),
    ("difficulty_weight", Verdict.LOOK, {"group": weights(2.0)}, 2.0),
    ("difficulty_weight", Verdict.BAD, {"group": weights(3.0)}, 3.0),
    ("difficulty_weight", Verdict.NOT_MEASURED, {"group": all_scored(1.0)}, None),
    ("coverage", Verdict.LOOK, {"topic": lambda index: "rare" if index == 9 else "other"}, 0.1),
    (
        "coverage",
        Verdict.BAD,
        {"group": some_groups(3, all_scored(0.0)), "topic": lambda i: "b" if i < 3 else "a"},
        0.3,
    ),
    ("coverage", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("distinct_completions", Verdict.LOOK, {"group": copies(4)}, 0.5),
    ("distinct_completions", Verdict.BAD, {"group": copies(2)}, 0.25),
    ("distinct_completions", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("agreed_wrong_answers", Verdict.LOOK, {"group": wrong_of_one_mind(4)}, 0.4),
    ("agreed_wrong_answers", Verdict.BAD, {"group": wrong_of_one_mind(10)}, 1.0),
    ("agreed_wrong_answers", Verdict.NOT_MEASURED, {"group": all_scored(1.0)}, None),
    ("distinct_segments", Verdict.LOOK, {"groups": 2, "group": copied_segments(10)}, 11 / 88),
    ("distinct_segments", Verdict.BAD, {"groups": 2, "group": copied_segments(2)}, 3 / 88),
    ("distinct_phrases", Verdict.LOOK, {"group": alike_at_last(4)}, None),
    ("distinct_phrases", Verdict.BAD, {"group": alike_at_last(2)}, None),
    ("distinct_phrases", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("entropy_left", Verdict.LOOK, LATE_STEPS_METRIC["entropy look"], 0.4),
    ("entropy_left", Verdict.BAD, LATE_STEPS_METRIC["entropy bad"], 0.08),
    ("entropy_left", Verdict.NOT_MEASURED, metric("entropy", None), None),
    ("loops", Verdict.LOOK, {"group": repeated(0.5)}, None),
    ("loops", Verdict.BAD, {"group": repeated(0.8)}, None),
    ("loops", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("step_count", Verdict.LOOK, {"groups": 1, "group": more_thoughts(0.4), "accuracies": (0.4, 0.42)}, None),
    ("step_count", Verdict.BAD, {"groups": 1, "group": more_thoughts(1.0), "accuracies": (0.4, 0.42)}, None),
    ("step_count", Verdict.OK, {"groups": 1, "group": more_thoughts(1.0), "accuracies": (0.4, 0.6)}, 0.0),
    ("step_count", Verdict.NOT_MEASURED, {"groups": 1, "group": more_thoughts(1.0), "accuracies": ()}, None),
    ("uncriticised", Verdict.OK, {"group": chained}, 0.0),
    ("uncriticised", Verdict.LOOK, {"group": some_groups(2, uncriticised, chained)}, 2 / 80),
    ("uncriticised", Verdict.BAD, {"group": some_groups(4, uncriticised, chained)}, 4 / 80),
    ("uncriticised", Verdict.NOT_MEASURED, {"groups": 1}, None),
    ("uncriticised", Verdict.NOT_MEASURED, {"groups": 0}, None),
    ("uncriticised", Verdict.NOT_MEASURED, metric("critic_failed", 3), None),
    ("uncriticised", Verdict.OK, metric("critic_failed", 0), 0.0),
    ("critic_agreement", Verdict.LOOK, {"groups": 2, "group": critic(0.75)}, None),
    ("critic_agreement", Verdict.BAD, {"groups": 2, "group": critic(0.4)}, None),
]


@pytest.mark.parametrize(("name", "verdict", "changes", "value"), CASES)
def test_verdicts(tmp_path, name, verdict, changes, value):
    found = findings(write_run(tmp_path / "run", **changes), topic="topic")[name]
    assert found.verdict is verdict, found.text
    if value is not None:
        assert found.value == pytest.approx(value, nan_ok=True)
    assert (found.value is None) == (verdict is Verdict.NOT_MEASURED)


@pytest.mark.parametrize(
    ("accuracy", "verdict"), [(0.45, Verdict.LOOK), (0.2, Verdict.BAD), (0.9, Verdict.OK)]
)
def test_rows_from_elsewhere(tmp_path, accuracy, verdict):
    elsewhere = {"rows": 20_000, "pass_at": {"1": {"mean": accuracy}}}
    folder = write_run(tmp_path / "run", held_out_rows=20_000)
    assert findings(folder, elsewhere=elsewhere)["out_of_distribution"].verdict is verdict
    assert findings(folder)["out_of_distribution"].verdict is Verdict.NOT_MEASURED


def test_every_check_has_all_its_verdicts_here():
    triggered = {(name, verdict) for name, verdict, _, _ in CASES}
    elsewhere = {"out_of_distribution"}  # in a test of its own
    by_healthy_runs = {
        ("distinct_segments", Verdict.NOT_MEASURED),
        ("critic_agreement", Verdict.NOT_MEASURED),
    }
    wanted = {
        (check.name, verdict)
        for check in CHECKS
        for verdict in Verdict
        if verdict is not Verdict.OK and check.name not in elsewhere
    }
    assert wanted <= triggered | by_healthy_runs


def test_growth_is_measured_to_the_percent(tmp_path):
    found = findings(write_run(tmp_path / "run", group=longer_wrong_answers(0.5)))["length_of_wrong_answers"]
    assert found.value is not None
    assert 0.35 < found.value < 10 / 25  # of a mean of 25 characters, the noise of rounding taken off
    assert found.text == "wrong 20 → 30 tokens, right 20 → 20 tokens"


def test_the_topic_is_asked_for_by_the_keys_that_there_are(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "answer, question, topic" in findings(folder)["coverage"].text
    assert "no row has the key 'topics'" in findings(folder, topic="topics")["coverage"].text
    table = findings(folder, topic="topic")["coverage"].details["topics"]
    assert set(table) == {"a", "b"}
    assert table["a"]["groups"] == 100


def test_a_critic_that_failed_is_left_out(tmp_path):
    failed = each(lambda s, g, i, d: with_(d, critique={"thoughts": [1.0], "outcome": "timed_out"}), chained)
    found = findings(write_run(tmp_path / "run", group=failed, groups=1))
    assert found["critic_agreement"].verdict is Verdict.NOT_MEASURED
    assert found["critic_agreement"].text == "the critic could score no completion"
    assert found["uncriticised"].text == "160 of 160 completions: timed_out 160"


def test_failed_critiques_are_counted_by_outcome(tmp_path):
    folder = write_run(tmp_path / "run", group=some_groups(1, uncriticised, chained), groups=2)
    assert findings(folder)["uncriticised"].text == "20 of 320 completions: timed_out 20"
    recorded = write_run(tmp_path / "recorded", **metric("critic_failed", 3))
    assert findings(recorded)["uncriticised"].text.startswith("60 completions failed, but no training trees")


@pytest.mark.parametrize(
    "critique", [{"thoughts": "odd"}, {"thoughts": [None]}, {"overall": "high"}, {"x": 1}]
)
def test_critiques_of_another_form_are_no_error(tmp_path, critique):
    odd = each(lambda s, g, i, d: with_(d, critique=critique), chained)
    assert (
        findings(write_run(tmp_path / "run", group=odd, groups=1))["critic_agreement"].verdict
        is Verdict.NOT_MEASURED
    )


def test_nothing_is_ok_of_an_empty_run(tmp_path):
    folder = write_run(tmp_path / "run", groups=0, accuracies=())
    (folder.path / "metrics.jsonl").write_text("")
    assert {finding.verdict for finding in findings(folder).values()} == {Verdict.NOT_MEASURED}


def test_every_setting_that_is_named_exists():
    sections = read_sections()
    known = {entry.path for section in sections for entry in section.settings} | {s.path for s in sections}
    changes = [*(check.change for check in CHECKS), *CAUSES.values(), PARTS_ALIKE]
    named = {name for change in changes for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", change)}
    assert named
    assert named <= known | {"user"}


def test_thresholds_read_well():
    said = {check.name: check.thresholds for check in CHECKS}
    assert said["truncated"] == "look from 5 %, bad from 20 %"
    assert said["entropy_left"] == "look at or below 50 %, bad at or below 10 %"
    assert said["ratio"] == "look from 2, bad from 10"


@pytest.mark.parametrize("reused", ["updates_per_batch", "minibatches", "refresh_every", None])
def test_the_policy_is_the_one_that_sampled_where_a_batch_has_one_update(tmp_path, reused):
    evidence = read_evidence(write_run(tmp_path / "run", **metric("ratio_max", 3.0)))
    once = {"updates_per_batch": 1, "minibatches": 1, "refresh_every": 1}
    settings = {**evidence.settings, "algorithm": once | ({reused: 2} if reused else {})}
    found = ratio(replace(evidence, settings=settings))
    assert isinstance(found, Measured)
    assert ("one update a batch" in found.text) == (reused is None)


def test_a_record_says_all_that_the_table_says(tmp_path):
    found = findings(write_run(tmp_path / "run", **metric("ratio_max", 3.0)))["ratio"]
    record = as_record(found)
    assert (record["verdict"], record["value"], record["look"], record["bad"]) == ("look", 3.0, 2.0, 10.0)
    assert "`optimizer.learning_rate`" in record["change"]
