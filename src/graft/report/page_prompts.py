"""One prompt and what was sampled from it, as the page gets it: plain JSON with texts made visible and cut.

A prompt of a training step comes as its spans, from which the page draws both its samples and its tree:

    {"row": 3, "messages": [...], "item": {...},
     "nodes": [{"parent": -1, "group": 0, "kind": "thought", "text": "...", "tokens": 9, "advantage": 0.3,
                "numbers": {"S": 10.0, "A": 0.3}, "reason": "...",                  # where told
                "grade": {"score": 1.0, "outcome": "graded", "reason": "",          # at leaves
                          "parts": {"format": 0.5}},                                # of a grader that has some
                "critique": {"overall": 10.0, "outcome": "graded", "problem": ""},  # where a chain was criticised
                "left_out": 2}],                                                    # spans below it not on the page
     "leaves": [4, 9],                                         # the samples to show, by the ends of their paths
     "drawn": 8, "spans": 14,                                  # samples and spans of the whole tree
     "branches": true, "survivors": [0, 4]}                    # of a tree that does; the path that it grew along

Nodes go by their place in `nodes`; the parent -1 is the prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from graft.report.text import visible
from graft.report.tree_shape import Nodes, branches, children_of, depths, leaf_paths, path_to
from graft.report.trees import ShownPair, ShownSample, message_text
from graft.tree import ROOT

SAMPLES_PER_PROMPT = 16
NODES_PER_TREE = 500
"""Of a tree that branches; of others the spans of the samples shown."""

CHARACTERS_PER_SAMPLE = 4_000
CHARACTERS_PER_REASON = 400
CHARACTERS_PER_KEY = 300

Record = Mapping[str, Any]


def prompt_data(record: Record, *, suffix: str = "") -> dict[str, Any]:
    """A line of `trees.jsonl` as the page shows it; `suffix`: what `data.suffix` added to the row's prompt."""
    nodes = record["nodes"]
    kept, children, samples = _kept(record), children_of(nodes), _samples(record)
    place = {ROOT: -1} | {node: index for index, node in enumerate(kept)}
    reasons, left_out, before = _reasons(record), _left_out(nodes, place), _characters_before(record)
    data = {
        **_asked(record["row"], record["messages"], record["item"], suffix),
        "nodes": [
            {
                "parent": place[nodes[node]["parent"]],
                **_node(
                    record,
                    node,
                    characters=max(0, CHARACTERS_PER_SAMPLE - before[node]),
                    leaf=not children[node],
                ),
                **({"reason": reasons[node]} if node in reasons else {}),
                **({"left_out": left_out[node]} if node in left_out else {}),
            }
            for node in kept
        ],
        "leaves": [place[path[-1]] for path in samples if path[-1] in place][:SAMPLES_PER_PROMPT],
        "drawn": len(samples),
        "spans": len(nodes) - 1,
    }
    if branches(nodes):
        data["branches"] = True
        data["survivors"] = [place[node] for node in record.get("survivors", ()) if node in place]
    return data


def pair_data(pair: ShownPair, *, suffix: str = "") -> dict[str, Any]:
    """A held-out row with its first sample before and after training; `suffix` as for `prompt_data`."""
    return {
        **_asked(pair.row, pair.messages, pair.item, suffix),
        "before": _sample(pair.before),
        "after": _sample(pair.after),
    }


def _samples(record: Record) -> list[list[int]]:
    """Paths to the graded leaves; where none was graded, to all. Candidates that were dropped on the way are none."""
    paths = leaf_paths(record["nodes"])
    return [path for path in paths if str(path[-1]) in record["grades"]] or paths


def _kept(record: Record) -> list[int]:
    """Spans on the page: of a tree that branches those nearest to the prompt, of others those of the first samples."""
    nodes = record["nodes"]
    if not branches(nodes):
        return sorted({node for path in _samples(record)[:SAMPLES_PER_PROMPT] for node in path})
    depth = depths(nodes)
    return sorted(sorted(range(1, len(nodes)), key=depth.__getitem__)[:NODES_PER_TREE])


def _left_out(nodes: Nodes, place: Mapping[int, int]) -> Counter[int]:
    """Of each span on the page how many below it are not."""
    found: Counter[int] = Counter()
    for node in range(1, len(nodes)):
        if node not in place:
            found[next(above for above in [*path_to(nodes, node)[::-1], ROOT] if above in place)] += 1
    return found


