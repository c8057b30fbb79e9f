"""Whether samples differ; the deck's failure point of diversity."""

from __future__ import annotations

from statistics import fmean

from graft.report.doctor.check import (
    MIN_GROUPS,
    MIN_STEPS,
    NO_TREES,
    SHARED,
    Check,
    Measured,
    NotMeasured,
    why_no_pairs,
)
from graft.report.doctor.evidence import GRAM, Evidence, late_count

DIVERSITY = "Insufficient diversity in outputs"


def distinct_completions(run: Evidence) -> Measured | NotMeasured:
    """Share of a late group's completions that differ, mean over groups."""
    pairs = [group for group in run.late if len(group.samples) > 1]
    if not pairs:
        return NotMeasured(NO_TREES if not run.groups else "no late group has two samples")
    groups = [group for group in pairs if group.apart]
    if not groups:
        return NotMeasured(SHARED)
    share = fmean(len({s.completion for s in group.samples}) / len(group.samples) for group in groups)
    return Measured(share, f"{100 * share:.0f} % of a group's completions differ, {len(groups)} late groups")


def agreed_wrong_answers(run: Evidence) -> Measured | NotMeasured:
    """Of late groups with no solved sample, the share in which all samples give one and the same answer."""
    pairs = [group for group in run.late if len(group.scores) > 1]
    if not pairs:
        return NotMeasured(why_no_pairs(run))
    groups = [group for group in pairs if group.apart]
    if not groups:
        return NotMeasured(SHARED)
    unsolved = [group for group in groups if not any(sample.solved for sample in group.samples)]
    distinct = fmean(len({s.answer for s in group.samples}) for group in groups)
    text = f"{distinct:.1f} distinct answers a group"
    if len(unsolved) < MIN_GROUPS:
        return NotMeasured(
            f"{text}; {len(unsolved)} late groups are wholly wrong, a share wants {MIN_GROUPS}"
        )
    agreed = sum(len({s.answer for s in group.samples}) == 1 for group in unsolved) / len(unsolved)
    return Measured(
        agreed,
        f"{text}; {100 * agreed:.0f} % of {len(unsolved)} wholly wrong groups are of one mind",
        details={"distinct_answers": distinct},
    )


def distinct_segments(run: Evidence) -> Measured | NotMeasured:
    """Share of a late group's segments that differ, mean over groups."""
    groups = [group for group in run.late if group.segments > 1]
    if not groups:
        return NotMeasured("completions are not cut into segments by this algorithm")
    share = fmean(group.distinct_segments / group.segments for group in groups)
    return Measured(share, f"{100 * share:.0f} % of a group's segments differ, {len(groups)} late groups")


def distinct_phrases(run: Evidence) -> Measured | NotMeasured:
    """Share of a late group's runs of four tokens that differ, over that of the first steps."""
    groups = [group for group in run.groups if group.phrases]
    if len({group.step for group in groups}) < MIN_STEPS:
        return NotMeasured(
            f"fewer than {MIN_STEPS} steps with trees of {GRAM} tokens and more" if run.groups else NO_TREES
        )
    late_steps = {group.step for group in run.late}
    steps = sorted({group.step for group in groups})
    early_steps = set(steps[: late_count(len(steps))])
    early, late = (
        fmean(group.distinct_phrases / group.phrases for group in groups if group.step in wanted)
        for wanted in (early_steps, late_steps)
    )
    text = (
        f"{100 * early:.0f} % of a group's runs of {GRAM} tokens differ at first, {100 * late:.0f} % at last"
    )
    return Measured(late / early, text, details={"early": early, "late": late})


def entropy_left(run: Evidence) -> Measured | NotMeasured:
    """Entropy of the last steps as a share of that of the first ones."""
    values = run.column("entropy")
    if len(values) < MIN_STEPS:
        return NotMeasured(f"{len(values)} steps recorded `entropy`, a trend wants {MIN_STEPS}")
    count = late_count(len(values))
    early, late = fmean(values[:count]), fmean(values[-count:])
    if early <= 0:
        return NotMeasured("the entropy is 0 from the first step on: the model always draws the same")
    text = f"{early:.3g} → {late:.3g} nats a token ({100 * late / early:.0f} % is left)"
    return Measured(late / early, text, details={"early": early, "late": late})


