"""One optimiser step over the micro-batches of a batch of trees."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graft.errors import DivergenceError
from graft.losses import TokenBatch, TokenLoss
from graft.objective.reduce import weighted_sum
from graft.objective.value import value_loss
from graft.update.gradients import make_gradients
from graft.update.head import AnchorHead
from graft.update.packing import MicroBatch
from graft.update.policy import PolicyForward

POLICY, VALUE = "policy", "value"
"""Names of the optimiser's groups of parameters."""


@dataclass(slots=True)
class StepResult:
    """What one optimiser step did. Token means are over the trained tokens of the step."""

    loss: float
    gradient_norm: float
    tokens_trained: int
    tokens_computed: int
    means: Mapping[str, float] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, float]:
        """Means and maxima."""
        return {**self.means, **self.maxima}


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """A micro-batch's share of the step's loss, and what is worth reporting about it."""

    share: Tensor
    """Scalar; carries the gradient."""

    means: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> values to be averaged over the step."""

    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> values of which the step's largest is reported."""


LossOf = Callable[[MicroBatch], BatchLoss]


@dataclass(frozen=True, slots=True)
class ValueTerm:
    """The value loss's place in the sum."""

    coefficient: float
    clip: float
    """As in `objective.value.value_loss`."""


def policy_loss(
    forward: PolicyForward,
    loss: Callable[[TokenBatch], TokenLoss],
    *,
    temperature: float,
    entropy_gradient: bool = False,
    value: ValueTerm | None = None,
    anchor_head: Tensor | None = None,
) -> LossOf:
    """The loss of a micro-batch: that of its tokens, and of its states where a value model trains with the policy.

    Args:
        forward: the policy.
        loss: per-token loss from per-token tensors.
        temperature: that of sampling.
        entropy_gradient: whether entropies train.
        value: weight and clip of the value loss; None: no value loss.
        anchor_head: LM head of the KL anchor whose states the micro-batches hold: asks for the exact KL.
    """

    def loss_of(batch: MicroBatch) -> BatchLoss:
        anchor = None
        if anchor_head is not None:
            assert batch.anchor_states is not None
            anchor = AnchorHead(batch.anchor_states, anchor_head)
        scores = forward(batch, temperature=temperature, entropy_gradient=entropy_gradient, anchor=anchor)
        # at the first step on a batch the rollout's log-probabilities are the current ones
        old = scores.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        tokens = TokenBatch(
            logprobs=scores.logprobs,
            entropies=scores.entropies,
            old_logprobs=old,
            engine_logprobs=batch.engine_logprobs,
            anchor_logprobs=batch.anchor_logprobs,
            advantages=batch.advantages,
            nodes=batch.nodes,
            values=None if scores.values is None else scores.values.detach(),
            value_targets=batch.value_targets,
            kl=scores.kl,
        )
        result = loss(tokens)
        share = weighted_sum(result.per_token, batch.weights)
        gap = (old - batch.engine_logprobs).abs()
        means = {"entropy": scores.entropies, "engine_gap_mean": gap, **result.facts}
        if value is not None and scores.values is not None:
            own = _value_loss(scores.values, batch, value)
            share = share + own.share
            means |= own.means
        ratio = (scores.logprobs - old).exp()
        return BatchLoss(share, means, {"engine_gap_max": gap, "ratio_max": ratio})

    return loss_of


def value_only_loss(forward: PolicyForward, value: ValueTerm) -> LossOf:
    """The value loss alone; trains the value model's own parameters."""
    return lambda batch: _value_loss(forward.values(batch), batch, value)