def _characters_before(record: Record) -> list[int]:
    """For each span the length of the text between the prompt and its start."""
    texts, before = record["texts"], [0]
    for node in record["nodes"][1:]:
        parent = node["parent"]
        before.append(before[parent] + (len(texts.get(str(parent), "")) if parent != ROOT else 0))
    return before


def _reasons(record: Record) -> dict[int, str]:
    """What critics say of each span: a critique has a reason for each thought on the path to its node."""
    found: dict[int, str] = {}
    for node in range(1, len(record["nodes"])):
        critique = record.get("critiques", {}).get(str(node), {})
        for thought, reason in zip(path_to(record["nodes"], node), critique.get("reasons", ()), strict=False):
            if reason:
                found.setdefault(thought, _cut(reason, CHARACTERS_PER_REASON))
    return found


def _node(record: Record, node: int, *, characters: int, leaf: bool) -> dict[str, Any]:
    """What is known of one span, all but its place in the tree; `characters` of its text."""
    own, key = record["nodes"][node], str(node)
    data = {
        "group": own["group"],
        "kind": own["kind"],
        "text": _cut(record["texts"].get(key, ""), characters),
        "tokens": len(own["tokens"]),
        "advantage": record["advantages"].get(key),
    }
    if own["stop"] is not None:
        data["stop"] = own["stop"]
    if numbers := record.get("numbers", {}).get(key):
        data["numbers"] = {visible(name): _short(value) for name, value in numbers.items()}
    if leaf:
        data["grade"] = _grade(record["grades"].get(key, {}))
    if critique := record.get("critiques", {}).get(key):
        data["critique"] = {
            "overall": critique.get("overall"),
            "outcome": visible(critique.get("outcome", "")),
            "problem": _cut(critique.get("problem", ""), CHARACTERS_PER_REASON),
        }
    return data


def _grade(grade: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "score": grade.get("score"),
        "outcome": grade.get("outcome", "not graded"),
        "reason": visible(grade.get("reason", "")[:CHARACTERS_PER_REASON]),
        **_parts(grade.get("parts", {})),
    }


def _parts(parts: Mapping[str, float | str]) -> dict[str, Any]:
    """What each part of the grader gave; nothing where it has none."""
    return {"parts": {visible(name): _short(value) for name, value in parts.items()}} if parts else {}


def _short(value: float | str) -> float | str:
    """Six digits are more than a column shows; what is not finite is text."""
    return visible(value) if isinstance(value, str) else float(f"{value:.6g}")


def _asked(
    row: int, messages: Sequence[Mapping[str, Any]], item: Mapping[str, Any], suffix: str
) -> dict[str, Any]:
    return {
        "row": row,
        "messages": [
            {"role": visible(str(message.get("role", ""))), "text": _cut(message_text(message))}
            for message in messages
        ],
        "item": {
            visible(str(key)): _cut(_key_text(value), CHARACTERS_PER_KEY)
            for key, value in item.items()
            if value is not None and not _stands_above(key, value, messages, suffix)
        },
    }


def _stands_above(key: str, value: Any, messages: Sequence[Mapping[str, Any]], suffix: str) -> bool:
    """Whether a key of the row is what the prompt was made of, which the page shows above the row's keys.

    A value that is a piece of the prompt is none: "A" may be the answer to a choice of A and B.
    """
    if isinstance(value, str):
        shown = {message_text(message).strip() for message in messages}
        return value.strip() in shown or (value + suffix).strip() in shown
    return key == "messages" or (isinstance(value, list) and bool(value) and value == list(messages))


def _key_text(value: Any) -> str:
    """Text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _sample(sample: ShownSample) -> dict[str, Any]:
    left = CHARACTERS_PER_SAMPLE
    segments = []
    for text, advantage in sample.segments:
        segments.append({"text": _cut(text, left), "advantage": advantage})
        left -= len(text)
        if left <= 0:
            break
    return {
        "segments": segments,
        "score": sample.score,
        "outcome": sample.outcome,
        "reason": visible(sample.reason[:CHARACTERS_PER_REASON]),
        **_parts(sample.parts),
        "tokens": sample.tokens,
        "stop": sample.stop,
    }


def _cut(text: str, length: int = CHARACTERS_PER_SAMPLE) -> str:
    if len(text) <= length:
        return visible(text)
    return f"{visible(text[:length])}… [{len(text) - length:,} more characters in trees.jsonl]"
