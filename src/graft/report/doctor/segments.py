"""What goes wrong with credit for segments: gaming their number, and a critic that says something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from graft.report.doctor.check import MIN_STEPS, NO_TREES, Check, Measured, NotMeasured
from graft.report.doctor.evidence import Evidence, SampleFacts
from graft.report.doctor.generalisation import learning
from graft.report.doctor.statistics import SURE, chance_of_order, trend
from graft.types import Outcome

MIN_CRITIQUES = 20
"""Fewest right, and fewest wrong, completions with a critique of which agreement is said."""

NO_CRITIC = "the trees hold no critiques: the algorithm has no critic"


def step_count(run: Evidence) -> Measured | NotMeasured:
    """Growth of segments a completion beyond chance, where held-out accuracy does not grow with it; else 0."""
    if not run.groups:
        return NotMeasured(NO_TREES)
    counts: dict[int, list[int]] = {}
    for group in run.groups:
        if group.samples:
            counts.setdefault(group.step, []).extend(sample.segments for sample in group.samples)
    if max((max(own) for own in counts.values()), default=0) < 2:
        return NotMeasured("completions are not cut into segments by this algorithm")
    if len(counts) < MIN_STEPS:
        return NotMeasured(f"{len(counts)} steps, a trend wants {MIN_STEPS}")
    steps = sorted(counts)
    line = trend(steps, [fmean(counts[step]) for step in steps])
    gain = learning(run)
    if isinstance(gain, NotMeasured):
        return NotMeasured(f"{line.first:.1f} → {line.last:.1f} segments a completion; {gain.reason}")
    growth = line.sure_rise / line.first if line.first > 0 else 0.0
    earned = gain.value > SURE
    text = f"{line.first:.1f} → {line.last:.1f} segments a completion, held-out {gain.text}"
    return Measured(0.0 if earned else growth, text, details={"growth": growth})


def uncriticised(run: Evidence) -> Measured | NotMeasured:
    """Share of the completions that a critic was asked about which it could not score."""
    asked = Counter(sample.critic_outcome for sample in run.samples if sample.critic_outcome)
    if asked:
        failed = {name: count for name, count in asked.most_common() if name != Outcome.GRADED}
        count = sum(failed.values())
        listed = ", ".join(f"{name} {number}" for name, number in failed.items())
        text = f"{count} of {asked.total()} completions" + (f": {listed}" if listed else "")
        return Measured(count / asked.total(), text)
    recorded = run.column("critic_failed")
    if not recorded:
        return NotMeasured(NO_CRITIC if run.groups else NO_TREES)
    if any(recorded):
        return NotMeasured(
            f"{sum(recorded):,.0f} completions failed, but {NO_TREES}: of how many is not known"
        )
    return Measured(0.0, f"none in {len(recorded)} steps, as recorded in `critic_failed`")


def critic_agreement(run: Evidence) -> Measured | NotMeasured:
    """Chance that a right completion's thoughts score higher than a wrong one's, late steps."""
    judged = [sample for sample in run.samples if sample.critique is not None]
    if not judged:
        asked = any(sample.critic_outcome for sample in run.samples)
        return NotMeasured("the critic could score no completion" if asked else NO_CRITIC)
    late = [s for group in run.late for s in group.samples if s.critique is not None]
    now, before = _agreement(late), _agreement(judged)
    if now is None or before is None:
        return NotMeasured(f"fewer than {MIN_CRITIQUES} right or wrong late completions have a critique")
    text = f"a right one's thoughts score higher in {100 * now:.0f} % of pairs, {100 * before:.0f} % over the run"
    overall = _overall_agreement(late)
    details = {"over_the_run": before, "overall": overall}
    return Measured(
        now,
        text + ("" if overall is None else f"; its overall score in {100 * overall:.0f} %"),
        details=details,
    )


def _agreement(samples: Sequence[SampleFacts]) -> float | None:
    return _order(
        [
            (s.solved, fmean(s.critique.thoughts))
            for s in samples
            if s.score is not None and s.critique and s.critique.thoughts
        ]
    )


def _overall_agreement(samples: Sequence[SampleFacts]) -> float | None:
    return _order(
        [
            (s.solved, s.critique.overall)
            for s in samples
            if s.score is not None and s.critique and s.critique.overall is not None
        ]
    )


def _order(judged: Sequence[tuple[bool, float]]) -> float | None:
    right = [score for solved, score in judged if solved]
    wrong = [score for solved, score in judged if not solved]
    return chance_of_order(right, wrong) if min(len(right), len(wrong)) >= MIN_CRITIQUES else None


SEGMENTS = (
    Check(
        name="step_count",
        title="Step-count gaming",
        failure_point="",
        measures="Growth of segments a completion over the run (a straight line, two standard errors taken "
        "off) where held-out accuracy gained no more than two standard errors; 0 where it gained more.",
        unit="share",
        look=0.2,
        bad=0.5,
        reason="With an overall score in every segment's reward the return grows with their number, so that "
        "repeating a true line pays. Half as many again without better answers is paid for nothing else.",
        change="Give the overall score once instead of to every segment, or discount later segments: the "
        "algorithm's section in `graft settings`.",
        measure=step_count,
    ),
    Check(
        name="uncriticised",
        title="Completions without a critique",
        failure_point="",
        measures="Share of the training completions that the critic was asked about and could not score.",
        unit="share",
        look=0.01,
        bad=0.05,
        reason="Such a completion does not train, and it is no random one: the longest ask the critic for most and "
        "are the first to time out. One in a hundred can be a server's bad moment; from one in twenty a third of the "
        "groups of eight train on part of their samples.",
        change="The critic itself (`algorithm.critic`); report.html says with each sample what went wrong. "
        "`grading.judge.timeout_s`, `grading.judge.retries`, `grading.concurrency`, the limits of `grading.sandbox`.",
        measure=uncriticised,
    ),
    Check(
        name="critic_agreement",
        title="Critic agrees with the grader",
        failure_point="",
        measures="Chance that the mean thought score of a right completion is above that of a wrong one, last "
        "fifth of steps (area under the ROC curve).",
        unit="share",
        look=0.75,
        bad=0.6,
        reason="At 50 % the critic's scores have nothing to do with right and wrong, and training on them is "
        "training on noise, or on what pleases the critic.",
        change="Another critic or judge, or a larger share of verifiable reward: the algorithm's section in "
        "`graft settings`.",
        measure=critic_agreement,
    ),
)
