"""Lines of `trees.jsonl`: writing a tree with its texts, grades and advantages, and picking samples to show.

    {"step": 12, "stage": "train", "row": 3, "messages": [...], "item": {...},
     "groups": 1, "nodes": [...],                 # Tree.to_json(); with the kept tokens of truncated sampling
     "texts": {"0": "...", "1": "..."},                             # node id: decoded text
     "grades": {"1": {"score": 1.0, "outcome": "graded", "parts": {}, "reason": ""}},   # leaf id
     "advantages": {"1": 0.87},                                     # node id: mean over its tokens
     "critiques": {"3": {"overall": 10.0, "thoughts": [10.0, 0.0], "progress": [5.0, 5.0],
                         "reasons": ["", "3 + 4 is 7"], "outcome": "graded", "problem": ""}},   # leaf id; with a critic
     "numbers": {"1": {"S": 10.0, "P": 5.0, "A": 0.3}},             # node id: what led to its advantage, where told
     "survivors": [2, 4, 8]}                                        # nodes chosen of their groups while a chain grew

Trees of an evaluation also have its `moment`. A node without an advantage does not train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

from graft.report.metrics import Moment, Stage
from graft.report.run_folder import to_plain
from graft.report.tree_shape import leaf_paths
from graft.tree import ROOT, Tree
from graft.types import Credit, Critique, Grade, Tokens, reaches

T = TypeVar("T")


def tree_record(
    step: int,
    stage: Stage | str,
    tree: Tree,
    grades: Mapping[int, Grade],
    decode: Callable[[Tokens], str],
    credit: Credit | None = None,
    *,
    moment: Moment | str | None = None,
    critiques: Mapping[int, Critique] | None = None,
    details: Mapping[int, Mapping[str, float]] | None = None,
    survivors: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One line of `trees.jsonl`.

    Args:
        step: number of the training step; for an evaluation the number of steps made before it.
        stage: `train` or `evaluation`.
        tree: the prompt and its samples.
        grades: leaf id to grade.
        decode: token ids to text.
        credit: what the tree trained on; None for an evaluation.
        moment: when the evaluation was made; None in training.
        critiques: leaf id to what the critic says of its thoughts; None without a critic.
        details: node id to the numbers that led to its advantage, by name; None where none are told.
        survivors: the nodes that were chosen of their groups while the tree grew, one a depth; None where none were.

    Keys of the row that have no JSON form are left out.
    """
    record: dict[str, Any] = {"step": int(step), "stage": str(Stage(stage))}
    if moment is not None:
        record["moment"] = str(Moment(moment))
    told: dict[str, Any] = {}
    if critiques is not None:
        told["critiques"] = {str(leaf): _critique(critique) for leaf, critique in critiques.items()}
    if details is not None:
        told["numbers"] = {
            str(node): {name: float(f"{value:.7g}") for name, value in own.items()}
            for node, own in details.items()
        }
    if survivors:
        told["survivors"] = [int(node) for node in survivors]
    return {
        **record,
        "row": int(tree.prompt.row),
        "messages": [_json_part(message) for message in tree.prompt.messages],
        "item": _json_part(tree.prompt.item),
        **tree.to_json(),
        "texts": {str(node): _text(tree, node, decode) for node in range(len(tree))},
        "grades": {str(leaf): _grade(grade) for leaf, grade in grades.items()},
        "advantages": {
            str(node): float(f"{advantages.mean():.7g}")
            for node, advantages in ({} if credit is None else credit.advantages).items()
        },
        **told,
    }


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One path of a stored tree as people see it."""

    segments: Sequence[tuple[str, float | None]]
    """Text and mean advantage of each span; None: the span did not train."""

    score: float | None
    outcome: str
    reason: str
    tokens: int
    """Length of the completion."""

    stop: str | None
    parts: Mapping[str, float | str] = field(default_factory=dict)
    """What each part of the grader gave, where it has some; what is not finite is text."""

    @property
    def text(self) -> str:
        """The whole completion."""
        return "".join(text for text, _ in self.segments)


@dataclass(frozen=True, slots=True)
class ShownPair:
    """One held-out row with its first sample before and after training."""

    row: int
    messages: Sequence[Mapping[str, Any]]
    item: Mapping[str, Any]
    before: ShownSample
    after: ShownSample

    @property
    def question(self) -> str:
        """What the last message of the prompt says, as text."""
        return message_text(self.messages[-1]) if self.messages else ""


def shown_samples(record: Mapping[str, Any]) -> list[ShownSample]:
    """The samples of a line of `trees.jsonl`, branch after branch."""
    return [_shown(record, path) for path in leaf_paths(record["nodes"])]


def message_text(message: Mapping[str, Any]) -> str:
    """A message's content as text; of content in parts, the texts of the parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def before_and_after(records: Iterable[Mapping[str, Any]]) -> list[ShownPair]:
    """Held-out rows that were measured both at the start and at the end, in order of their rows.

    The start is the model as it was given; the end is the evaluation after training.
    """
    before: dict[int, Mapping[str, Any]] = {}
    after: dict[int, Mapping[str, Any]] = {}
    for record in records:
        if record["stage"] != Stage.EVALUATION:
            continue
        if record.get("moment") == Moment.BEFORE:
            before[record["row"]] = record
        elif record.get("moment") == Moment.AFTER:
            after[record["row"]] = record
    pairs = []
    for row in sorted(before.keys() & after.keys()):
        first, last = shown_samples(before[row]), shown_samples(after[row])
        if first and last:
            pairs.append(ShownPair(row, before[row]["messages"], before[row]["item"], first[0], last[0]))
    return pairs


