"""A few trees through the trainer of a phase, with the phase's own settings, to see how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from graft.algorithm_settings import SFT, Sampled
from graft.algorithms import ALGORITHMS
from graft.assemble import Parts, load_worked
from graft.config import RunConfig
from graft.crediting import Evidence, StepCredit
from graft.data.cursor import PromptCursor
from graft.data.worked import worked_trees
from graft.memory import memory_errors
from graft.phases import Phase
from graft.trainer import UPDATE_MEMORY, Trainer, everything, penalised
from graft.tree import Tree
from graft.types import Appraisal, Credit, Prompt
from graft.update.packing import pack
from graft.workload import keeps_rollout, scorings

UPDATE_SECONDS = 12.0
"""No further optimiser step begins after so long; of the later half of those made in each phase the median counts,
since memory that is touched for the first time slows the first ones."""

MAX_UPDATES = 6

REHEARSAL_SECONDS = 60.0
"""No further step of a warm start begins after so long."""

T = TypeVar("T")


class _KeptInMemory:
    """The trial's KL anchor needs no copy on disk."""

    def save_anchor(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def load_anchor(self) -> Mapping[str, torch.Tensor]:
        return self._weights


@dataclass(frozen=True, slots=True)
class TriedUpdate:
    """What a few optimiser steps of one phase showed: seconds and bytes."""

    train_token: float
    score_token: float
    anchor_token: float
    optimizer: float
    """One step."""

    trained: int
    """Of what trains."""

    copies: int
    """Of weights besides the policy's: the anchor's, those of the value model's trunk, and older ones that sample."""

    checkpoint: int
    """What trains, two moments of each, and the older weights."""

    microbatch: int
    """Tokens of the largest."""


def try_update(parts: Parts, phase: Phase, trees: Sequence[Tree]) -> TriedUpdate:
    """What the phase's trainer takes for the first of these trees, at learning rate 0."""
    once = {name: 1 for name in ("updates_per_batch", "minibatches") if hasattr(phase.settings, name)}
    phase = replace(phase, settings=phase.settings.model_copy(update=once))
    settings = phase.settings
    with memory_errors("the update", UPDATE_MEMORY):
        trainer = Trainer(parts, phase, _KeptInMemory(), done=0, restored=None)
        trees = _few(parts, trees)
        whole = [everything(tree) for tree in trees]
        tokens, microbatch = read_tokens(parts, trees)
        old = isinstance(settings, Sampled) or phase.validates
        own = [Appraisal()] * len(trees)
        score_seconds = anchor_seconds = 0.0
        if old and _is_scored(parts.config, phase):
            score_seconds, own = _timed(lambda: trainer.appraise(trees, whole, old=True))
        if trainer.anchor is not None:
            anchor_seconds, _ = _timed(lambda: trainer.appraise(trees, whole, anchor=True))
            own = trainer.appraise(trees, whole, old=True, anchor=True)
        elif penalised(phase):
            own = trainer.appraise(trees, whole, old=True, anchor=True)
        credits = [_some_credit(each, values=trainer.value is not None) for each in whole]
        rates = dict.fromkeys(trainer.learning_rates(1, 0), 0.0)
        number = 1 + (0 if trainer.value_settings is None else trainer.value_settings.warmup_steps)

        def update(each: Sequence[Credit]) -> None:
            credit = StepCredit(each, 0, 0, [1.0] * len(trees))
            trainer.update(number, rates, trees, credit, own, progress=None, where="the trial")

        update(credits)  # makes room for gradients and moments
        idle = [Credit({}, {}, {}, {})] * len(trees)
        optimizer = median(_timed(lambda: update(idle))[0] for _ in range(3))
        timed: list[float] = []
        began = time.perf_counter()
        while not timed or (len(timed) < MAX_UPDATES and time.perf_counter() - began < UPDATE_SECONDS):
            timed.append(_timed(lambda: update(credits))[0])
    trained = bytes_of(trainer.parameters().values())
    copies = 0 if trainer.anchor is None else bytes_of(trainer.anchor.model.parameters())
    if trainer.value is not None:
        copies += bytes_of(trainer.value.parameters())
    older = trained if keeps_rollout(phase) else 0
    return TriedUpdate(
        train_token=max(0.0, median(timed[len(timed) // 2 :]) - optimizer) / tokens,
        score_token=score_seconds / tokens,
        anchor_token=anchor_seconds / tokens,
        optimizer=optimizer,
        trained=trained,
        copies=copies + older,
        checkpoint=3 * trained + older,
        microbatch=microbatch,
    )


def rehearse(parts: Parts, phase: Phase) -> int:
    """Train the policy as a phase that trains on worked completions does, as long as there is time.

    Returns:
        steps made.
    """
    settings, steps = phase.settings, phase.steps
    assert isinstance(settings, SFT)
    assert steps is not None
    cursor = PromptCursor(
        len(parts.train), seed=parts.config.seed, shuffle=parts.config.data.shuffle, epochs=None
    )
    credit = ALGORITHMS[settings.name].credit
    began = time.perf_counter()
    with memory_errors("the update", UPDATE_MEMORY):
        trainer = Trainer(parts, phase, _KeptInMemory(), done=0, restored=None)
        for done in range(steps):
            if time.perf_counter() - began > REHEARSAL_SECONDS:
                return done
            prompts = [parts.train[place] for place in cursor.take(phase.rows_per_step)]
            trees = worked_out(parts, settings, prompts)
            trainer.update(
                done + 1,
                trainer.learning_rates(done + 1, 0),
                trees,
                credit(Evidence(trees), settings),
                None,
                progress=None,
                where=f"the trial, warm start step {done + 1}",
            )
    return steps


def worked_out(parts: Parts, settings: SFT, prompts: Sequence[Prompt]) -> list[Tree]:
    """The rows' own completions."""
    return worked_trees(prompts, load_worked(settings.worked, Path(parts.config.base)), parts.encoder)


def _is_scored(config: RunConfig, phase: Phase) -> bool:
    """Whether the run ever asks the policy without training it."""
    return phase.validates or scorings(config, phase, 10**9)[0] > 0


def _some_credit(whole: Credit, *, values: bool) -> Credit:
    """Every token trains, with numbers that hardly matter at a learning rate of 0."""
    small = {node: 1e-3 * own for node, own in whole.weights.items()}
    targets = whole.advantages if values else {}
    return Credit(whole.advantages, small, targets, small if values else {})


def _few(parts: Parts, trees: Sequence[Tree]) -> Sequence[Tree]:
    """The first trees, of two micro-batches or a little more."""
    taken: list[Tree] = []
    while len(taken) < len(trees):
        taken.append(trees[len(taken)])
        if read_tokens(parts, taken)[0] >= (2 * parts.config.training.microbatch_tokens):
            break
    return taken


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    found = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def read_tokens(
    parts: Parts, trees: Sequence[Tree], credits: Sequence[Credit] | None = None
) -> tuple[int, int]:
    """Tokens that the network reads of these trees, all or what trains, and those of the largest micro-batch."""
    if credits is None:
        credits = [everything(tree) for tree in trees]
    packed = pack(trees, credits, token_budget=parts.config.training.microbatch_tokens)
    sizes = [len(batch.tokens) for batch in packed]
    return sum(sizes), max(sizes, default=0)


def read_share_of(parts: Parts, trees: Sequence[Tree]) -> float:
    """Tokens of completions that the network reads, of all that they have."""
    read = read_tokens(parts, trees)[0]
    completions = sum(len(node) for tree in trees for node in tree.nodes[1:])
    return (read - sum(len(tree.prompt.tokens) for tree in trees)) / completions


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
