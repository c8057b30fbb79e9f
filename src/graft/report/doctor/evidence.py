"""A run folder as the checks see it: its metrics, and of each training tree a few numbers. Read once, line by line.

Trees are not kept: a sample is reduced to what the checks count, so that `trees.jsonl` may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.tree_lines import well_formed
from graft.report.tree_shape import sample_paths
from graft.tree import ROOT, Kind
from graft.types import Outcome, StopReason, reaches

GRAM = 4
"""Tokens in a row that count as a phrase."""

LATE_SHARE = 0.2
"""Share of the training steps that "late" means; as many at the start are "early"."""

LEAK = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|^(?:user|assistant|system)\s*$",
    re.MULTILINE,
)
"""Marks of chat templates where only the model's own words should be."""

COMPARE_SAMPLES = frozenset({"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"})
"""Algorithms that compare whole samples of a group by their scores: where these are equal there is no gradient."""

COMPARE_PARTS = frozenset({"process_grpo", "grft", "spo_tree"})
"""Those that compare parts of samples within a group: steps, or siblings."""


@dataclass(frozen=True, slots=True)
class Critique:
    """What a critic said of a sample."""

    overall: float | None
    thoughts: Sequence[float]


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """One path of a tree that ends a completion, in numbers."""

    score: float | None
    outcome: str
    solved: bool
    tokens: int
    stop: str | None
    segments: int
    advantage: float | None
    """Mean over its trained tokens; None where none of them trains."""

    completion: int
    """Hash of its token ids."""

    answer: int
    """Hash of its answer: the text of its answer span, else its last line that is not empty."""

    phrases: int
    repeated_phrases: int
    """Runs of `GRAM` tokens, and how many of them it has already had."""

    leaks: bool
    """Whether its text holds marks of a chat template."""

    critique: Critique | None
    critic_outcome: str
    """Whether the critic could score it, as an outcome; empty where no critic was asked."""

    @property
    def truncated(self) -> bool:
        """Whether the token limit ended it."""
        return self.stop == StopReason.LENGTH


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one training tree."""

    step: int
    topic: str | None
    samples: Sequence[SampleFacts]
    whole: bool
    """Whether its samples are whole completions below the prompt, each a span of its own."""

    apart: bool
    """Whether its samples were drawn apart from each other: no two go on from the same span."""

    segments: int
    distinct_segments: int
    phrases: int
    distinct_phrases: int
    doubled_start: bool
    """Whether the prompt begins with the same token twice."""

    @property
    def scores(self) -> list[float]:
        """Of the samples that have one."""
        return [sample.score for sample in self.samples if sample.score is not None]

    @property
    def has_signal(self) -> bool:
        """Whether its scores differ."""
        return len(set(self.scores)) > 1

    @property
    def solve_rate(self) -> float:
        """Share of its scored samples that are solved."""
        scored = [sample for sample in self.samples if sample.score is not None]
        return sum(sample.solved for sample in scored) / len(scored)


@dataclass(frozen=True)
class Evidence:
    """What the checks judge."""

    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]
    """Of the training stage, in order."""

    item_keys: Sequence[str]
    """Keys of the rows."""

    topic: str | None = None
    """Key of the rows that names their topic."""

    elsewhere: Mapping[str, Any] | None = None
    """What `graft eval --json` said of rows from another distribution."""

    left_out: Sequence[str] = ()
    """Lines of `trees.jsonl` that are no tree records, and why."""

    @cached_property
    def train(self) -> list[Mapping[str, Any]]:
        """Records of training steps, in order."""
        return [record for record in self.records if record["stage"] == Stage.TRAIN]

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """Measurements on held-out rows, in order."""
        return [
            record
            for record in self.records
            if record["stage"] == Stage.EVALUATION and "held_out_accuracy" in record
        ]

    @cached_property
    def samples(self) -> list[SampleFacts]:
        """Of all groups."""
        return [sample for group in self.groups for sample in group.samples]

    @cached_property
    def graded_groups(self) -> list[Group]:
        """Groups in which at least one sample has a score."""
        return [group for group in self.groups if group.scores]

    @cached_property
    def late(self) -> list[Group]:
        """Groups of the last steps."""
        steps = sorted({group.step for group in self.groups})
        wanted = set(steps[-late_count(len(steps)) :])
        return [group for group in self.groups if group.step in wanted]

    @cached_property
    def start(self) -> Mapping[str, Any] | None:
        """The measurement that training started from: after the warm start if there was one."""
        moments = (Moment.AFTER_WARM_START, Moment.BEFORE)
        return next((r for moment in moments for r in self.evaluations if r["moment"] == moment), None)

    @cached_property
    def since_start(self) -> list[Mapping[str, Any]]:
        """Measurements from `start` on: it and those that training moved."""
        if self.start is None:
            return []
        return [self.start, *(r for r in self.evaluations if r["moment"] in (Moment.DURING, Moment.AFTER))]

    @property
    def compares_samples(self) -> bool:
        """Whether the algorithm compares whole samples of a group by their scores."""
        return self.setting("algorithm.name") in COMPARE_SAMPLES

    def setting(self, path: str) -> Any:
        """The value of `a.b` in the run's settings; None where it is not set."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def column(self, name: str) -> list[float]:
        """A metric of the training steps that have it, in order."""
        return [float(record[name]) for record in self.train if name in record]


def late_count(steps: int) -> int:
    """How many of so many steps are late ones: at least one."""
    return max(1, round(LATE_SHARE * steps))


