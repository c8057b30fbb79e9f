"""The deck's failure points of length, difficulty and coverage: what the samples of a group are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from graft.report.doctor.check import (
    MIN_GROUPS,
    MIN_STEPS,
    NO_SCORES,
    NO_TREES,
    Check,
    Measured,
    NotMeasured,
    why_not_compared,
)
from graft.report.doctor.evidence import Evidence, Group, late_count
from graft.report.doctor.statistics import Trend, trend

LENGTH = "Response length bias"
DIFFICULTY = "Question-level difficulty bias"
COVERAGE = "Inadequate data coverage"


def length_of_wrong_answers(run: Evidence) -> Measured | NotMeasured:
    """How much more the wrong completions grew than the right ones, in shares of their first length."""
    if not run.groups:
        return NotMeasured(NO_TREES)
    both = {step: (fmean(own[0]), fmean(own[1])) for step, own in _lengths(run.groups).items() if all(own)}
    if len(both) < MIN_STEPS:
        return NotMeasured(f"{len(both)} steps have right and wrong completions, a trend wants {MIN_STEPS}")
    steps = list(both)
    wrong, right = ([pair[kind] for pair in both.values()] for kind in (0, 1))
    excess = trend(steps, [w / fmean(wrong) - r / fmean(right) for w, r in zip(wrong, right, strict=True)])
    lines = [trend(steps, lengths) for lengths in (wrong, right)]
    text = ", ".join(
        f"{name} {line.first:.0f} → {line.last:.0f} tokens"
        for name, line in zip(("wrong", "right"), lines, strict=True)
    )
    return Measured(
        excess.sure_rise, text, details={"slopes_tokens_a_step": [_slope(line, steps) for line in lines]}
    )


def _lengths(groups: Iterable[Group]) -> dict[int, tuple[list[int], list[int]]]:
    """Step -> lengths of (wrong, right) completions. Truncated ones are left out: the limit made their length."""
    lengths: dict[int, tuple[list[int], list[int]]] = {}
    for group in groups:
        own = lengths.setdefault(group.step, ([], []))
        for sample in group.samples:
            if sample.score is not None and not sample.truncated:
                own[sample.solved].append(sample.tokens)
    return lengths


def _slope(line: Trend, steps: Sequence[int]) -> float:
    return (line.last - line.first) / (steps[-1] - steps[0])


def truncated(run: Evidence) -> Measured | NotMeasured:
    """Share of late completions that reached the token limit."""
    shares = run.column("truncated_share")
    if not shares:
        return NotMeasured("no step recorded `truncated_share`: nothing was sampled")
    count = late_count(len(shares))
    early, late = fmean(shares[:count]), fmean(shares[-count:])
    return Measured(late, f"{100 * early:.1f} % of the first steps, {100 * late:.1f} % of the last ones")


def difficulty_weight(run: Evidence) -> Measured | NotMeasured:
    """How much more a point of reward weighs in groups at the edge (nearly all or nearly none solved) than between."""
    if not run.groups:
        return NotMeasured(NO_TREES)
    if not all(group.whole for group in run.groups):
        return NotMeasured("advantages are given to segments here, not to whole completions of a group")
    edge, middle = [], []
    for group in run.graded_groups:
        weight = _weight(group)
        if weight:
            (middle if 0.25 < group.solve_rate < 0.75 else edge).append(weight)
    if min(len(edge), len(middle)) < MIN_GROUPS:
        return NotMeasured(
            f"{len(edge)} groups with signal at solve rates up to 25 % or from 75 %, {len(middle)} between: "
            f"wants {MIN_GROUPS} of each"
        )
    ratio = fmean(edge) / fmean(middle)
    text = (
        f"a point of reward weighs {ratio:.2f} times as much at the edge ({len(edge)} groups) as between "
        f"({len(middle)}); `algorithm.scale` is {run.setting('algorithm.scale')!r}"
    )
    return Measured(ratio, text)


def _weight(group: Group) -> float | None:
    """Σ |advantage| / Σ |score - mean|: what a difference of rewards is multiplied by. None where nothing trains."""
    trained = [
        (s.score, s.advantage) for s in group.samples if s.score is not None and s.advantage is not None
    ]
    mean = fmean(score for score, _ in trained) if trained else 0.0
    deviation = sum(abs(score - mean) for score, _ in trained)
    return sum(abs(advantage) for _, advantage in trained) / deviation if deviation else None


def coverage(run: Evidence) -> Measured | NotMeasured:
    """Share of the groups that belong to starved topics: hardly solved, and hardly any of their groups with signal."""
    if not run.graded_groups:
        return NotMeasured(NO_SCORES if run.groups else NO_TREES)
    if not run.compares_samples:
        return NotMeasured(why_not_compared(run))
    if run.topic is None:
        shown = ", ".join(run.item_keys[:12])
        return NotMeasured(
            f"say which key of the rows is their topic: --topic KEY (there are {shown or 'none'})"
        )
    topics: dict[str, list[Group]] = {}
    for group in run.graded_groups:
        if group.topic is not None:
            topics.setdefault(group.topic, []).append(group)
    if not topics:
        return NotMeasured(f"no row has the key '{run.topic}'; there are {', '.join(run.item_keys[:12])}")
    rows = {topic: _topic_row(groups) for topic, groups in sorted(topics.items())}
    told = {topic: row for topic, row in rows.items() if row["groups"] >= MIN_GROUPS}
    if not told:
        return NotMeasured(f"{len(topics)} topics, none with {MIN_GROUPS} groups: choose a coarser key")
    starved = [topic for topic, row in told.items() if row["solve_rate"] < 0.5 and row["with_signal"] < 0.2]
    share = sum(told[topic]["groups"] for topic in starved) / sum(row["groups"] for row in told.values())
    worst = min(told, key=lambda topic: told[topic]["solve_rate"])
    text = (
        f"{100 * share:.0f} % of the groups in {len(starved)} starved of {len(told)} topics; least solved: {worst} "
        f"({100 * told[worst]['solve_rate']:.0f} %, {100 * told[worst]['with_signal']:.0f} % of its groups with signal)"
    )
    return Measured(share, text, details={"topics": rows})


def _topic_row(groups: Sequence[Group]) -> Mapping[str, float]:
    return {
        "groups": len(groups),
        "solve_rate": fmean(group.solve_rate for group in groups),
        "with_signal": sum(group.has_signal for group in groups) / len(groups),
    }


LENGTH_AND_WEIGHT = (
    Check(
        name="length_of_wrong_answers",
        title="Wrong answers grow longer",
        failure_point=LENGTH,
        measures="Growth of wrong completions over the run beyond that of right ones, as a share of their "
        "length: straight lines through the steps' means, two standard errors taken off, truncated ones "
        "left out.",
        unit="share",
        look=0.2,
        bad=0.5,
        reason="A mean over each sample's own tokens divides its penalty by its length: a wrong answer that "
        "is half as long again is pushed away with two thirds of the force on each token.",
        change="Weigh every token alike (an algorithm that reduces over the tokens of the step), or lower "
        "`sampling.max_new_tokens`.",
        measure=length_of_wrong_answers,
    ),
    Check(
        name="truncated",
        title="Completions cut off at the limit",
        failure_point=LENGTH,
        measures="Share of the last fifth of steps' completions that reached the token limit.",
        unit="share",
        look=0.05,
        bad=0.2,
        reason="A completion that was cut off has no answer: it is graded for its length. At one in twenty a "
        "third of the groups of eight hold one, at one in five five sixths of them.",
        change="Raise `sampling.max_new_tokens`; where completions run on, teach them to end with a "
        "`warm_start`.",
        measure=truncated,
    ),
    Check(
        name="difficulty_weight",
        title="Easy and hard prompts weigh more",
        failure_point=DIFFICULTY,
        measures="Σ |advantage| / Σ |score - mean| of groups whose solve rate is up to 25 % or from 75 %, "
        "over that of groups between: what dividing by the standard deviation gives to the edge.",
        unit="times",
        look=1.5,
        bad=2.5,
        reason="The same difference of rewards counts this many times as much where nearly all or nearly none "
        "were solved. Eight samples with rewards 0 and 1 cannot exceed 1.52, thirty-two reach 2.9: there "
        "one lucky guess weighs as much as in three even groups.",
        change='Set `algorithm.scale` to "none" or "batch_std", or draw fewer samples '
        "(`algorithm.group_size`).",
        measure=difficulty_weight,
    ),
    Check(
        name="coverage",
        title="Topics without signal",
        failure_point=COVERAGE,
        measures="Share of the groups that belong to starved topics: solve rate below 50 % and fewer than 20 % of the "
        f"groups with signal, over topics with at least {MIN_GROUPS} groups. With --topic KEY; not measured where "
        "whole samples are not compared within a group.",
        unit="share",
        look=0.05,
        bad=0.25,
        reason="A group without signal trains nothing, so a starved topic is not learned however often it is "
        "drawn. At a quarter of the groups, a quarter of all sampling goes into it.",
        change="Add easier rows of these topics (`data.source`), worked examples (`warm_start`), or more "
        "samples (`algorithm.group_size`).",
        measure=coverage,
    ),
)
