"""Whether what is learned holds on rows that were not trained on; the deck's failure point of generalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from graft.report.doctor.check import MIN_STEPS, Check, Measured, NotMeasured
from graft.report.doctor.evidence import Evidence, late_count
from graft.report.doctor.statistics import SURE, share_error
from graft.report.metrics import Stage

GENERALISATION = "Limited generalization"

NOT_YET = "held-out rows were not measured before and since training (`data.held_out`, `evaluation.every`)"


def learning(run: Evidence) -> Measured | NotMeasured:
    """Gain in held-out accuracy since training began, in standard errors."""
    if len(run.since_start) < 2:
        return NotMeasured(NOT_YET)
    ends = run.since_start[0], run.since_start[-1]
    before, after = (float(record["held_out_accuracy"]) for record in ends)
    warm = " since the warm start" if any(r["stage"] == Stage.WARM_START for r in run.records) else ""
    text = f"{100 * before:.1f} → {100 * after:.1f} %{warm}"
    return Measured((after - before) / _error(*ends), text, details={"gain": after - before})


def generalisation_gap(run: Evidence) -> Measured | NotMeasured:
    """By how much more training rows gained than held-out rows, beyond chance."""
    solved = run.column("solved_share")
    if len(solved) < MIN_STEPS:
        return NotMeasured(
            f"{len(solved)} steps recorded `solved_share`; fifths are compared from {MIN_STEPS} on"
        )
    if len(run.since_start) < 2:
        return NotMeasured(NOT_YET)
    start, end = run.since_start[0], run.since_start[-1]
    count = late_count(len(solved))
    before, after = fmean(solved[:count]), fmean(solved[-count:])
    errors = [share_error(share, count * _samples_a_step(run)) for share in (before, after)]
    train_gain, gain = after - before, end["held_out_accuracy"] - start["held_out_accuracy"]
    sure = max(0.0, train_gain - gain - SURE * math.hypot(*errors, _error(start, end)))
    text = (
        f"training rows {100 * before:.0f} → {100 * after:.0f} %, held-out {100 * start['held_out_accuracy']:.0f} → "
        f"{100 * end['held_out_accuracy']:.0f} %"
    )
    return Measured(sure, text, details={"train_gain": train_gain, "held_out_gain": gain})


def _samples_a_step(run: Evidence) -> int:
    """From the tokens that were drawn and their mean a completion; 1 where these were not recorded."""
    counts = [
        record["tokens_sampled"] / record["completion_length_mean"]
        for record in run.train
        if record.get("completion_length_mean") and "tokens_sampled" in record
    ]
    return max(1, round(fmean(counts))) if counts else 1


def held_out_loss(run: Evidence) -> Measured | NotMeasured:
    """By how much the last held-out accuracy is below the best one of the run, beyond chance."""
    if len(run.since_start) < 2:
        return NotMeasured(NOT_YET)
    *earlier, last = run.since_start
    falls = [r["held_out_accuracy"] - last["held_out_accuracy"] - SURE * _error(r, last) for r in earlier]
    best = max(run.since_start, key=lambda record: record["held_out_accuracy"])
    text = (
        f"last {100 * last['held_out_accuracy']:.1f} %, best {100 * best['held_out_accuracy']:.1f} % after step "
        f"{best['step']}, of {len(run.since_start)} measurements"
    )
    return Measured(max(0.0, *falls), text)


def out_of_distribution(run: Evidence) -> Measured | NotMeasured:
    """By how much accuracy on other rows is below that on held-out rows, beyond chance."""
    if run.elsewhere is None:
        return NotMeasured(
            "a run measures rows like its own; measure others with `graft eval RUN --set data.held_out=0 --set "
            "data.held_out_source=OTHER.jsonl --json > OTHER.json` and give --out-of-distribution OTHER.json"
        )
    if not run.evaluations:
        return NotMeasured("held-out rows were not measured (`data.held_out`)")
    last, other = run.evaluations[-1], run.elsewhere
    here, there = last["held_out_accuracy"], float(other["pass_at"]["1"]["mean"])
    error = math.hypot(_error(last), share_error(there, int(other["rows"])))
    text = f"held-out {100 * here:.1f} %, other rows {100 * there:.1f} % of {other['rows']}"
    return Measured(max(0.0, here - there - SURE * error), text)


def _error(*records: Mapping[str, float]) -> float:
    """Standard error of the difference of evaluations, or of one; each row counts as one sample."""
    return math.hypot(
        *(share_error(r["held_out_accuracy"], max(1, round(r.get("held_out_rows", 1)))) for r in records)
    )


GENERALISATION_CHECKS = (
    Check(
        name="learning",
        title="Held-out rows are learned",
        failure_point="",
        measures="Last held-out accuracy minus the one that training started from (after the warm start if "
        "there was one), in standard errors of that difference.",
        unit="standard errors",
        look=2.0,
        bad=-2.0,
        reason="Within two standard errors a difference is chance: nothing was learned, or too few held-out "
        "rows tell. Below minus two, training did harm.",
        change="Read the lines below; then `optimizer.learning_rate` (higher if nothing moves, lower if it "
        "falls), longer training, more held-out rows (`data.held_out`).",
        measure=learning,
    ),
    Check(
        name="generalisation_gap",
        title="Training rows gain more than held-out rows",
        failure_point=GENERALISATION,
        measures="Gain in solved share of training rows (last fifth of steps minus first) minus the gain in "
        "held-out accuracy since training began, two standard errors taken off.",
        unit="share",
        look=0.05,
        bad=0.15,
        reason="What training rows gain beyond held-out rows was learned by heart; two standard errors keep "
        "chance out. From 15 points the training reward no longer tells what the model can do.",
        change="More rows (`data.rows`), fewer epochs (`training.epochs`), a penalty for leaving the first "
        "model (`algorithm.kl.coefficient`).",
        measure=generalisation_gap,
    ),
    Check(
        name="held_out_loss",
        title="Held-out accuracy falls again",
        failure_point=GENERALISATION,
        measures="Best held-out accuracy of the run minus the last one, two standard errors taken off.",
        unit="share",
        look=0.01,
        bad=0.05,
        reason="Two standard errors are taken off already, so any rest says that an earlier checkpoint was "
        "better; from 5 points it is worth going back.",
        change="Keep the best checkpoint (`checkpoints.keep_best`), lower `optimizer.learning_rate`, train "
        "shorter (`training.steps`).",
        measure=held_out_loss,
    ),
    Check(
        name="out_of_distribution",
        title="Other rows are solved less",
        failure_point=GENERALISATION,
        measures="Held-out accuracy minus accuracy on the rows given with --out-of-distribution, two standard "
        "errors taken off.",
        unit="share",
        look=0.1,
        bad=0.3,
        reason="Rows of another kind may be harder, so a tenth says little by itself; from 30 points what was "
        "learned is the form of the training rows. Compare with the same measurement of the model before "
        "training.",
        change="Mix rows of that kind into `data.source`; raise `algorithm.kl.coefficient`.",
        measure=out_of_distribution,
    ),
)
