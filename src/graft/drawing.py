"""Prompts -> trees -> critiques as the algorithm's settings say, with a run's own parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graft.algorithm_settings import GRFT, OnTrees, Sampled
from graft.assemble import Parts, sampling_settings
from graft.memory import memory_errors
from graft.rollout.engine import Finished
from graft.rollout.grow import grow_groups
from graft.rollout.grow_trees import Score, Shape, grow_trees
from graft.thoughts import Asked, LeafCritiques, ThoughtCritic
from graft.tree import Grown, Tree
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
    asked: Asked | None = None,
) -> tuple[Sequence[Tree], Sequence[Grown]]:
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
        asked: is told what critic and grader say of candidates while their trees grow.

    Returns:
        trees, and how each grew where groups stand at every prefix (else empty).

    Raises:
        ResourceError: memory ran out.
    """
    assert parts.engine is not None
    sampling = sampling_settings(parts.config.sampling)
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    seed = parts.config.seed
    with memory_errors("sampling", "rollout.slots, training.prompts_per_step or sampling.max_new_tokens"):
        if not isinstance(settings, OnTrees):
            trees = grow_groups(
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
            return trees, []
        assert parts.critic is not None
        grown = grow_trees(
            parts.engine,
            prompts,
            shape=shape_of(settings),
            begin=parts.critic.begin,
            score=score_of(parts, settings, asked or Asked()),
            sampling=sampling,
            seed=seed,
            step=step,
            attempts=attempts,
            progress=progress,
        )
        return [own.tree for own in grown], grown


def score_of(parts: Parts, settings: OnTrees, asked: Asked) -> Score:
    """What candidates are chosen or drawn anew by, while a tree grows."""
    assert parts.critic is not None
    assert parts.grader is not None
    critic, grader = parts.critic, parts.grader

    def score(groups: Sequence[tuple[Tree, Sequence[int]]]) -> Sequence[Sequence[float | None]]:
        assert isinstance(settings, GRFT)  # the others go on from all, and draw once
        return critic.sibling_scores(
            groups, grader, settings.rewards, scale=settings.critic.scale, asked=asked
        )

    return score


def shape_of(settings: OnTrees) -> Shape:
    """How the trees of an algorithm branch."""
    if not isinstance(settings, GRFT):
        return Shape(settings.branching, "all")
    survivors = "all" if settings.shape == "tree" else settings.survivor
    separately = settings.compare == "separately"
    return Shape(settings.levels, survivors, settings.survivor_temperature, settings.max_draws, separately)


def criticise(
    critic: ThoughtCritic,
    settings: Sampled,
    trees: Sequence[Tree],
    grades: Sequence[Mapping[int, Grade]],
    *,
    max_failure_rate: float,
    waiting: Callable[[], None] | None = None,
) -> tuple[Sequence[Tree], Sequence[Mapping[int, Grade]], Sequence[LeafCritiques]]:
    """Completions become chains of thoughts, and a critic scores them, where the algorithm asks for it. `waiting` is
    called now and then while a server is waited for, and raises if the user wants to stop.

    Returns:
        trees, grades by their leaves, critiques (empty where nothing asks for them).

    Raises:
        GraderError: the critic failed on more than `max_failure_rate` of the completions.
    """
    if critic.critic is None or (isinstance(settings, GRFT) and not settings.asks_critic):
        return trees, grades, ()
    if not isinstance(settings, OnTrees):  # whose trees grow as thoughts
        trees, grades = critic.cut(trees, grades)
    found = critic.criticise(trees, grades, max_failure_rate=max_failure_rate, waiting=waiting)
    return trees, grades, found
