"""From settings to a grader: its file, judge servers and keys, the sandbox. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from graft.config import Grading, Judge
from graft.data.rows import PROBLEMS_SHOWN, Row
from graft.errors import ConfigError, DataError
from graft.grading.build import BuiltGrader, Services, build_grader
from graft.grading.check import parse_grader, read_grader
from graft.grading.function import FunctionGrader
from graft.grading.judge import EMBEDDING_MODEL
from graft.grading.judge_client import AnswersOnDisk, JudgeClient, JudgeServer
from graft.grading.multi import zero_failures
from graft.grading.observe import Observer
from graft.grading.pace import Pace
from graft.grading.row_checks import check_rows, members_of
from graft.grading.sandbox import Sandbox, SandboxLimits
from graft.grading.schema import CodeTests, GraderSpec, LabelModel, Python, ScoreModel, TextSimilarity
from graft.pull import default_cache
from graft.types import Grader

FUNCTION_TIMEOUT_S = 60.0
"""Longest time for one call of a reward function in memory."""

NEAR = 0.75
"""From this likeness (difflib) on, a judge's name is taken for a slip of another: `jugde` and `judge` have 0.8,
`gpt-4o` and `gpt-4o-mini` 0.7."""


def grader_spec(settings: Mapping[str, Any], base: Path) -> GraderSpec:
    """The grader that the `[grader]` section describes or names.

    Raises:
        GraderError: its file cannot be used; the message lists every problem with its line.
    """
    if "file" in settings:
        return read_grader(base / Path(settings["file"]).expanduser())
    return parse_grader(settings)


def open_grader(
    spec: GraderSpec, grading: Grading, *, base: Path, any_json: bool = False, zero: bool | None = None
) -> BuiltGrader:
    """What judges as a specification says, with the servers and the sandbox that it needs.

    Args:
        spec: of `grader_spec`.
        grading: how it is run.
        base: folder that file names start from.
        any_json: fill `output_json` wherever a completion is JSON.
        zero: whether failures of ours score 0; None: as the settings say.

    Raises:
        ConfigError: a key or a function is missing.
        GraderError: a library, a server or the sandbox is missing.
        DataError: the response format is malformed.
    """
    observe = Observer(grading.response_format, any_json=any_json)
    models = models_of(spec)
    with ExitStack() as opened:
        judges = None
        if models:
            judges = open_judges(grading.judge, models)
            opened.callback(judges.close)
        sandbox = None
        if any(isinstance(member, Python | CodeTests) for member in members_of(spec)):
            sandbox = _open_sandbox(grading, opened)
        services = Services(
            base=base,
            judges=judges,
            run_grade=None if sandbox is None else sandbox.run_grade,
            run_tests=None if sandbox is None else sandbox.run_tests,
            sandbox_workers=grading.sandbox.workers,
            calls_at_once=grading.concurrency,
        )
        zero = grading.failures == "zero" if zero is None else zero
        grader = build_grader(spec, services, observe, zero=zero)
        opened.callback(grader.close)
        return BuiltGrader(grader, calls_at_once=grader.calls_at_once, held=opened.pop_all())


def grader_of_function(reward: Callable[..., Any], grading: Grading) -> BuiltGrader:
    """A grader around a function in memory.

    Raises:
        GraderError: it does not take completion and item.
    """
    grader: Grader = FunctionGrader(reward, timeout_s=FUNCTION_TIMEOUT_S)
    if grading.failures == "zero":
        grader = zero_failures(grader)
    return BuiltGrader(grader, calls_at_once=1, held=ExitStack())


def refuse_rows(
    spec: GraderSpec, rows: Sequence[Row], response_format: Mapping[str, Any] | None = None
) -> None:
    """Refuse rows that lack what the grader reads.

    Raises:
        DataError: lists the first ten problems.
    """
    problems = list(check_rows(spec, rows, response_format))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        raise DataError(
            f"the grader cannot judge these rows:\n{listed}"
            + (f"\n  and {more} more problems" if more > 0 else "")
        )


def models_of(spec: GraderSpec) -> list[str]:
    """The judge and embedding models that a grader asks, as it names them."""
    members = members_of(spec)
    models = [member.model for member in members if isinstance(member, ScoreModel | LabelModel)]
    embeds = any(isinstance(m, TextSimilarity) and m.evaluation_metric == "cosine" for m in members)
    return list(dict.fromkeys([*models, *([EMBEDDING_MODEL] if embeds else [])]))


def judges_of(settings: Mapping[str, Any] | None, base: Path) -> list[str]:
    """The same of a `[grader]` section."""
    return [] if settings is None else models_of(grader_spec(settings, base))


def open_judges(settings: Judge, models: Sequence[str]) -> JudgeClient:
    """A client for these models.

    A name that is nearly one of `grading.judge.models` is refused: the rows would go to another server than meant.

    Raises:
        ConfigError: the environment variable of a key is not set, or a name looks like a slip.
        GraderError: the openai library is missing.
    """
    named = [model for model in models if model in settings.models]
    needs_default = [model for model in models if model not in settings.models and model != EMBEDDING_MODEL]
    default = None
    for model in needs_default:
        _refuse_slip(model, settings)
    if needs_default:
        key = _key(settings.api_key_env, "grading.judge.api_key_env", needs_default[0], settings.base_url)
        default = JudgeServer(settings.base_url, key, "")
    servers = {}
    for model in named:
        own = settings.models[model]
        url = own.base_url or settings.base_url
        variable = settings.api_key_env if own.api_key_env is None else own.api_key_env
        where = f'grading.judge.models."{model}".api_key_env'
        servers[model] = JudgeServer(url, _key(variable, where, model, url), own.model or model)
    rate = settings.requests_per_minute
    return JudgeClient(
        default,
        servers,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        pace=Pace(None if rate is None else rate / 60),
        cache=AnswersOnDisk(default_cache() / "judges") if settings.cache else None,
    )


def _refuse_slip(model: str, settings: Judge) -> None:
    near = get_close_matches(model, settings.models, n=1, cutoff=NEAR)
    if near:
        raise ConfigError(
            f"a grader or a critic asks the model '{model}', which [grading.judge.models] does not name. Did you mean "
            f"'{near[0]}'? If '{model}' shall be asked at {settings.base_url}, name it there too: "
            f'[grading.judge.models."{model}"] without any keys.'
        )


def _key(variable: str, setting: str, model: str, url: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"a grader or a critic asks the model '{model}' at {url}; its key is read from the environment variable "
            f"{variable}, which is not set. Set it, name another with {setting}, or give {setting} = "
            '"" where none is wanted.'
        )
    return key


def _open_sandbox(grading: Grading, opened: ExitStack) -> Sandbox:
    settings = grading.sandbox
    limits = SandboxLimits(**{field.name: getattr(settings, field.name) for field in fields(SandboxLimits)})
    sandbox = Sandbox(workers=settings.workers, limits=limits, unsafe=settings.unsafe)
    opened.callback(sandbox.close)
    return sandbox
