"""What trains during one phase of a run: policy, value model, KL anchor, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from graft.algorithm_settings import Sampled, Value
from graft.algorithms import ALGORITHMS
from graft.assemble import Parts, build_forward, frozen_copy
from graft.crediting import StepCredit
from graft.errors import CheckpointError
from graft.memory import memory_errors
from graft.model import plain_state
from graft.objective.kl import EXACT
from graft.phases import Phase
from graft.report.metrics import Stage
from graft.state import checkpoint
from graft.state.checkpoint import Checkpoint
from graft.tree import Tree
from graft.types import Appraisal, Credit
from graft.update.head import AnchorHead
from graft.update.packing import MicroBatch, pack
from graft.update.policy import PolicyForward
from graft.update.rollout_weights import RolloutWeights
from graft.update.step import (
    POLICY,
    VALUE,
    LossOf,
    StepResult,
    ValueTerm,
    learning_rate_at,
    learning_rate_by_share,
    make_moments,
    optimise,
    policy_loss,
    value_only_loss,
)
from graft.update.value import ValueModel


class AnchorStore(Protocol):
    """Keeps the anchor's weights for a run that is resumed: `state.checkpoint.Checkpoints`."""

    def save_anchor(self, weights: Mapping[str, Tensor]) -> None: ...

    def load_anchor(self) -> Mapping[str, Tensor]: ...


UPDATE_MEMORY = "training.microbatch_tokens, or set model.gradient_checkpointing = true"