def telling_pairs(pairs: Sequence[ShownPair], count: int, *, threshold: float) -> list[ShownPair]:
    """A few pairs that show what changed: rows newly solved, then still unsolved, then lost, in turn.

    Args:
        pairs: as `before_and_after` gives them.
        count: how many to choose.
        threshold: a score of at least this counts as solved.

    Choosing in turn, instead of the best, keeps the choice honest: what was lost is shown too.
    """
    changes = ((False, True), (False, False), (True, False), (True, True))
    waiting = [
        [
            pair
            for pair in pairs
            if (is_solved(pair.before, threshold), is_solved(pair.after, threshold)) == change
        ]
        for change in changes
    ]
    in_turn = [pair for turn in zip_longest(*waiting) for pair in turn if pair is not None]
    return in_turn[:count]


def is_solved(sample: ShownSample, threshold: float) -> bool:
    """Whether the sample has a score and it reaches the threshold."""
    return sample.score is not None and reaches(sample.score, threshold)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return list(items[-1:]) if count == 1 else []
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _shown(record: Mapping[str, Any], path: Sequence[int]) -> ShownSample:
    nodes, leaf = record["nodes"], path[-1]
    grade = record["grades"].get(str(leaf), {})
    return ShownSample(
        segments=[(record["texts"].get(str(node), ""), record["advantages"].get(str(node))) for node in path],
        score=grade.get("score"),
        outcome=grade.get("outcome", "not graded"),
        reason=grade.get("reason", ""),
        tokens=sum(len(nodes[node]["tokens"]) for node in path),
        stop=nodes[leaf]["stop"],
        parts=grade.get("parts", {}),
    )


def _text(tree: Tree, node: int, decode: Callable[[Tokens], str]) -> str:
    """The text that a span adds to its path; the texts of a path joined are the decoded completion.

    A span on its own can decode to something else: a character may be cut between two spans, and some
    tokenizers drop a leading space.
    """
    if node == ROOT:
        return decode(tree.nodes[ROOT].tokens)
    before, whole = (_settled(tree, node, decode) for node in (tree.nodes[node].parent, node))
    return whole[len(before) :] if whole.startswith(before) else decode(tree.nodes[node].tokens)


def _settled(tree: Tree, node: int, decode: Callable[[Tokens], str]) -> str:
    """The completion up to the end of `node`, without a last character that its children complete."""
    if node == ROOT:
        return ""
    text = decode(tree.completion(node))
    return text.rstrip("\ufffd") if tree.children(node) else text


def _grade(grade: Grade) -> dict[str, Any]:
    return {
        "score": None if grade.score is None else float(grade.score),
        "outcome": str(grade.outcome),
        "parts": {name: float(part) for name, part in grade.parts.items()},
        "reason": grade.reason,
    }


def _critique(critique: Critique) -> dict[str, Any]:
    return {
        "overall": critique.overall,
        "thoughts": list(critique.thoughts),
        "progress": list(critique.progress),
        "reasons": list(critique.reasons),
        "outcome": str(critique.outcome),
        "problem": critique.problem,
    }


def _json_part(mapping: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in mapping.items():
        try:
            kept[str(key)] = to_plain(value)
        except TypeError:
            continue
    return kept
