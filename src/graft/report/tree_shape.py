"""How the spans of a stored tree hang together, from their `parent` alone.

`nodes` are those of a line of `trees.jsonl` (`Tree.to_json`): parents come before their children, the prompt is first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.tree import ROOT
from graft.types import StopReason

Nodes = Sequence[Mapping[str, Any]]


def children_of(nodes: Nodes) -> list[list[int]]:
    """For each node the ids of the spans that continue it, rising."""
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes[1:], start=1):
        children[node["parent"]].append(index)
    return children


def depths(nodes: Nodes) -> list[int]:
    """For each node the number of spans between it and the prompt, itself counted; the prompt has 0."""
    found = [0]
    for node in nodes[1:]:
        found.append(found[node["parent"]] + 1)
    return found


def path_to(nodes: Nodes, node: int) -> list[int]:
    """Ids from the first span after the prompt to `node`."""
    path = [node]
    while (parent := nodes[path[-1]]["parent"]) != ROOT:
        path.append(parent)
    return path[::-1]


def leaf_paths(nodes: Nodes) -> list[list[int]]:
    """The paths of a stored tree, each as the ids from its first span after the prompt to its leaf."""
    children = children_of(nodes)
    return sorted(path_to(nodes, leaf) for leaf in range(1, len(nodes)) if not children[leaf])


def sample_paths(nodes: Nodes) -> list[list[int]]:
    """Those of the paths that end a completion, as `Tree.endings` gives them: candidates that were cut and not gone on
    with are no samples."""
    return [path for path in leaf_paths(nodes) if nodes[path[-1]]["stop"] != StopReason.CUT]


def branches(nodes: Nodes) -> bool:
    """Whether the tree branches below its first level: a span is continued in more than one way."""
    return any(len(below) > 1 for below in children_of(nodes)[1:])
