"""Reading, overriding, checking and writing back the settings of `config.py`."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError

from graft.algorithm_settings import ALGORITHM_NAMES
from graft.config import Grading, RunConfig
from graft.errors import ConfigError
from graft.section import Section, tag_of

NEAR = 0.7
"""Likeness (difflib) from which a known key is suggested for an unknown one; `value` and `scale` have 0.6."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply `a.b=c` overrides and check the result.

    Raises:
        ConfigError: the file is missing or not TOML, or a setting is unknown, malformed or out of range.
            The message names each offending key, what it got and what it wants.
    """
    return check_config(read_settings(path, overrides), where=str(path), overrides=overrides)


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a TOML file with `a.b=c` overrides, not checked; `base` is the file's own folder.

    Raises:
        ConfigError: the file is missing or not TOML, or an override is malformed.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. `graft init` writes one to start from.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    for override in overrides:
        set_override(data, override)
    data["base"] = str((path.parent / data.get("base", ".")).resolve())
    return data


def load_grading(overrides: Sequence[str]) -> Grading:
    """The `[grading]` section alone, from its defaults and `grading.a=b` overrides.

    Raises:
        ConfigError: an override is not of this section, unknown, malformed or out of range.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        set_override(data, override)
    if set(data) - {"grading"}:
        raise ConfigError(f"--set {overrides[0]}: without a settings file only grading.* can be set")
    try:
        return Grading.model_validate(data.get("grading", {}))
    except ValidationError as error:
        entries = [{**entry, "loc": ("grading", *entry["loc"])} for entry in error.errors()]
        raise ConfigError("\n".join(f"--set: {_describe(entry, data)}" for entry in entries)) from None