class Trainer:
    """Appraises trees with networks that stand still, and moves those that train."""

    def __init__(
        self, parts: Parts, phase: Phase, checkpoints: AnchorStore, *, done: int, restored: Checkpoint | None
    ) -> None:
        """
        Args:
            parts: of the run; the policy holds the weights that the phase goes on from.
            phase: what trains and how.
            checkpoints: where the anchor's weights are kept.
            done: steps of the phase that are done.
            restored: the checkpoint that the phase goes on from, if it does not start here.
        """
        self.parts, self.phase = parts, phase
        self.temperature = parts.config.sampling.temperature
        self.value_settings: Value | None = getattr(phase.settings, "value", None)
        self.value = self._open_value()
        self.forward = PolicyForward(parts.forward.model, parts.forward.precision, self.value)
        self.anchor = self._open_anchor(checkpoints, done)
        self.exact_kl = asks_exact_kl(phase)
        self._rollout_head: Tensor | None = None
        self.optimizer = self._open_optimizer()
        if done and restored is not None:
            if self.value is not None:
                checkpoint.load_parameters(self.value, restored.values)
            checkpoint.load_optimizer_tensors(self.optimizer, self.parameters(), restored.optimizer)
        self.moved = False
        """Whether weights have moved in a step that the run has not counted yet."""
        self.refresh_every = phase.settings.refresh_every if isinstance(phase.settings, Sampled) else 1
        self._rollout = RolloutWeights(self.parameters())
        if self.age(done + 1):
            assert restored is not None
            self._restore_rollout(restored)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Everything that trains, by name, in the order of the optimiser."""
        policy = checkpoint.trainable_parameters(self.parts.policy.model)
        value = {} if self.value is None else checkpoint.trainable_parameters(self.value)
        return policy | {f"{VALUE}.{name}": parameter for name, parameter in value.items()}

    def age(self, number: int) -> int:
        """Steps between the weights that step `number` samples with and those that it trains; the first step is 1."""
        return (number - 1) % self.refresh_every

    def as_sampled(self, number: int) -> AbstractContextManager[None]:
        """While entered, policy and value model hold the weights that step `number` samples with."""
        return self._rollout.in_place() if self.age(number) else nullcontext()

    def rollout_weights(self, number: int) -> Mapping[str, Tensor]:
        """The weights that step `number` samples with, where they are older than those that it trains; else empty."""
        return self._rollout.tensors if self.age(number) else {}

    def appraise(
        self,
        trees: Sequence[Tree],
        trained: Sequence[Credit],
        *,
        old: bool = False,
        anchor: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Appraisal]:
        """What networks say of the trained nodes' tokens before anything moves.

        They are packed as for the update, minibatch by minibatch, so that the ratio of a policy that has not moved is 1
        to the bit.

        Args:
            trees: of the step.
            trained: names the nodes; only the keys of `weights` matter.
            old: whether the policy is asked (and the value model, if there is one).
            anchor: whether the KL anchor is asked.
            progress: called after each micro-batch with its tokens.
        """
        appraisals = [Appraisal({}, {}, {}, {}, {}) for _ in trees]
        with memory_errors("the update", UPDATE_MEMORY), torch.no_grad():
            if anchor and self.exact_kl and anchored_on_rollout(self.phase):
                self._rollout_head = self.forward.head_weight.detach().clone()
            parts = dealt(trained, getattr(self.phase.settings, "minibatches", 1))
            for batch in (batch for part in parts for batch in self.pack(trees, part)):
                self._appraise_batch(batch, appraisals, old=old, anchor=anchor)
                if progress is not None:
                    progress(len(batch.tokens))
        return appraisals

    def _appraise_batch(
        self, batch: MicroBatch, appraisals: Sequence[Appraisal], *, old: bool, anchor: bool
    ) -> None:
        """Hand the nodes of a micro-batch what the networks say of them."""
        settings, temperature = self.phase.settings, self.temperature
        on_rollout = anchored_on_rollout(self.phase)
        states = self.forward.states(batch) if old or (anchor and on_rollout) else None
        beside = None
        if anchor:
            asked = self.forward if on_rollout else self.anchor
            assert asked is not None
            own = asked.states(batch) if states is None or not on_rollout else states
            if not on_rollout:
                scores = asked.score(own, batch, temperature=temperature)
                _put(batch, scores.logprobs, [each.anchor_logprobs for each in appraisals])
            if self.exact_kl:
                beside = AnchorHead(own, asked.head_weight)
                if isinstance(settings, Sampled) and settings.kl.in_loss:
                    tokens = own.index_select(0, batch.predictions)
                    _put(batch, tokens, [each.anchor_states for each in appraisals])
        if states is None:
            return
        scores = self.forward.score(states, batch, temperature=temperature, anchor=beside)
        _put(batch, scores.logprobs, [each.old_logprobs for each in appraisals])
        if anchor and on_rollout:
            _put(batch, scores.logprobs, [each.anchor_logprobs for each in appraisals])
        if scores.kl is not None:
            _put(batch, scores.kl, [each.kl for each in appraisals])
        if scores.values is not None:
            _put(batch, scores.values, [each.old_values for each in appraisals])

    def pack(
        self,
        trees: Sequence[Tree],
        credits: Sequence[Credit],
        appraisals: Sequence[Appraisal] | None = None,
    ) -> list[MicroBatch]:
        """Flat rows with every span once, on the model's device."""
        budget = self.parts.config.training.microbatch_tokens
        batches = pack(trees, credits, token_budget=budget, appraisals=appraisals)
        return [batch.to(self.parts.device) for batch in batches]

    def update(
        self,
        number: int,
        rates: Mapping[str, float],
        trees: Sequence[Tree],
        credit: StepCredit,
        appraisals: Sequence[Appraisal] | None,
        *,
        progress: Callable[[int], None] | None,
        where: str,
    ) -> StepResult:
        """All optimiser steps on one batch, merged into one result.

        Args:
            number: of the step; the first is 1.
            rates: of `learning_rates`.
            trees: of the step.
            credit: theirs.
            appraisals: theirs, where the loss needs them.
            progress: called after each micro-batch of the first optimiser step with its tokens; it may raise to
                stop there. Once the weights have moved, only the whole step leaves a state that can be saved.
            where: names the step in an error.
        """
        settings = self.phase.settings
        passes = getattr(settings, "updates_per_batch", 1)
        parts = minibatches(credit, getattr(settings, "minibatches", 1))
        results: list[StepResult] = []
        if self.refresh_every > 1 and not self.age(number):
            self._rollout.refresh()

        def run(loss: LossOf, batches: Sequence[MicroBatch], moving: Mapping[str, float]) -> None:
            results.append(
                optimise(
                    loss,
                    self.optimizer,
                    batches,
                    max_gradient_norm=self.phase.optimizer.max_gradient_norm,
                    learning_rates=moving,
                    progress=None if results else progress,
                    where=where,
                )
            )
            self.moved = True

        with memory_errors("the update", UPDATE_MEMORY):
            packed = [self.pack(trees, part, appraisals) for part in parts]
            for _ in range(passes):
                for batches in packed:
                    run(self._joint_loss(number), batches, self._moving(number, rates))
            value = self.value_settings
            if value is not None and value.update == "after_policy" and not self.warming_up(number):
                for _ in range(passes):
                    for batches in packed:
                        run(self._value_loss(), batches, {VALUE: rates[VALUE]})
        return _merged(results, first_pass=len(packed), main=passes * len(packed))

    def learning_rates(self, number: int, generated_tokens: int) -> dict[str, float]:
        """Of each group of parameters at step `number`, the first being 1, before which so many tokens were drawn."""
        optimizer = self.phase.optimizer
        peaks = {POLICY: optimizer.learning_rate}
        if self.value_settings is not None:
            peaks[VALUE] = self.value_settings.learning_rate
        schedule = {
            "schedule": optimizer.schedule,
            "warmup_steps": optimizer.warmup_steps,
            "final_fraction": optimizer.final_fraction,
        }
        if self.phase.generated_tokens is not None:
            share = min(generated_tokens / self.phase.generated_tokens, 1.0)
            return {
                name: learning_rate_by_share(number - 1, share=share, peak=peak, **schedule)
                for name, peak in peaks.items()
            }
        assert self.phase.steps is not None
        return {
            name: learning_rate_at(number - 1, steps=self.phase.steps, peak=peak, **schedule)
            for name, peak in peaks.items()
        }

    def warming_up(self, number: int) -> bool:
        """Whether the value model alone trains at step `number`, the first being 1."""
        return self.value_settings is not None and number <= self.value_settings.warmup_steps

    def _moving(self, number: int, rates: Mapping[str, float]) -> Mapping[str, float]:
        if self.warming_up(number):
            return {VALUE: rates[VALUE]}
        if self.value_settings is not None and self.value_settings.update == "after_policy":
            return {POLICY: rates[POLICY]}
        return rates

    def _joint_loss(self, number: int) -> LossOf:
        if self.warming_up(number):
            return self._value_loss()
        settings, value = self.phase.settings, self.value_settings
        algorithm = ALGORITHMS[settings.name]
        joint = value is not None and value.update == "joint"
        return policy_loss(
            self.forward if joint else self._policy_alone(),
            lambda tokens: algorithm.loss(tokens, settings),
            temperature=self.temperature,
            entropy_gradient=isinstance(settings, Sampled) and settings.entropy.coefficient != 0,
            value=ValueTerm(value.coefficient, value.clip) if value is not None and joint else None,
            anchor_head=self._anchor_head(),
        )

    def _anchor_head(self) -> Tensor | None:
        """What turns the anchor's states into its distribution, where the loss holds the exact KL to it."""
        settings = self.phase.settings
        if not (self.exact_kl and isinstance(settings, Sampled) and settings.kl.in_loss):
            return None
        return self._rollout_head if self.anchor is None else self.anchor.head_weight

    def _policy_alone(self) -> PolicyForward:
        """Without the value model: its forward pass would be in vain."""
        return self.forward if self.value is None else self.parts.forward

    def _value_loss(self) -> LossOf:
        value = self.value_settings
        assert value is not None
        return value_only_loss(self.forward, ValueTerm(value.coefficient, value.clip))

    def _open_value(self) -> ValueModel | None:
        if self.value_settings is None:
            return None
        policy, device = self.parts.policy, self.parts.device
        trunk = None
        if self.value_settings.trunk == "separate":
            weights = {name: tensor.detach().clone() for name, tensor in plain_state(policy).items()}
            copy = frozen_copy(policy, weights)
            trunk = build_forward(copy, self.parts.forward.precision).model.get_decoder().requires_grad_(True)
        plain = policy.plain
        width = plain.get_output_embeddings().weight.shape[1]
        return ValueModel(width, trunk=trunk, dtype=plain.dtype, device=device)

    def _restore_rollout(self, restored: Checkpoint) -> None:
        try:
            self._rollout.load(restored.rollout)
        except KeyError as error:
            raise CheckpointError(
                f"checkpoint {restored.number} lacks the weights that sample ({error}). Was algorithm.refresh_every "
                "changed? A run goes on with the settings that it began with."
            ) from None

    def _open_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, fresh at the start of a phase."""
        settings = self.phase.optimizer
        rates = self.learning_rates(1, 0)
        named = self.parameters()
        groups = [
            {"name": name, "lr": rate, "params": [p for key, p in named.items() if _group_of(key) == name]}
            for name, rate in rates.items()
        ]
        optimizer = torch.optim.AdamW(
            groups,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        make_moments(optimizer)
        return optimizer

    def _open_anchor(self, checkpoints: AnchorStore, done: int) -> PolicyForward | None:
        """A frozen copy of the model that training starts with, where KL to it is penalised or reported."""
        if not has_anchor(self.phase, kl_every=self.parts.config.report.kl_every):
            return None
        policy = self.parts.policy
        if done:
            weights = checkpoints.load_anchor()
        else:
            weights = {name: tensor.detach().clone() for name, tensor in plain_state(policy).items()}
            checkpoints.save_anchor(weights)
        return build_forward(frozen_copy(policy, weights), self.parts.forward.precision)


def has_anchor(phase: Phase, *, kl_every: int | None) -> bool:
    """Whether a phase keeps a copy of the weights that it starts with."""
    needed = penalised(phase) and not anchored_on_rollout(phase)
    sampled = isinstance(phase.settings, Sampled)
    return phase.stage is Stage.TRAIN and sampled and (needed or kl_every is not None)


def anchored_on_rollout(phase: Phase) -> bool:
    """Whether the anchor is the policy that sampled the batch."""
    return isinstance(phase.settings, Sampled) and phase.settings.kl.anchor == "rollout"


def penalised(phase: Phase) -> bool:
    """Whether leaving the anchor costs something, in the loss or in the reward."""
    return isinstance(phase.settings, Sampled) and phase.settings.kl.coefficient != 0


def asks_exact_kl(phase: Phase) -> bool:
    """Whether the KL over the whole vocabulary is asked for."""
    return isinstance(phase.settings, Sampled) and penalised(phase) and phase.settings.kl.estimator == EXACT


def everything(tree: Tree) -> Credit:
    """Names every node but the prompt as trained."""
    nodes = {node: np.ones(len(tree.nodes[node])) for node in range(1, len(tree.nodes))}
    return Credit({node: ones.astype(np.float32) for node, ones in nodes.items()}, nodes)


def everything_else(tree: Tree, appraisal: Appraisal) -> Credit:
    """Names the nodes as trained that the anchor was not asked about."""
    whole = everything(tree)
    rest = [node for node in whole.weights if node not in appraisal.anchor_logprobs]
    return Credit(
        {node: whole.advantages[node] for node in rest}, {node: whole.weights[node] for node in rest}
    )


def minibatches(credit: StepCredit, number: int) -> list[list[Credit]]:
    """The credit of `number` optimiser steps: each holds some of the trees, with weights that are shares of its own.

    Trees are dealt out in turn. A minibatch whose trees have no weight still makes a step. With one minibatch nothing
    changes.
    """
    if number == 1:
        return [list(credit.trees)]
    whole = sum(credit.denominators)
    parts = []
    for first, part in enumerate(dealt(credit.trees, number)):
        denominator = sum(credit.denominators[first::number])
        scale = whole / denominator if denominator else 0.0
        parts.append([_scaled(each, scale) for each in part])
    return parts


def dealt(credits: Sequence[Credit], number: int) -> list[list[Credit]]:
    """The credit of `number` minibatches: trees are dealt out in turn, and each is empty in all others."""
    return [
        [each if i % number == first else Credit({}, {}) for i, each in enumerate(credits)]
        for first in range(number)
    ]


def _scaled(credit: Credit, scale: float) -> Credit:
    return replace(
        credit,
        weights={node: own * scale for node, own in credit.weights.items()},
        value_weights={node: own * scale for node, own in credit.value_weights.items()},
    )


def _group_of(name: str) -> str:
    return VALUE if name.startswith(f"{VALUE}.") else POLICY


def _put(batch: MicroBatch, values: Tensor, where: Sequence[Mapping[int, np.ndarray]]) -> None:
    """Hand each node of a micro-batch its part of a per-token tensor."""
    flat = values.detach().float().cpu().numpy()
    for each in batch.slices:
        where[each.tree][each.node] = flat[each.start : each.end].copy()  # pyright: ignore[reportIndexIssue]


def _merged(results: Sequence[StepResult], *, first_pass: int, main: int) -> StepResult:
    """Several optimiser steps on one batch as one result: tokens of the first pass, means over the steps.

    Args:
        results: in order.
        first_pass: so many of them saw each token once.
        main: so many of them moved the policy, or all that moves in this step; value updates behind them add metrics.
    """
    own = results[:main]
    names = dict.fromkeys(name for result in results for name in result.means)
    having = {name: [r.means[name] for r in results if name in r.means] for name in names}
    maxima = dict.fromkeys(name for result in results for name in result.maxima)
    return StepResult(
        loss=sum(result.loss for result in own) / main,
        gradient_norm=sum(result.gradient_norm for result in own) / main,
        tokens_trained=sum(result.tokens_trained for result in results[:first_pass]),
        tokens_computed=sum(result.tokens_computed for result in results[:first_pass]),
        means={name: sum(values) / len(values) for name, values in having.items()},
        maxima={name: max(r.maxima[name] for r in results if name in r.maxima) for name in maxima},
    )