def _value_loss(values: Tensor, batch: MicroBatch, term: ValueTerm) -> BatchLoss:
    assert batch.value_targets is not None
    assert batch.value_weights is not None
    assert batch.old_values is not None
    own = value_loss(values, batch.old_values, batch.value_targets, clip=term.clip)
    share = term.coefficient * weighted_sum(own.per_state, batch.value_weights)
    states = batch.value_weights != 0
    means = {"value_loss": own.per_state[states], "value_clipped_share": own.was_clipped[states].float()}
    return BatchLoss(share, means)


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Make AdamW's moments now, as it would in its first step.

    There they would take their place among what the first update is about to free, and leave holes for good: 0.3 GB
    of a process of 3.8 GB.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def optimise(
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    *,
    max_gradient_norm: float,
    learning_rates: Mapping[str, float],
    progress: Callable[[int], None] | None = None,
    where: str = "the step",
) -> StepResult:
    """Forward, backward and one step of the optimiser, also when no token trains (momentum still moves).

    Args:
        loss_of: a micro-batch's share of the loss.
        optimizer: its groups of parameters have names.
        batches: packed trees; their weights are shares of the whole step.
        max_gradient_norm: clip the norm of each group's gradient to it; 0: no clipping.
        learning_rates: group -> learning rate of this step. Groups that are not named stay as they are.
        progress: called after each micro-batch with its tokens.
        where: names the step in an error.

    Returns:
        its `gradient_norm` is that of the first moving group.

    Raises:
        DivergenceError: loss or gradient is not finite. Weights and moments are as they were.
    """
    total = 0.0
    means = _Means()
    for group in optimizer.param_groups:
        if group["name"] in learning_rates:
            make_gradients(group["params"])
    for batch in batches:
        own = loss_of(batch)
        own.share.backward()
        total += float(own.share.detach())
        means.add(own)
        if progress is not None:
            progress(len(batch.tokens))
    norms = _clip_groups(optimizer, learning_rates, max_gradient_norm)
    if not all(math.isfinite(number) for number in (total, *norms)):
        optimizer.zero_grad(set_to_none=True)
        found = {"loss": total, "gradient_norm": next((n for n in norms if not math.isfinite(n)), norms[0])}
        numbers = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        raise DivergenceError(f"{where}: {' and '.join(numbers)}, so the step was not taken")
    move(optimizer, learning_rates)
    return StepResult(
        loss=total,
        gradient_norm=norms[0],
        tokens_trained=sum(len(b.predictions) for b in batches),
        tokens_computed=sum(len(b.tokens) for b in batches),
        means=means.means(),
        maxima=means.maxima,
    )


def _clip_groups(optimizer: torch.optim.Optimizer, moving: Collection[str], max_norm: float) -> list[float]:
    return [
        clip_gradients(group["params"], max_norm)
        for group in optimizer.param_groups
        if group["name"] in moving
    ]


def move(optimizer: torch.optim.Optimizer, learning_rates: Mapping[str, float]) -> None:
    """Step the named groups, whose parameters all have gradients: without signal they are zero, and momentum still
    moves. The others keep parameters and moments. All gradients go."""
    for group in optimizer.param_groups:
        moves = group["name"] in learning_rates
        if moves:
            group["lr"] = learning_rates[group["name"]]
        else:
            for parameter in group["params"]:
                parameter.grad = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients so that their global L2 norm is at most `max_norm` (0: leave them); the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if max_norm > 0 and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(float(max_norm / norm))
    return float(norm)


class _Means:
    """Means and maxima over a whole step."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        self._sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def add(self, loss: BatchLoss) -> None:
        for name, values in loss.means.items():
            self._counts[name] += len(values)
            self._sums[name] += float(values.detach().double().sum())
        for name, values in loss.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -torch.inf), float(values.detach().max()))

    def means(self) -> dict[str, float]:
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}


def learning_rate_at(
    step: int, *, steps: int, peak: float, schedule: str, warmup_steps: int, final_fraction: float
) -> float:
    """Learning rate of optimiser step `step` (0 is the first) of `steps`.

    Rises linearly over the first `warmup_steps`, the first of them already above 0; then stays (`constant`),
    or falls to `final_fraction` of the peak at the last step, in a line (`linear`) or half a cosine (`cosine`).
    """
    last = max(steps - 1 - warmup_steps, 1)
    return learning_rate_by_share(
        step,
        share=min(max(step - warmup_steps, 0) / last, 1.0),
        peak=peak,
        schedule=schedule,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
    )


def learning_rate_by_share(
    step: int, *, share: float, peak: float, schedule: str, warmup_steps: int, final_fraction: float
) -> float:
    """Learning rate of optimiser step `step` where a share in [0, 1] says how far the fall has come.

    As `learning_rate_at`; for a run whose length is not known in steps. After the warm-up the rate is that of the
    share, so that it may set in below the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    left = 1 - share if schedule == "linear" else (1 + float(torch.cos(torch.tensor(torch.pi * share)))) / 2
    return peak * (final_fraction + (1 - final_fraction) * left)
