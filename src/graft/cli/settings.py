"""`graft settings`: every setting with type, default and help, read from the settings tree itself."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graft.cli.common import AsJson, print_json
from graft.section import tag_of

WIDTH = 100
TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "value"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the reference."""

    path: str
    """Dotted, as after `--set`."""

    type: str
    default: str
    """As TOML, `required`, or `none`."""

    help: str


@dataclass(frozen=True, slots=True)
class SettingsSection:
    """One table of a settings file."""

    path: str
    """Empty: the top of the file."""

    title: str
    """As in a file; of sections with several kinds also what chooses the kind."""

    help: str
    settings: tuple[Setting, ...]


def settings(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page docs/reference/settings.md.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every setting with its type, default and meaning."""
    if as_json:
        print_json(
            [
                {
                    "name": entry.path,
                    "section": section.title,
                    "type": entry.type,
                    "default": entry.default,
                    "help": entry.help,
                }
                for section in read_sections()
                for entry in section.settings
            ]
        )
    else:
        print(render_markdown() if markdown else render_text(), end="")


def read_sections() -> list[SettingsSection]:
    """All sections of a settings file, in the order of the tree."""
    from graft.config import RunConfig

    return list(_sections(RunConfig, "", chosen_by=None, default=None))


def read_algorithm(name: str) -> list[SettingsSection]:
    """The sections of one algorithm: `[algorithm]` with this name, and those inside it."""
    from graft.config_file import section_at

    kind = section_at(("algorithm",), {"algorithm": {"name": name}})
    assert kind is not None
    return list(_sections(kind, "algorithm", chosen_by=_tag(kind), default=None))


def render_text() -> str:
    """For the terminal."""
    lines: list[str] = []
    for section in read_sections():
        lines += [section.title or "top of the file", *_wrapped(section.help, 0), ""]
        for entry in section.settings:
            lines += [f"  {entry.path}  ({entry.type}; {_default_in_words(entry)})", *_wrapped(entry.help, 6)]
        lines.append("")
    return "\n".join(lines)


def render_markdown() -> str:
    """The page `docs/reference/settings.md`."""
    lines = [
        "# Settings",
        "",
        "What a settings file may hold, and what `--set NAME=VALUE` may change. This page is generated from",
        "`src/graft/config.py` by `python -m graft.cli.docs`. From Python the same names stand as tables,",
        '`training={"steps": 30}`, or with double underscores, `training__steps=30`.',
        "",
    ]
    for section in read_sections():
        lines += [f"## {f'`{section.title}`' if section.title else 'Top of the file'}", "", section.help, ""]
        lines += [*table_of(section.settings), ""] if section.settings else []
    return "\n".join(lines[:-1]) + "\n"


def table_of(settings: Iterable[Setting]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
    for entry in settings:
        default = entry.default if entry.default in ("required", "none") else f"`{entry.default}`"
        cells = (f"`{entry.path}`", entry.type, default, entry.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _sections(
    kind: type[BaseModel], path: str, *, chosen_by: str | None, default: BaseModel | None
) -> Iterator[SettingsSection]:
    """A section, then those inside it.

    Args:
        kind: its class.
        path: dotted; empty for the top.
        chosen_by: the line that chooses this kind, where there are several.
        default: what the section is where it is left out, if that differs from a fresh one.
    """
    own: list[Setting] = []
    inner: list[tuple[str, FieldInfo, list[type[BaseModel]]]] = []
    for name, field in kind.model_fields.items():
        dotted = f"{path}.{name}" if path else name
        kinds = _section_kinds(field.annotation)
        if kinds:
            inner.append((dotted, field, kinds))
        elif not chosen_by or name != chosen_by.split()[0]:
            value = _default_of(field) if default is None else _as_toml(getattr(default, name))
            own.append(Setting(dotted, _type_of(field), value, _one_line(field.description)))
    title = f"[{path}]" if path else ""
    yield SettingsSection(path, title + (f" {chosen_by}" if chosen_by else ""), _help_of(kind), tuple(own))
    for dotted, field, kinds in inner:
        for each in kinds:
            named = _tag(each) if len(kinds) > 1 else None
            instead = field.default if isinstance(field.default, each) else None
            for section in _sections(each, dotted, chosen_by=named, default=instead):
                yield _with_optional(section, dotted, field)


def _with_optional(section: SettingsSection, path: str, field: FieldInfo) -> SettingsSection:
    if section.path != path or NoneType not in get_args(field.annotation):
        return section
    return SettingsSection(
        section.path, section.title, f"{section.help} Optional: absent by default.", section.settings
    )


def _section_kinds(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _section_kinds(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _type_of(field: FieldInfo) -> str:
    return ", ".join(
        [_type_name(field.annotation), *_bounds_of(field), *_bounds_of_entries(field.annotation)]
    )


def _bounds_of(field: FieldInfo) -> list[str]:
    return [
        f"{word} {getattr(limit, short):g}"
        for limit in field.metadata
        for short, word in BOUNDS.items()
        if hasattr(limit, short)
    ]


def _bounds_of_entries(annotation: Any) -> list[str]:
    """Of a list's first entry, where its entries have bounds of their own."""
    entry, *_ = get_args(annotation) or (None,)
    if get_origin(annotation) is not tuple or get_origin(entry) is not Annotated:
        return []
    return [bound for limit in get_args(entry)[1:] for bound in _bounds_of(limit)]


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *others, last = (f'"{value}"' for value in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (Union, UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not NoneType)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}s".replace("texts", "text")
        return f"list of {len(arguments)} {_type_name(arguments[0])}s"
    if origin is dict:
        return "table"
    return TYPE_NAMES[annotation]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _as_toml(field.get_default(call_default_factory=True))


def _as_toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{key} = {_as_toml(entry)}" for key, entry in value.items()) + " }"
            if value
            else "{}"
        )
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _tag(kind: type[BaseModel]) -> str:
    """What chooses this kind in a file: `name = "grpo"`, `type = "judge"`."""
    key = tag_of(kind)
    return f'{key} = "{kind.model_fields[key].default}"'


def _default_in_words(entry: Setting) -> str:
    return entry.default if entry.default == "required" else f"default {entry.default}"


def _help_of(kind: type[BaseModel]) -> str:
    return _one_line(kind.__doc__)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
