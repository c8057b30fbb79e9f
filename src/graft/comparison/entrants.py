"""Who takes part in a comparison, and with which settings. Imports no torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.algorithm_rollouts import SPOTree
from graft.algorithm_settings import GRFT, SFT
from graft.config import RunConfig
from graft.config_file import check_config, section_at, set_override
from graft.errors import ConfigError

MEASUREMENTS = 10
"""Parts into which measurements cut the budget where the settings do not say when to measure."""

OWN_SECTIONS = ("algorithm", "optimizer")
"""Sections in which variants may differ; everything else is shared, so that like is compared with like."""

OWN_KEYS = ("training.prompts_per_step",)

LENGTHS = ("steps", "epochs", "generated_tokens")

DRAWS_NOTHING = {SFT.model_fields["name"].default}
"""Algorithms without a budget of generated tokens: they keep the steps or epochs of the settings."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NEXT_KEY = re.compile(r",(?=\s*[a-z_]+(?:\.[a-z_]+)+\s*=)")


@dataclass(frozen=True, slots=True)
class Entrant:
    """One line of the comparison."""

    label: str
    overrides: tuple[str, ...]
    """`a.b=c`, as after `--set`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entrant with its settings for one seed."""

    label: str
    seed: int
    config: RunConfig
    left_out: tuple[str, ...]
    """Settings of `[algorithm]` in the file that mean nothing to this algorithm."""


def read_entrants(algorithms: str | None, variants: Sequence[str]) -> list[Entrant]:
    """Who takes part.

    Args:
        algorithms: names with commas between, `grpo,dapo`.
        variants: `LABEL:algorithm.key=value,optimizer.key=value`; a value may hold commas, as `[4, 4, 4]`.

    Raises:
        ConfigError: none is named, a label is malformed or stands twice, or a variant changes what all share.
    """
    names = [name.strip() for name in (algorithms or "").split(",") if name.strip()]
    entrants = [Entrant(name, (f"algorithm.name={name}",)) for name in names] + [
        _variant(v) for v in variants
    ]
    if not entrants:
        raise ConfigError(
            "nobody to compare: give --algorithms grpo,... or --variant LABEL:algorithm.key=value"
        )
    for entrant in entrants:
        if not _LABEL.fullmatch(entrant.label):
            raise ConfigError(
                f"'{entrant.label}' cannot name a line of the comparison: want letters, digits, '.', '_' and '-'"
            )
    labels = [entrant.label for entrant in entrants]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"'{twice[0]}' stands twice: give each line of the comparison a label of its own")
    return entrants


def _variant(text: str) -> Entrant:
    label, separator, changes = text.partition(":")
    overrides = tuple(part.strip() for part in _NEXT_KEY.split(changes) if part.strip())
    if not separator:
        raise ConfigError(f"--variant {text}: want LABEL:algorithm.key=value,...")
    for override in overrides:
        key = override.partition("=")[0].strip()
        length = key in {
            f"training.{name}" for name in ("steps", "epochs")
        }  # refused later where tokens decide
        if not (key.split(".")[0] in OWN_SECTIONS or key in OWN_KEYS or length):
            raise ConfigError(
                f"--variant {label}: '{key}' is the same for all; a variant may differ in "
                f"{', '.join([*(f'{section}.*' for section in OWN_SECTIONS), *OWN_KEYS])}. For all: --set {override}"
            )
    return Entrant(label.strip(), overrides)


