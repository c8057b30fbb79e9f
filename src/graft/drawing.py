"""Prompts -> trees -> critiques as the algorithm's settings say, with a run's own parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graft.algorithm_settings import GRFT, Sampled
from graft.assemble import Parts, sampling_settings
from graft.memory import memory_errors
from graft.rollout.engine import Finished
from graft.rollout.grow import grow_groups
from graft.rollout.grow_trees import Shape, grow_trees
from graft.thoughts import LeafCritiques, ThoughtCritic
from graft.tree import Tree
from graft.types import Grade, Prompt, Purpose


def draw(
    parts: Parts,
    settings: Sampled,
    prompts: Sequence[Prompt],
    *,
    step: int,
    attempts: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    finished: Finished | None = None,
    max_new_tokens: int | None = None,
) -> list[Tree]:
    """The engine draws a group of completions for each prompt, or groups of candidates at every prefix.

    Args:
        parts: of the run; the engine has the weights.
        settings: of the algorithm.
        prompts: of the step.
        step: its number; keys the random streams.
        attempts: how often each prompt's row was drawn in this step before; None: never.
        progress: see `Engine.grow`.
        finished: see `Engine.grow`; not told of candidates.
        max_new_tokens: instead of the run's own limit.

    Raises:
        ResourceError: memory ran out.
    """
    assert parts.engine is not None
    sampling = sampling_settings(parts.config.sampling)
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    seed = parts.config.seed
    with memory_errors("sampling", "rollout.slots, training.prompts_per_step or sampling.max_new_tokens"):
        if not isinstance(settings, GRFT):
            return grow_groups(
                parts.engine,
                prompts,
                group_size=settings.group_size,
                sampling=sampling,
                seed=seed,
                purpose=Purpose.TRAIN,
                step=step,
                attempts=attempts,
                progress=progress,
                finished=finished,
            )
        assert parts.critic is not None
        assert parts.grader is not None
        critic, grader = parts.critic, parts.grader
        survivors = "all" if settings.shape == "tree" else settings.survivor
        return grow_trees(
            parts.engine,
            prompts,
            shape=Shape(settings.levels, survivors, settings.survivor_temperature),
            begin=critic.begin,
            score=lambda groups: critic.sibling_scores(
                groups, grader, settings.rewards, scale=settings.critic.scale
            ),
            sampling=sampling,
            seed=seed,
            step=step,
            attempts=attempts,
            progress=progress,
        )


def criticise(
    critic: ThoughtCritic,
    settings: Sampled,
    trees: Sequence[Tree],
    grades: Sequence[Mapping[int, Grade]],
    *,
    max_failure_rate: float,
) -> tuple[Sequence[Tree], Sequence[Mapping[int, Grade]], Sequence[LeafCritiques]]:
    """Completions become chains of thoughts, and a critic scores them, where the algorithm asks for it.

    Returns:
        trees, grades by their leaves, critiques (empty where nothing asks for them).

    Raises:
        GraderError: the critic failed on more than `max_failure_rate` of the completions.
    """
    if isinstance(settings, GRFT) and settings.score == "outcome":
        return trees, grades, ()
    if not isinstance(settings, GRFT):  # whose trees grow as thoughts
        trees, grades = critic.cut(trees, grades)
    return trees, grades, critic.criticise(trees, grades, max_failure_rate=max_failure_rate)
