"""Prompts -> trees: who asks the engine for what, and hangs the results into trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graft.rollout.engine import Continuation, Engine, Finished
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.tree import ROOT, Kind, Tree
from graft.types import Prompt, Purpose


def grow_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    sampling: SamplingSettings,
    seed: int,
    purpose: Purpose,
    step: int,
    attempts: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    finished: Finished | None = None,
) -> list[Tree]:
    """One tree a prompt, with a group of `group_size` whole completions below its root.

    Args:
        engine: what samples.
        prompts: the states to go on from.
        group_size: completions for each prompt.
        sampling: their distribution.
        seed: of the run; with purpose, step, row and attempt it keys the random streams: prompts of one row with equal
            attempts would get equal samples.
        purpose: training or evaluation.
        step: optimiser step; the same number gives the same random streams.
        attempts: how often each prompt's row was drawn in this step before; None: never.
        progress: see `Engine.grow`.
        finished: see `Engine.grow`.
    """
    keys = [
        [stream_key(seed, purpose, step, prompt.row, attempt, place) for place in range(group_size)]
        for prompt, attempt in zip(prompts, attempts or [0] * len(prompts), strict=True)
    ]
    prefixes = [prompt.tokens for prompt in prompts]
    grown = engine.grow(prefixes, keys, sampling, progress=progress, finished=finished)
    training = purpose is Purpose.TRAIN
    return [_hang(prompt, own, with_kept=training) for prompt, own in zip(prompts, grown, strict=True)]


def _hang(prompt: Prompt, continuations: Sequence[Continuation], *, with_kept: bool) -> Tree:
    """A tree of whole completions; only training needs to know which tokens could have been drawn."""
    tree = Tree(prompt)
    group = tree.new_group()
    for c in continuations:
        kept = c.kept if with_kept else None
        tree.add(ROOT, c.tokens, c.logprobs, group=group, kind=Kind.COMPLETION, stop=c.stop, kept=kept)
    return tree
