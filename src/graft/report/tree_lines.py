"""Lines of `trees.jsonl` that are JSON but no tree record: told apart from the others, and why.

A line can come from another program, another version or an edit by hand. What shows a run leaves it out and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graft.report.metrics import Moment, Stage
from graft.report.run_folder import TREES_FILE
from graft.tree import NO_PARENT, ROOT, Kind


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Node(_Part):
    parent: int
    group: int
    kind: Annotated[Kind, Field(strict=False)]
    tokens: list[int]
    stop: str | None


class _Grade(_Part):
    score: float | None = None
    outcome: str = ""
    reason: str = ""


class _Critique(_Part):
    overall: float | None = None
    reasons: list[str] = []
    outcome: str = ""
    problem: str = ""


class _Line(_Part):
    """What viewers rely on; see `trees.py` for the whole record."""

    step: int
    stage: Annotated[Stage, Field(strict=False)]
    moment: Annotated[Moment, Field(strict=False)] | None = None
    row: int
    messages: list[dict[str, Any]]
    item: dict[str, Any]
    nodes: Annotated[list[_Node], Field(min_length=1)]
    texts: dict[str, str]
    grades: dict[str, _Grade]
    advantages: dict[str, float | str]  # what is not finite is text
    critiques: dict[str, _Critique] = {}
    numbers: dict[str, dict[str, float | str]] = {}
    survivors: list[int] = []

    @model_validator(mode="after")
    def _nodes_form_a_tree(self) -> _Line:
        for index, node in enumerate(self.nodes):
            if not (ROOT <= node.parent < index or (index == ROOT and node.parent == NO_PARENT)):
                raise ValueError(f"node {index} has parent {node.parent}: parents come before their children")
        for place in self.survivors:
            if not ROOT < place < len(self.nodes):
                raise ValueError(f"survivors: there is no node {place} below the prompt")
        return self


def well_formed(records: Iterable[dict[str, Any]], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The records that are tree records, in order.

    Args:
        records: all lines of `trees.jsonl`, as `RunFolder.read_trees` gives them.
        say: told of each of the others: its line, what is wrong with it.
    """
    for number, record in enumerate(records, start=1):
        try:
            _Line.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ").lower()
            say(f"{TREES_FILE}, line {number}: {f'{where}: ' if where else ''}{what}")
        else:
            yield record