def check_config(data: Mapping[str, Any], *, where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Turn raw settings into a checked tree.

    Args:
        data: nested tables as TOML gives them.
        where: names the origin in error messages, e.g. the file.
        overrides: `a.b=c` that the settings hold already: the origin of what they say.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            origin = _origin(dict(entry), data, overrides) or where
            lines += [f"{origin}: {line}" for line in _describe(dict(entry), dict(data)).splitlines()]
        raise ConfigError("\n".join(lines)) from None


def set_override(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to raw settings. The value is read as TOML; what is not TOML is taken as text.

    Raises:
        ConfigError: there is no `=`, or the path leads through something that is not a table.
    """
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override}: want key=value, e.g. --set optimizer.learning_rate=1e-5")
    keys = path.strip().split(".")
    table = data
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: '{key}' is a value, not a section")
    table[keys[-1]] = _parse_value(text.strip())


def dump_config(config: RunConfig) -> str:
    """The resolved settings as TOML; reading it back gives an equal tree."""
    document = tomlkit.document()
    tables = []
    for name, value in config.model_dump(mode="json", exclude_none=True).items():
        if isinstance(value, dict):
            tables.append((name, value))
        else:
            document.add(name, value)
    for name, value in tables:
        document.add(name, tomlkit.item(value))
    return tomlkit.dumps(document)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _origin(entry: Mapping[str, Any], data: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """The last override that gave the value that a finding is about, or what the value stands in."""
    path = _without_tags(_location(entry), data)
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, _unquoted(entry["ctx"]["discriminator"]))
    for override in reversed(overrides):
        keys = tuple(override.partition("=")[0].strip().split("."))
        is_unknown_table = entry["type"] == "extra_forbidden" and keys[: len(path)] == path
        if path and (keys == path[: len(keys)] or is_unknown_table):
            return f"--set {override}"
    return None


def _location(entry: Mapping[str, Any]) -> list[str | int]:
    return [part for part in entry["loc"] if isinstance(part, str | int)]


def _describe(entry: dict[str, Any], data: dict[str, Any]) -> str:
    """One line for one finding of pydantic, in the words of the settings file."""
    path = _without_tags(_location(entry), data)
    dotted = ".".join(str(part) for part in path)
    if entry["type"] == "bad_grader":
        return str(entry["msg"])
    if entry["type"] == "extra_forbidden":
        return _unknown_key(path, data)
    if entry["type"] == "missing":
        return f"{dotted}: missing. {_help_of(path, data)}".rstrip()
    if entry["type"] == "union_tag_invalid":
        known = [tag.strip("' ") for tag in entry["ctx"]["expected_tags"].split(",")]
        close = difflib.get_close_matches(entry["ctx"]["tag"], known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
        tag = _unquoted(entry["ctx"]["discriminator"])
        return f"{dotted}.{tag}: no {path[-1]} is called '{entry['ctx']['tag']}'. {hint}"
    if entry["type"] == "union_tag_not_found":
        return f"{dotted}.{_unquoted(entry['ctx']['discriminator'])}: missing. It says what the section is about."
    if entry["type"] == "value_error":
        return f"{dotted + ': ' if dotted else ''}{entry['ctx']['error']}"
    got = json.dumps(entry["input"], default=str)
    return f"{dotted} = {got}: {entry['msg'].lower()}. {_help_of(path, data)}".rstrip()


def _unquoted(text: str) -> str:
    return text.strip("'")


def _unknown_key(path: tuple[str, ...], data: dict[str, Any]) -> str:
    dotted = ".".join(path)
    section = section_at(path[:-1], data)
    known = sorted(section.model_fields) if section else []
    close = difflib.get_close_matches(path[-1], known, n=1, cutoff=NEAR)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known here: {', '.join(known)}."
    return f"{dotted}: unknown setting{_owner(path, section, data)}. {hint}"


def _owner(path: tuple[str, ...], section: type[Section] | None, data: dict[str, Any]) -> str:
    """For whom a key of `[algorithm]` or of a part of it is unknown: the part says its kind itself, or has none."""
    if path[0] != "algorithm":
        return ""
    if len(path) > 2 and section is not None and "type" in section.model_fields:
        return f" for {path[-2]} '{section.model_fields['type'].default}'"
    return f" for algorithm '{data['algorithm'].get('name', 'grpo')}'"


def _help_of(path: tuple[str, ...], data: dict[str, Any]) -> str:
    path = tuple(part for part in path if not part.isdecimal())  # without the place in a list
    section = section_at(path[:-1], data)
    field = section.model_fields.get(path[-1]) if section else None
    return " ".join((field.description or "").split()) if field else ""


def _without_tags(location: Sequence[str | int], data: Mapping[str, Any]) -> tuple[str, ...]:
    """Drop the names of union members that pydantic puts into locations (`algorithm.grpo.clip`)."""
    path: list[str] = []
    section: Any = data
    for part in location:
        named = isinstance(section, Mapping) and part in (section.get("name"), section.get("type"))
        is_tag = named or (path == ["algorithm"] and part in ALGORITHM_NAMES)
        if not is_tag:
            path.append(str(part))
            section = section.get(part) if isinstance(section, Mapping) else None
    return tuple(path)


def section_at(path: tuple[str, ...], data: dict[str, Any]) -> type[Section] | None:
    """The section class that a dotted path leads to, given the raw settings (which name the algorithm)."""
    current: Any = RunConfig
    for index, part in enumerate(path):
        field = current.model_fields.get(part)
        if field is None:
            return None
        candidates = [
            t for t in _flatten(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        if len(candidates) > 1:
            chosen = data
            for key in path[: index + 1]:
                chosen = chosen.get(key, {}) if isinstance(chosen, dict) else {}
            candidates = [c for c in candidates if _is_chosen(c, chosen)] or candidates[:1]
        if not candidates:
            return None
        current = candidates[0]
    return current


def _is_chosen(kind: type[BaseModel], data: Any) -> bool:
    tag = tag_of(kind)
    return isinstance(data, dict) and data.get(tag) == kind.model_fields[tag].default


def _flatten(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation] if not arguments else [t for a in arguments for t in _flatten(a)]