def loops(run: Evidence) -> Measured | NotMeasured:
    """Share of late completions' runs of four tokens that the same completion has already had."""
    samples = [sample for group in run.late for sample in group.samples if sample.phrases]
    if not samples:
        return NotMeasured(NO_TREES if not run.groups else "no completion has four tokens")
    share = fmean(sample.repeated_phrases / sample.phrases for sample in samples)
    return Measured(
        share, f"{100 * share:.1f} % of a completion's runs of four tokens, {len(samples)} late completions"
    )


DIVERSITY_CHECKS = (
    Check(
        name="distinct_completions",
        title="Completions of a group differ",
        failure_point=DIVERSITY,
        measures="Share of a group's completions that differ in at least one token, mean over the last fifth "
        "of steps; only of completions that were drawn apart, from the prompt on.",
        unit="share",
        look=0.5,
        bad=0.25,
        reason="Equal completions get equal scores: a group of eight with two different ones compares two "
        "answers. At half, every second sample is drawn for nothing.",
        change="Raise `sampling.temperature` or `algorithm.entropy.coefficient`; lower "
        "`algorithm.group_size`; choose rows that are less certain.",
        measure=distinct_completions,
    ),
    Check(
        name="agreed_wrong_answers",
        title="Wrong groups are of one mind",
        failure_point=DIVERSITY,
        measures="Of groups of the last fifth of steps with no solved sample, the share whose samples all "
        "give the same answer (their answer span, else their last line); only of samples that were drawn apart, from "
        "the prompt on.",
        unit="share",
        look=0.3,
        bad=0.6,
        reason="The model is sure of a wrong answer there, and no number of samples finds the right one. From "
        "60 % most unsolved prompts are out of reach of sampling.",
        change="Raise `sampling.temperature`; show worked examples of such rows (`warm_start`).",
        measure=agreed_wrong_answers,
    ),
    Check(
        name="distinct_segments",
        title="Segments of a group differ",
        failure_point=DIVERSITY,
        measures="Share of a group's segments that differ, mean over the last fifth of steps; only where "
        "completions are cut into segments.",
        unit="share",
        look=0.3,
        bad=0.1,
        reason="Credit goes to segments: where nine in ten are copies of each other, there is nothing to "
        "compare.",
        change="Raise `sampling.temperature` or `algorithm.entropy.coefficient`.",
        measure=distinct_segments,
    ),
    Check(
        name="distinct_phrases",
        title="Completions grow alike",
        failure_point=DIVERSITY,
        measures=f"Share of a group's runs of {GRAM} tokens that differ, in the last fifth of steps over that in the "
        "first.",
        unit="times",
        look=0.67,
        bad=0.33,
        reason="Self-similarity depends on the task, so the run is compared with itself: at a third, samples "
        "of a group share three times as much text as when training began.",
        change="Raise `algorithm.entropy.coefficient` or `sampling.temperature`; raise `algorithm.clip.high`; "
        "lower `optimizer.learning_rate`.",
        measure=distinct_phrases,
    ),
    Check(
        name="entropy_left",
        title="Entropy that is left",
        failure_point=DIVERSITY,
        measures="Mean entropy of the last fifth of steps over that of the first.",
        unit="share",
        look=0.5,
        bad=0.1,
        reason="Reward is bought with entropy: what is not drawn cannot be reinforced. With a tenth left the "
        "policy is all but deterministic and further steps change little.",
        change="Raise `algorithm.clip.high` or `algorithm.entropy.coefficient`; lower "
        "`optimizer.learning_rate`; raise `sampling.temperature`.",
        measure=entropy_left,
    ),
    Check(
        name="loops",
        title="Completions repeat themselves",
        failure_point="",
        measures="Share of a completion's runs of four tokens that it has already had, mean over the last "
        "fifth of steps.",
        unit="share",
        look=0.3,
        bad=0.6,
        reason="Forms and lists repeat some; from 60 % most of a completion is a loop, drawn and trained for "
        "nothing.",
        change="Lower `sampling.max_new_tokens`, raise `sampling.temperature`, `warm_start`.",
        measure=loops,
    ),
)
