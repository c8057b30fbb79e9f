"""What a run measures on its held-out rows, with its own engine, grader and policy, and when it stops for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from graft.algorithm_settings import SFT
from graft.assemble import Parts, load_worked, sampling_settings
from graft.data.worked import worked_trees
from graft.evaluation import Evaluation, evaluate
from graft.held_out_loss import after_loss, having_worked, held_out_loss
from graft.memory import memory_errors
from graft.phases import Phase
from graft.state.run_state import RunState
from graft.step_records import Validation
from graft.types import Prompt


def evaluate_held_out(
    parts: Parts, prompts: Sequence[Prompt], *, progress: Callable[[int], None], waiting: Callable[[], None]
) -> Evaluation:
    """Sample and grade rows with the weights that the engine has.

    Raises:
        GraderError, ResourceError: as `evaluation.evaluate`; memory ran out.
    """
    assert parts.engine is not None
    assert parts.grader is not None
    config = parts.config
    with memory_errors("the evaluation", "rollout.slots or sampling.max_new_tokens"):
        return evaluate(
            parts.engine,
            prompts,
            parts.grader,
            parts.encoder.decode,
            samples=config.evaluation.samples,
            sampling=sampling_settings(config.sampling, temperature=config.evaluation.temperature),
            threshold=config.evaluation.threshold,
            seed=config.seed,
            max_failure_rate=config.grading.max_failure_rate,
            progress=progress,
            waiting=waiting,
        )


def validate_held_out(
    parts: Parts, phase: Phase, *, progress: Callable[[int], None] | None = None
) -> Validation | None:
    """The loss on worked completions of held-out rows: whenever it is measured, of the same rows.

    Returns:
        None where the phase has no such loss, or no held-out row a worked completion.

    Raises:
        DataError, ResourceError: a worked completion cannot be made; memory ran out.
    """
    settings, config = phase.settings, parts.config
    if not phase.validates or not isinstance(settings, SFT):
        return None
    prompts = having_worked(parts.held_out[: config.evaluation.rows], settings.worked)
    if not prompts:
        return None
    trees = worked_trees(prompts, load_worked(settings.worked, Path(config.base)), parts.encoder)
    with memory_errors("the validation loss", "training.microbatch_tokens"):
        loss = held_out_loss(
            parts.forward,
            trees,
            settings,
            temperature=config.sampling.temperature,
            microbatch_tokens=config.training.microbatch_tokens,
            progress=progress,
        )
    return Validation(loss, len(prompts))


def early_stop(state: RunState, phase: Phase, loss: float) -> str | None:
    """Note a validation loss in the state.

    Returns:
        why the phase shall end, for people; None where it goes on.
    """
    settings = phase.early_stopping
    if settings is None:
        return None
    watched = after_loss(
        state.validation.get(phase.stage), loss, minimum_improvement=settings.minimum_improvement
    )
    state.validation[phase.stage] = watched
    if watched["waited"] < settings.patience:
        return None
    return (
        f"the validation loss is {loss:.4g} nats a token, and none of the last {settings.patience} measurements was "
        f"lower than the {watched['best']:.4g} before them by more than {settings.minimum_improvement:g}"
    )
