"""Settings -> a critic. The only module that knows every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from graft.critics.equations import EquationsCritic
from graft.critics.function import FunctionCritic
from graft.critics.grader import GraderCritic
from graft.critics.judge import JudgeCritic
from graft.critics.settings import (
    AnyGrader,
    CriticSettings,
    Equations,
    Function,
    Judge,
    MonteCarlo,
    ProcessRewardModel,
)
from graft.data.functions import load_function
from graft.data.rows import Row
from graft.data.sources import nearest
from graft.errors import ConfigError, DataError
from graft.grading.check import parse_grader
from graft.grading.judge_client import JudgeClient
from graft.grading.schema import GraderSpec
from graft.segments.text_stream import Decode
from graft.types import Chain, Critic, Critique, Grader

if TYPE_CHECKING:
    from graft.rollout.engine import Engine
    from graft.rollout.sampling import SamplingSettings

Service = TypeVar("Service")


@dataclass(frozen=True, slots=True)
class CriticServices:
    """What critics ask for help; each names what it misses. Opened and closed by whoever knows the settings."""

    base: Path = Path()
    """Folder that file names start from."""

    judges: JudgeClient | None = None
    """For `judge`: knows the models of `models_of`."""

    calls_at_once: int = 1
    """Chains that a judge is asked about side by side."""

    open_grader: Callable[[GraderSpec], Grader] | None = None
    """For `grader`."""

    engine: Engine | None = None
    """For `monte_carlo`, like all that follows: the policy's."""

    grader: Grader | None = None
    """Of whole completions."""

    decode: Decode | None = None
    sampling: SamplingSettings | None = None
    seed: int = 0
    device: str = "cpu"
    """Of a process reward model."""


def models_of(settings: CriticSettings) -> list[str]:
    """The judge models that a critic asks itself, as it names them."""
    return [settings.model] if isinstance(settings, Judge) else []


def refuse_rows(settings: CriticSettings, rows: Sequence[Row]) -> None:
    """Refuse rows that lack what the critic shows its judge.

    Raises:
        DataError: says how many, where the first of them is, and which keys it has.
    """
    key = getattr(settings, "reference_key", None)
    lacking = [row for row in rows if key is not None and key not in row.item]
    if lacking:
        raise DataError(
            f"algorithm.critic.reference_key = {key!r}: {len(lacking)} of {len(rows)} rows to train on have no such "
            f"key, the first at {lacking[0].where}. {nearest(str(key), lacking[0].item)}"
        )


def open_critic(settings: CriticSettings, services: CriticServices) -> Critic:
    """What scores thoughts as the settings say.

    Raises:
        ConfigError: a service is missing, or a function cannot be imported.
        ModelError: the process reward model cannot be used.
        GraderError: the grader cannot be opened.
    """
    match settings:
        case Equations():
            return EquationsCritic(
                scale=settings.scale,
                unknown_operand_factor=settings.unknown_operand_factor,
                sum_order=settings.sum_order,
            )
        case Function():
            function = load_function(settings.function, services.base)
            return FunctionCritic(function, scale=settings.scale, timeout_s=settings.timeout_s)
        case AnyGrader():
            open_grader = _needed(services.open_grader, settings, "open_grader")
            return GraderCritic(open_grader(parse_grader(settings.grader)), scale=settings.scale)
        case Judge():
            return _judge(settings, services)
        case ProcessRewardModel():
            return _prm(settings, services)
        case MonteCarlo():
            return _monte_carlo(settings, services)


def ask(critic: Critic, chains: Sequence[Chain], waiting: Callable[[], None] | None = None) -> list[Critique]:
    """Critiques in the order of the chains. Critics that wait for servers call `waiting` now and then, which raises if
    the user wants to stop."""
    if isinstance(critic, JudgeCritic | GraderCritic):
        return critic(chains, waiting=waiting)
    return list(critic(chains))


def _judge(settings: Judge, services: CriticServices) -> Critic:
    return JudgeCritic(
        _needed(services.judges, settings, "judges"),
        settings.model,
        scale=settings.scale,
        form=settings.form,
        judge_overall=settings.overall == "judge",
        instructions=settings.instructions,
        reference_key=settings.reference_key,
        sampling=settings.sampling,
        calls_at_once=services.calls_at_once,
    )


def _prm(settings: ProcessRewardModel, services: CriticServices) -> Critic:
    import torch

    from graft.critics.prm import PRMCritic, load_prm

    folder = services.base / Path(settings.model).expanduser()
    model, tokenizer = load_prm(
        str(folder) if folder.is_dir() else settings.model, torch.device(services.device)
    )
    return PRMCritic(
        model,
        tokenizer,
        scale=settings.scale,
        separator=settings.separator,
        template=settings.template,
        progress=settings.progress,
        label=settings.label,
        batch_size=settings.batch_size,
    )


def _monte_carlo(settings: MonteCarlo, services: CriticServices) -> Critic:
    from graft.critics.monte_carlo import MonteCarloCritic

    return MonteCarloCritic(
        _needed(services.engine, settings, "engine"),
        _needed(services.grader, settings, "grader"),
        _needed(services.decode, settings, "decode"),
        sampling=_needed(services.sampling, settings, "sampling"),
        scale=settings.scale,
        continuations=settings.continuations,
        threshold=settings.threshold,
        seed=services.seed,
    )


def _needed(service: Service | None, settings: CriticSettings, name: str) -> Service:
    if service is None:
        raise ConfigError(f"critic.type = '{settings.type}' needs what is not there: {name}")
    return service
