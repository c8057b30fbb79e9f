"""Run folders made up for the checks of `graft doctor`: a healthy one, and what differs from it.

    write_run(path)                                         # healthy: every sample a completion of its own
    write_run(path, metrics=lambda step: {"ratio_max": 3})  # what a step records besides
    write_run(path, group=lambda step, index: [Drawn("a", 1.0), ...])

Nothing is random: a group's samples follow from its step and its place in the step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft.report.doctor.check import Finding, Verdict
from graft.report.doctor.diagnosis import diagnose
from graft.report.doctor.evidence import read_evidence
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.trees import tree_record
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Grade, Outcome, StopReason
from tests.report.synthetic import CONFIG, decode, encode, evaluation_metrics, make_prompt, train_metrics

STEPS = 20
GROUPS = 10
SIZE = 8
OTHER_ROWS = {"rows": 20_000, "pass_at": {"1": {"mean": 0.58}}}
"""What `graft eval --json` says of rows from elsewhere that are solved as well."""

LATE = range(17, 21)
"""The last fifth of the steps."""


@dataclass(frozen=True)
class Drawn:
    """One sample to be."""

    text: str
    score: float | None
    stop: StopReason = StopReason.EOS
    thoughts: Sequence[str] = ()
    critique: Mapping[str, Any] | None = None
    weight: float = 1.0
    """What its advantage, score minus mean, is multiplied by."""

    after: int | None = None
    """Place in the group of the candidate that it goes on from; None: it begins at the prompt."""


def words(*key: int, length: int = 12) -> str:
    """Letters that follow from the key alone."""
    return "".join(random.Random(repr(key)).choices("abcdefghijklmnopqrstuvwxyz", k=length))


def solved_of(step: int, index: int) -> int:
    """Samples of a healthy group that are right: 2 to 6 of 8, but none in two of the ten groups."""
    return 0 if index >= 8 else 2 + (step + index) % 5


def healthy(step: int, index: int) -> list[Drawn]:
    """Samples that all differ, with wrong answers that differ too."""
    right = solved_of(step, index)
    return [
        Drawn(f"{words(step, index, i)} answer {0 if i < right else i}", float(i < right))
        for i in range(SIZE)
    ]


def chained(step: int, index: int) -> list[Drawn]:
    """The same as chains of three thoughts and an answer, with a critic that sees right from wrong."""
    return [
        Drawn(
            f"answer {i}",
            sample.score,
            thoughts=[f"{words(step, index, i, k)}\n" for k in range(3)],
            critique={
                "overall": 5.0 + 5 * (sample.score or 0),
                "thoughts": [4.0 + 3 * (sample.score or 0)] * 3,
            },
        )
        for i, sample in enumerate(healthy(step, index))
    ]


def chain_grown(step: int, index: int) -> list[Drawn]:
    """A tree as GRFT grows it in the shape of a chain: four candidates at each prefix, of which one is gone on with.

    A candidate of the third depth ends the completion early, and behind a sibling of it four more end it, all alike.
    The other eight were cut and dropped. The early one is right in every second group, the others in half of those.
    """
    drawn: list[Drawn] = []
    survivor = None
    for depth in range(3):
        thoughts = [f"{words(step, index, depth, i)}\n" for i in range(4)]
        chosen = len(drawn) + (step + index + depth) % 3
        drawn += [Drawn(text, None, StopReason.CUT, after=survivor) for text in thoughts]
        if depth == 2:
            drawn[-1] = Drawn("answer 7", float(index % 2), after=survivor)
        survivor = chosen
    return [*drawn, *[Drawn("answer 7", float(index % 4 == 1), after=survivor)] * 4]


def write_run(
    path: Path,
    *,
    algorithm: str = "grpo",
    group: Callable[[int, int], Sequence[Drawn]] = healthy,
    metrics: Callable[[int], Mapping[str, Any]] = lambda step: {},
    accuracies: Sequence[float] = (0.3, 0.45, 0.6),
    held_out_rows: int = 200,
    question: Callable[[int], str] = lambda index: f"question {index}",
    topic: Callable[[int], str] = lambda index: "ab"[index % 2],
    groups: int = GROUPS,
) -> RunFolder:
    """Write the folder of a run of 20 steps with 10 groups of 8.

    Args:
        path: must not exist yet.
        algorithm: its name.
        group: (step, index) -> its samples.
        metrics: step -> what it records besides or instead; None leaves a metric out.
        accuracies: held-out accuracy before, during (after steps 1, 2, ...) and after training; fewer than two: nothing
            is measured.
        held_out_rows: that were measured.
        question: index -> text of the prompt.
        topic: index -> the row's `topic`.
        groups: of each step; 0: there are no trees.
    """
    config = CONFIG.format(steps=STEPS).replace("[warm_start]", "[unused]")
    folder = RunFolder.create(path, config.replace('"grpo"', f'"{algorithm}"'))
    with folder:
        before, *between, after = accuracies if len(accuracies) > 1 else (None, None)
        if before is not None:
            folder.append_metrics(evaluation_metrics(0, Moment.BEFORE, before, held_out_rows))
        for step in range(1, STEPS + 1):
            record = {**train_metrics(step, STEPS, random.Random(0)), **steady(step), **metrics(step)}
            folder.append_metrics(record)
            for index in range(groups):
                folder.append_tree(_record(step, index, group(step, index), question(index), topic(index)))
            if step <= len(between):
                folder.append_metrics(
                    evaluation_metrics(step, Moment.DURING, between[step - 1], held_out_rows)
                )
        if after is not None:
            folder.append_metrics(evaluation_metrics(STEPS, Moment.AFTER, after, held_out_rows))
    return folder


def steady(step: int) -> dict[str, Any]:
    """Metrics that nobody need look at."""
    return {
        "solved_share": 0.3 + 0.3 * step / STEPS,
        "truncated_share": 0.0,
        "entropy": 0.5,
        "kl_to_initial": 0.01,
        "engine_gap_mean": 0.01,
        "engine_gap_max": 0.2,
    }


def _record(step: int, index: int, samples: Sequence[Drawn], question: str, topic: str) -> dict[str, Any]:
    prompt = make_prompt(index, question, "0")
    prompt.item["topic"] = topic  # pyright: ignore[reportIndexIssue]
    tree = Tree(prompt)
    leaves: list[int] = []
    groups: dict[int, int] = {}
    for sample in samples:
        start = ROOT if sample.after is None else leaves[sample.after]
        if start not in groups:
            groups[start] = tree.new_group()
        leaves.append(_grow(tree, start, groups[start], sample))
    grades = {
        leaf: Grade(sample.score, Outcome.TIMED_OUT if sample.score is None else Outcome.GRADED)
        for leaf, sample in zip(leaves, samples, strict=True)
        if tree.ends(leaf)
    }
    record = tree_record(step, Stage.TRAIN, tree, grades, decode, _credit(tree, leaves, samples))
    critiques = {str(leaf): dict(s.critique) for leaf, s in zip(leaves, samples, strict=True) if s.critique}
    return {**record, "critiques": critiques} if critiques else record


def _grow(tree: Tree, start: int, group: int, sample: Drawn) -> int:
    parent = start
    for thought in sample.thoughts:
        tokens = encode(thought)
        parent = tree.add(parent, tokens, group=group, kind=Kind.THOUGHT, stop=StopReason.CUT)
    tokens = encode(sample.text)
    kind = Kind.ANSWER if sample.thoughts or start != ROOT else Kind.COMPLETION
    kind = Kind.THOUGHT if sample.stop is StopReason.CUT else kind
    return tree.add(parent, tokens, group=group, kind=kind, stop=sample.stop)


def _credit(tree: Tree, leaves: Sequence[int], samples: Sequence[Drawn]) -> Credit:
    scored = [s.score for s in samples if s.score is not None]
    mean = sum(scored) / len(scored) if scored else 0.0
    advantages = {
        leaf: np.full(len(tree.nodes[leaf]), sample.weight * (sample.score - mean), dtype=np.float32)
        for leaf, sample in zip(leaves, samples, strict=True)
        if sample.score is not None and len(set(scored)) > 1
    }
    return Credit(advantages, {leaf: np.ones(len(own)) for leaf, own in advantages.items()})


def findings(folder: RunFolder, **options: Any) -> dict[str, Finding]:
    """By the name of their check."""
    return {f.check.name: f for f in diagnose(read_evidence(folder, **options))}


def not_ok(found: Mapping[str, Finding]) -> dict[str, Verdict]:
    """All other verdicts."""
    return {name: finding.verdict for name, finding in found.items() if finding.verdict is not Verdict.OK}


def each(change: Callable[[int, int, int, Drawn], Drawn], base=healthy):
    """All samples changed, given step, group and place."""
    return lambda step, index: [change(step, index, i, s) for i, s in enumerate(base(step, index))]


def with_(sample: Drawn, **changes: Any) -> Drawn:
    """The same but for the changes."""
    return Drawn(**{**{name: getattr(sample, name) for name in sample.__dataclass_fields__}, **changes})


def all_scored(score: float, stop: StopReason = StopReason.EOS):
    """A healthy run's samples with one score."""
    return each(lambda step, index, i, sample: with_(sample, score=score, stop=stop))