def entry_of(
    settings: Mapping[str, Any], entrant: Entrant, *, tokens: int | None, seed: int, run: str, where: str
) -> Entry:
    """An entrant's checked settings.

    What the file's `[algorithm]` gives is kept as far as the entrant's algorithm takes it.

    Args:
        settings: of the file, with overrides, not checked.
        entrant: who.
        tokens: the budget; None: `training.generated_tokens` of the settings.
        seed: of the run.
        run: its folder.
        where: names the settings in messages.

    Raises:
        ConfigError: a setting is refused, or there is no budget, or nothing to measure on.
    """
    where = f"{where}, '{entrant.label}'"
    data = copy.deepcopy(dict(settings))
    given = data.get("algorithm", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: algorithm: want a section, got {given!r}")
    wanted: dict[str, Any] = {"algorithm": {"name": given.get("name", "grpo")}}
    for override in entrant.overrides:
        set_override(wanted, override)
    own = wanted["algorithm"]
    name = own["name"]
    data["algorithm"], left_out = fitting({k: v for k, v in given.items() if k != "name"}, own)
    data["algorithm"]["name"] = name
    for override in entrant.overrides:
        set_override(data, override)
    _set_length(data, str(name), tokens, entrant, where)
    config = check_config({**data, "seed": seed, "run": run}, where=where)
    if config.grader is None:
        raise ConfigError(
            f"{where}: a comparison measures held-out rows, for which it needs a [grader] section"
        )
    if not config.data.held_out and config.data.held_out_source is None:
        raise ConfigError(
            f"{where}: data.held_out = 0: a comparison measures held-out rows, e.g. --set data.held_out=200"
        )
    return Entry(entrant.label, seed, config, tuple(left_out))


def fitting(table: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What an entrant keeps of the file's `[algorithm]`.

    Args:
        table: that section, without its name.
        own: the entrant's own settings, its `name` among them.

    Returns:
        the settings that mean something to it, and the dotted names of the others.
    """
    algorithm = str(own["name"])

    def fit(values: Mapping[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
        section = section_at(path, {"algorithm": {"name": algorithm}})
        known = section.model_fields if section is not None else {}
        kept: dict[str, Any] = {}
        left_out: list[str] = []
        for key, value in values.items():
            if key not in known:
                left_out.append(".".join((*path, key)))
            elif isinstance(value, dict) and section_at((*path, key), {"algorithm": {"name": algorithm}}):
                kept[key], inner = fit(value, (*path, key))
                left_out += inner
            else:
                kept[key] = value
        return kept, left_out

    kept, left_out = fit(table, ("algorithm",))
    idle: set[str] = set()
    if algorithm == GRFT.model_fields["name"].default:
        idle = set(GRFT.without_meaning({**kept, **own}))
    elif algorithm == SPOTree.model_fields["name"].default:
        idle = {"group_size"}
    left_out += [f"algorithm.{key}" for key in kept if key in idle]
    return {key: value for key, value in kept.items() if key not in idle}, left_out


def _set_length(
    data: dict[str, Any], algorithm: str, tokens: int | None, entrant: Entrant, where: str
) -> None:
    """Give a run the budget, or leave it its steps where it draws nothing."""
    training = data.setdefault("training", {})
    budget = tokens if tokens is not None else training.get("generated_tokens")
    if algorithm in DRAWS_NOTHING:
        training.pop("generated_tokens", None)
        data.get("evaluation", {}).pop("every_generated_tokens", None)
        data.get("report", {}).pop("kl_every", None)
        if not {"steps", "epochs"} & set(training):
            raise ConfigError(
                f"{where}: '{algorithm}' draws no tokens, so that no budget ends it: give training.steps or epochs, "
                f"e.g. --variant {entrant.label}:algorithm.name={algorithm},training.steps=40"
            )
        return
    if budget is None:
        raise ConfigError(f"{where}: how long? Give --tokens N, tokens to generate for training in each run")
    if any(override.startswith(("training.steps", "training.epochs")) for override in entrant.overrides):
        raise ConfigError(
            f"{where}: the budget of generated tokens ends '{algorithm}'; take training.steps out"
        )
    for name in LENGTHS:
        training.pop(name, None)
    training["generated_tokens"] = budget
    evaluation = data.setdefault("evaluation", {})
    evaluation.pop("every", None)  # in steps, which cost one algorithm more tokens than another
    evaluation.setdefault("every_generated_tokens", max(1, budget // MEASUREMENTS))
