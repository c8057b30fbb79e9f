"""People's own functions that settings name: found before anything is computed, and missed by the setting's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.config import RunConfig
from graft.data.functions import load_function
from graft.errors import ConfigError
from graft.graders import grader_spec
from graft.grading.check import parse_grader
from graft.grading.schema import Function, GraderSpec, Multi, Weighted


def refuse_functions(config: RunConfig, *, reward: bool = False) -> None:
    """Refuse settings that name a function which is not there.

    Args:
        config: the settings.
        reward: whether a function in memory stands in for the `[grader]` section.

    Raises:
        ConfigError: lists every setting whose function cannot be had, and why.
        GraderError: the grader's file cannot be used.
    """
    problems: list[str] = []
    for setting, reference in _functions_of(config, reward=reward):
        try:
            load_function(reference, Path(config.base))
        except ConfigError as error:
            problems.append(f"{setting}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _functions_of(config: RunConfig, *, reward: bool) -> Iterator[tuple[str, str]]:
    """Setting -> what it names."""
    if config.grader is not None and not reward:
        where = f"{config.grader['file']}: " if "file" in config.grader else "grader."
        yield from _of_grader(grader_spec(config.grader, Path(config.base)), where)
    critic: Any = getattr(config.algorithm, "critic", None)
    match getattr(critic, "type", None):
        case "function":
            yield "algorithm.critic.function", critic.function
        case "grader":
            yield from _of_grader(parse_grader(critic.grader), "algorithm.critic.grader.")
    for section in ("algorithm", "warm_start"):
        worked = getattr(getattr(config, section), "worked", None)
        if worked is not None and not worked.startswith("key:"):
            yield f"{section}.worked", worked


def _of_grader(spec: GraderSpec, where: str) -> Iterator[tuple[str, str]]:
    inside = spec.graders if isinstance(spec, Multi | Weighted) else {}
    if isinstance(spec, Function):
        yield f"{where}function", spec.function
    for key, member in inside.items():
        if isinstance(member, Function):
            yield f"{where}graders.{key}.function", member.function
