"""The lines of `metrics.jsonl` by hand; every name is declared, and what was not measured is not there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graft.crediting import StepCredit
from graft.evaluation import Estimate, Evaluation
from graft.report.metrics import Moment, Stage, check_record
from graft.step_records import Step, evaluation_record, step_clock, step_record
from graft.tree import ROOT, Kind, Tree
from graft.types import Critique, Fault, Grade, Outcome, Prompt, StopReason, TokenUsage
from graft.update.step import StepResult

RESULT = StepResult(
    loss=-0.25,
    gradient_norm=1.5,
    tokens_trained=5,
    tokens_computed=9,
    means={"entropy": 2.0, "clipped_share": 0.125},
    maxima={"ratio_max": 1.5},
)
SECONDS = {"step": 8.0, "load": 0.5, "sample": 2.0, "grade": 1.0, "update": 4.0}


def tree(*lengths: int, stop: StopReason = StopReason.EOS) -> Tree:
    made = Tree(Prompt(row=0, messages=(), item={}, tokens=np.array([1, 2, 3], np.int32), question=""))
    group = made.new_group()
    for length in lengths:
        made.add(ROOT, [7] * length, [-1.0] * length, group=group, kind=Kind.COMPLETION, stop=stop)
    return made


def training_step(*grades: Grade) -> Step:
    """Three completions of 2, 4 and 6 tokens, the last one truncated."""
    return Step(
        number=3,
        trees=[tree(2, 4), tree(6, stop=StopReason.LENGTH)],
        grades=[{1: grades[0], 2: grades[1]}, {1: grades[2]}],
        credit=StepCredit([], groups=2, groups_with_signal=1),
        result=RESULT,
        seconds=SECONDS,
    )


def record_of(step: Step, *, stage: Stage = Stage.TRAIN) -> dict[str, object]:
    return step_record(
        step, stage=stage, learning_rate=0.01, threshold=1.0, generated_tokens=777, peak_memory_gb=1.25
    )


COMMON = {
    "step": 3,
    "loss": -0.25,
    "gradient_norm": 1.5,
    "learning_rate": 0.01,
    "tokens_trained": 5,
    "tokens_computed": 9,
    "step_seconds": 8.0,
    "update_seconds": 4.0,
    "peak_memory_gb": 1.25,
}


def test_a_training_step_by_hand():
    step = training_step(
        Grade(1.0, parts={"format": 1.0, "answer": 1.0}), Grade(0.0, parts={"format": 0.5}), Grade(2.0)
    )
    step.kl_to_initial = 0.125
    record = check_record(record_of(step))
    assert record == pytest.approx(
        COMMON
        | RESULT.facts
        | {
            "stage": "train",
            "reward_mean": 1.0,
            "reward_std": math.sqrt(2 / 3),
            "solved_share": 2 / 3,
            "part_format_mean": 0.75,  # over the samples that have the part
            "part_answer_mean": 1.0,
            "groups_with_signal": 0.5,
            "grades_failed": 0,
            "completion_length_mean": 4.0,
            "truncated_share": 1 / 3,
            "tokens_sampled": 12,
            "tokens_per_s": 6.0,
            "kl_to_initial": 0.125,
            "generated_tokens": 777,
            "load_seconds": 0.5,
            "sample_seconds": 2.0,
            "grade_seconds": 1.0,
        }
    )


def test_the_speed_of_sampling_is_that_of_the_trees_alone():
    """What a critic draws takes time of its own."""
    step = training_step(Grade(1.0), Grade(0.0), Grade(2.0))
    step.critiques = [{1: Critique(overall=1.0, sampled_tokens=30)}]
    record = record_of(step)
    assert record["tokens_sampled"] == 12 + 30
    assert record["tokens_per_s"] == 12 / 2.0


def test_parts_faults_and_judge_tokens_are_told():
    first = Grade(
        1.0, parts={"form": 1.0, "right": 0.5}, usage={"m": TokenUsage(10, 2), "n": TokenUsage(1, 1)}
    )
    second = Grade(
        0.0, parts={"form": 0.0}, faults={Fault.SAMPLE_PARSE: "no JSON"}, usage={"m": TokenUsage()}
    )
    record = record_of(
        training_step(first, second, Grade(0.0, faults={Fault.SAMPLE_PARSE: "", Fault.OTHER: ""}))
    )
    wanted = {
        "part_form_mean": 0.5,
        "part_right_mean": 0.5,
        "grading_sample_parse_error_count": 2,
        "grading_other_error_count": 1,
        "judge_prompt_tokens": 11,
        "judge_completion_tokens": 3,
    }
    assert {name: record[name] for name in wanted} == wanted


def test_questions_about_candidates_while_they_grew_are_told_with_the_others():
    """A failure among them only costs the choice of a survivor: the completion is judged again."""
    step = training_step(Grade(1.0, usage={"m": TokenUsage(10, 2)}), Grade(0.0), Grade(0.0))
    step.critiques = [{1: Critique(1.0, calls=2, usage={"m": TokenUsage(4, 1)}, seconds=0.5)}]
    step.asked.critiques.append(Critique(outcome=Outcome.CRASHED, calls=1, seconds=0.25))
    step.asked.critiques.append(Critique(1.0, calls=1, usage={"m": TokenUsage(3, 1)}, sampled_tokens=7))
    step.asked.grades.append(Grade(1.0, usage={"n": TokenUsage(5, 1)}))
    record = record_of(step)
    wanted = {
        "critic_calls": 4,
        "critic_failed": 0,
        "critic_seconds": 0.75,
        "critic_prompt_tokens": 7,
        "critic_completion_tokens": 2,
        "critic_tokens_sampled": 7,
        "judge_prompt_tokens": 15,
        "judge_completion_tokens": 3,
        "tokens_sampled": 12 + 7,
    }
    assert {name: record[name] for name in wanted} == wanted


def test_a_failure_that_scores_0_is_counted_as_one():
    record = record_of(training_step(Grade(1.0), Grade(0.0, Outcome.CRASHED), Grade(0.0)))
    assert (record["grades_failed"], record["reward_mean"]) == (1, pytest.approx(1 / 3))


def test_failed_grades_are_counted_and_left_out_of_the_means():
    failed = Grade(None, Outcome.TIMED_OUT)
    record = record_of(training_step(Grade(1.0), failed, Grade(0.0)))
    assert record["grades_failed"] == 1
    assert record["reward_mean"] == 0.5
    assert record["solved_share"] == 0.5
    assert record["completion_length_mean"] == 4.0  # of all completions


def test_what_was_not_measured_is_not_there():
    failed = Grade(None, Outcome.CRASHED)
    step = training_step(failed, failed, failed)
    step.credit = StepCredit([], 0, 0)
    record = check_record(record_of(step))
    for name in ("reward_mean", "reward_std", "solved_share", "groups_with_signal", "kl_to_initial"):
        assert name not in record
    assert record["grades_failed"] == 3


def test_a_supervised_step_has_nothing_about_sampling():
    step = Step(number=3, trees=[tree(2)], result=RESULT, seconds={"step": 8.0, "update": 4.0})
    record = check_record(record_of(step, stage=Stage.WARM_START))
    assert record == COMMON | {"stage": "warm_start"}


def test_a_measurement_by_hand():
    evaluation = Evaluation(
        accuracy=Estimate(0.5, 0.25, 0.75),
        pass_at={1: Estimate(0.5, 0.25, 0.75), 4: Estimate(0.875, 0.7, 1.0)},
        reward_mean=0.625,
        length_mean=12.5,
        truncated_share=0.125,
        failed=1,
        rows=16,
        generated_tokens=99,
        trees=(),
        grades=(),
    )
    record = evaluation_record(evaluation, moment=Moment.DURING, step=20, generated_tokens=4000, seconds=1.5)
    assert check_record(record) == {
        "step": 20,
        "stage": "evaluation",
        "moment": "during",
        "generated_tokens": 4000,
        "held_out_accuracy": 0.5,
        "held_out_low": 0.25,
        "held_out_high": 0.75,
        "held_out_reward_mean": 0.625,
        "held_out_length_mean": 12.5,
        "held_out_truncated_share": 0.125,
        "held_out_rows": 16,
        "evaluation_seconds": 1.5,
        "held_out_pass_at_1": 0.5,
        "held_out_pass_at_4": 0.875,
    }


def test_the_clock(monkeypatch):
    now = iter([100.0, 101.0, 103.5, 110.0])
    monkeypatch.setattr("graft.step_records.time.perf_counter", lambda: next(now))
    with step_clock(4) as step, step.timed("sample"):
        pass
    assert step.number == 4
    assert step.seconds == {"sample": 2.5, "step": 10.0}