def read_evidence(
    folder: RunFolder, *, topic: str | None = None, elsewhere: Mapping[str, Any] | None = None
) -> Evidence:
    """Read a run folder, whatever its state.

    Args:
        folder: of the run.
        topic: key of the rows that names their topic, with dots for keys inside (`metadata.difficulty.num_terms`).
        elsewhere: what `graft eval --json` said of rows from another distribution.

    Raises:
        DataError: a file is damaged: a line is not JSON.
    """
    settings = folder.read_settings()
    threshold = float(settings.get("evaluation", {}).get("threshold", 1.0))
    left_out: list[str] = []
    keys: dict[str, None] = {}
    groups = []
    for record in well_formed(folder.read_trees(), left_out.append):
        if record["stage"] == Stage.TRAIN:
            keys |= dict.fromkeys(_dotted(record["item"]))
            groups.append(read_group(record, threshold=threshold, topic=topic))
    return Evidence(
        settings=settings,
        records=folder.read_metrics(),
        groups=groups,
        item_keys=list(keys),
        topic=topic,
        elsewhere=elsewhere,
        left_out=left_out,
    )


def read_group(record: Mapping[str, Any], *, threshold: float, topic: str | None = None) -> Group:
    """A line of `trees.jsonl` in numbers.

    Args:
        record: a well-formed line.
        threshold: a score of at least this counts as solved.
        topic: see `read_evidence`.
    """
    nodes = record["nodes"]
    paths = sample_paths(nodes)
    samples = [_sample(record, path, threshold) for path in paths]
    spans = [tuple(node["tokens"]) for node in nodes[1:] if node.get("kind") in (Kind.THOUGHT, Kind.ANSWER)]
    phrases = Counter(chain.from_iterable(_phrases(_tokens(nodes, path)) for path in paths))
    start = nodes[ROOT]["tokens"][:2]
    return Group(
        step=record["step"],
        topic=None if topic is None else _value_at(record["item"], topic),
        samples=samples,
        whole=all(node["parent"] == ROOT for node in nodes[1:]),
        apart=len({path[0] for path in paths}) == len(paths),
        segments=len(spans),
        distinct_segments=len(set(spans)),
        phrases=phrases.total(),
        distinct_phrases=len(phrases),
        doubled_start=len(start) == 2 and start[0] == start[1],
    )


def _sample(record: Mapping[str, Any], path: Sequence[int], threshold: float) -> SampleFacts:
    nodes, leaf = record["nodes"], path[-1]
    grade = record["grades"].get(str(leaf), {})
    score = grade.get("score")
    tokens = _tokens(nodes, path)
    own = _phrases(tokens)
    texts = [record["texts"].get(str(node), "") for node in path]
    return SampleFacts(
        score=score,
        outcome=grade.get("outcome", ""),
        solved=score is not None and reaches(score, threshold),
        tokens=len(tokens),
        stop=nodes[leaf]["stop"],
        segments=sum(nodes[node].get("kind") in (Kind.THOUGHT, Kind.ANSWER) for node in path),
        advantage=_advantage(record, path),
        completion=hash(tuple(tokens)),
        answer=hash(_answer(texts, nodes[leaf].get("kind"))),
        phrases=len(own),
        repeated_phrases=len(own) - len(set(own)),
        leaks=LEAK.search("".join(texts)) is not None,
        critique=_critique(record, leaf),
        critic_outcome=_critic_outcome(record, leaf),
    )


def _advantage(record: Mapping[str, Any], path: Sequence[int]) -> float | None:
    """Mean over the path's trained tokens; what is not finite is text in the file and counts as not trained."""
    own = {node: record["advantages"].get(str(node)) for node in path}
    sizes = {
        n: len(record["nodes"][n]["tokens"]) for n, value in own.items() if isinstance(value, int | float)
    }
    total = sum(sizes.values())
    return sum(own[node] * size for node, size in sizes.items()) / total if total else None


def _critique(record: Mapping[str, Any], leaf: int) -> Critique | None:
    """Of runs with a critic: `critiques`, leaf id -> `overall`, `thoughts`, `outcome`. A failed one counts as none."""
    if _critic_outcome(record, leaf) != Outcome.GRADED:
        return None
    found = record["critiques"][str(leaf)]
    overall, thoughts = found.get("overall"), found.get("thoughts")
    return Critique(
        float(overall) if isinstance(overall, int | float) else None,
        [float(s) for s in thoughts if isinstance(s, int | float)] if isinstance(thoughts, list) else [],
    )


def _critic_outcome(record: Mapping[str, Any], leaf: int) -> str:
    critiques = record.get("critiques")
    found = critiques.get(str(leaf)) if isinstance(critiques, Mapping) else None
    return str(found.get("outcome", Outcome.GRADED)) if isinstance(found, Mapping) else ""


def _answer(texts: Sequence[str], kind: str | None) -> str:
    text = texts[-1] if kind == Kind.ANSWER else "".join(texts)
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join((text if kind == Kind.ANSWER else lines[-1] if lines else "").lower().split())


def _tokens(nodes: Sequence[Mapping[str, Any]], path: Iterable[int]) -> list[int]:
    return [token for node in path for token in nodes[node]["tokens"]]


def _phrases(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[shift:] for shift in range(GRAM)), strict=False))


def _value_at(item: Mapping[str, Any], path: str) -> str | None:
    """The value of a dotted key as text; None where the row does not have it."""
    value: Any = item
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _dotted(item: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in item.items()
        for name in (_dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"])
    ]
