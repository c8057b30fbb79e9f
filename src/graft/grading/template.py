"""OpenAI's template strings: `{{ item.path }}` and `{{ sample.path }}` in text. Nothing is evaluated.

    template = parse_template("Is {{ sample.output_text }} right? {{item.answers[0].text}}")
    template.render({"item": {...}, "sample": {...}})

A path is keys joined by dots and list positions in brackets. Text is inserted as it is, anything else as compact
JSON. A single brace, and `}}` outside a reference, are plain text: prompts hold JSON and LaTeX.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

NAMESPACES = ("item", "sample")

KEYS_SHOWN = 20
"""Of an object that lacks a key."""

_PATH = re.compile(r"(?P<namespace>\w+)(?P<steps>(?:\.[\w-]+|\[\d{1,9}\])*)")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]")
_FORM = "{{ item.key }} or {{ sample.key }}, keys joined by dots, list positions as [0]"


class TemplateError(ValueError):
    """A text is no template. The message says where, what it got and what it wants."""


class MissingVariableError(LookupError):
    """A reference leads to nothing in this row or sample."""

    def __init__(self, reference: Reference, reason: str) -> None:
        super().__init__(f"{{{{{reference}}}}}: {reason}")
        self.reference = reference


@dataclass(frozen=True, slots=True)
class Reference:
    """What stands between the braces."""

    namespace: str
    steps: tuple[str | int, ...]
    """Keys and list positions."""

    def __str__(self) -> str:
        return self.namespace + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in self.steps)

    def resolve(self, namespaces: Mapping[str, Any]) -> Any:
        """The value that the reference leads to.

        Raises:
            MissingVariableError: no such key or position.
        """
        value: Any = namespaces[self.namespace]
        for step in self.steps:
            if isinstance(step, int):
                if not isinstance(value, list | tuple):
                    raise MissingVariableError(self, f"[{step}] of what is no list")
                if step >= len(value):
                    raise MissingVariableError(self, f"[{step}] of a list of {len(value)}")
            elif not isinstance(value, Mapping):
                raise MissingVariableError(self, f"'.{step}' of what is no object")
            elif step not in value:
                raise MissingVariableError(self, f"no key {step!r}; there are: {_listed(value)}")
            container: Any = value
            value = container[step]
        return value


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed text: plain pieces and references, in order."""

    parts: tuple[str | Reference, ...]

    @property
    def references(self) -> Iterator[Reference]:
        """All references, in order."""
        return (part for part in self.parts if isinstance(part, Reference))

    def render(self, namespaces: Mapping[str, Any]) -> str:
        """The text with every reference replaced.

        Args:
            namespaces: `item` and `sample`.

        Raises:
            MissingVariableError: a reference leads to nothing.
        """
        return "".join(
            part if isinstance(part, str) else as_text(part.resolve(namespaces)) for part in self.parts
        )


def parse_template(text: str) -> Template:
    """Read a text with references.

    Raises:
        TemplateError: braces are not closed, the namespace is unknown, or the path has a form that templates do not
            have (filters, expressions, wildcards, quoted keys, negative positions).
    """
    parts: list[str | Reference] = []
    place = 0
    while (opened := text.find("{{", place)) >= 0:
        closed = text.find("}}", opened + 2)
        if closed < 0:
            raise TemplateError(f"'{{{{' at {_where(text, opened)} is not closed; want {_FORM}")
        if opened > place:
            parts.append(text[place:opened])
        parts.append(_reference(text[opened + 2 : closed], _where(text, opened)))
        place = closed + 2
    if place < len(text):
        parts.append(text[place:])
    return Template(tuple(parts))


def as_text(value: Any) -> str:
    """How a value prints: text as it is, anything else as compact JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _reference(inside: str, where: str) -> Reference:
    match = _PATH.fullmatch(inside.strip(" \t\r\n"))
    shown = inside if len(inside) <= 60 else inside[:59] + "…"
    if match is None:
        raise TemplateError(f"'{{{{{shown}}}}}' at {where} is no path; want {_FORM}")
    if match["namespace"] not in NAMESPACES:
        raise TemplateError(
            f"'{{{{{shown}}}}}' at {where}: no namespace {match['namespace']!r}; want item (the row) or sample "
            "(the model's output)"
        )
    steps = tuple(int(index) if index else key for key, index in _STEP.findall(match["steps"]))
    return Reference(match["namespace"], steps)


def _listed(keys: Mapping[str, Any]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(map(str, islice(keys, KEYS_SHOWN))) + more


def _where(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return f"line {line}, column {column}"
