"""One optimiser step over the micro-batches of a batch of trees."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graft.algorithms import TokenBatch, TokenLoss
from graft.errors import DivergenceError
from graft.objective.reduce import weighted_sum
from graft.update.packing import MicroBatch
from graft.update.policy import PolicyForward


@dataclass(slots=True)
class StepResult:
    """What one optimiser step did. Token means are over the trained tokens of the step."""

    loss: float
    gradient_norm: float
    tokens_trained: int
    tokens_computed: int
    facts: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def score_batches(
    forward: PolicyForward, batches: Sequence[MicroBatch], *, temperature: float
) -> list[Tensor]:
    """Log-probabilities of the trained tokens under the given weights, without gradient: one tensor a micro-batch."""
    return [forward(batch, temperature=temperature).logprobs for batch in batches]


def optimise(
    forward: PolicyForward,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    loss: Callable[[TokenBatch], TokenLoss],
    *,
    temperature: float,
    max_gradient_norm: float,
    learning_rate: float,
    entropy_gradient: bool = False,
    old_logprobs: Sequence[Tensor] | None = None,
    anchor_logprobs: Sequence[Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
    where: str = "the step",
) -> StepResult:
    """Forward, backward and one step of the optimiser, also when no token trains (momentum still moves).

    Args:
        forward: the policy.
        optimizer: over its trainable parameters.
        batches: packed trees; their weights are shares of the whole step.
        loss: per-token loss from per-token tensors.
        temperature: that of sampling.
        max_gradient_norm: clip the global norm to it; 0: no clipping.
        learning_rate: of this step.
        entropy_gradient: whether entropies train.
        old_logprobs: of the rollout weights, one tensor a micro-batch; None when this is the first step on the
            batch, where they are the current ones, detached.
        anchor_logprobs: of the KL anchor, one tensor a micro-batch.
        progress: called after each micro-batch with its tokens.
        where: names the step in an error.

    Raises:
        DivergenceError: loss or gradient is not finite. Weights and moments are as they were.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = 0.0
    means = _TokenMeans()
    for index, batch in enumerate(batches):
        scores = forward(batch, temperature=temperature, entropy_gradient=entropy_gradient)
        old = scores.logprobs.detach() if old_logprobs is None else old_logprobs[index]
        tokens = TokenBatch(
            logprobs=scores.logprobs,
            entropies=scores.entropies,
            old_logprobs=old,
            engine_logprobs=batch.engine_logprobs,
            anchor_logprobs=None if anchor_logprobs is None else anchor_logprobs[index],
            advantages=batch.advantages,
        )
        result = loss(tokens)
        share = weighted_sum(result.per_token, batch.weights)
        share.backward()
        total += float(share.detach())
        means.add(tokens, result)
        if progress is not None:
            progress(len(batch.tokens))
    norm = clip_gradients(parameters, max_gradient_norm)
    if not (math.isfinite(total) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        found = {"loss": total, "gradient_norm": norm}
        numbers = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        raise DivergenceError(f"{where}: {' and '.join(numbers)}, so the step was not taken")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    for parameter in parameters:
        if parameter.grad is None:  # a step without signal is a step with gradient zero, not a skipped step
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=total,
        gradient_norm=norm,
        tokens_trained=sum(len(b.predictions) for b in batches),
        tokens_computed=sum(len(b.tokens) for b in batches),
        facts=means.result(),
    )


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


class _TokenMeans:
    """Means over all trained tokens of a step, and the largest ratio."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add(self, tokens: TokenBatch, loss: TokenLoss) -> None:
        with torch.no_grad():
            gap = (tokens.old_logprobs - tokens.engine_logprobs).abs()
            means = {"entropy": tokens.entropies, "engine_gap_mean": gap, **loss.facts}
            maxima = {"engine_gap_max": gap, "ratio_max": (tokens.logprobs - tokens.old_logprobs).exp()}
            self._count += len(gap)
            for name, values in means.items():
                self._sums[name] += float(values.detach().double().sum())
            for name, values in maxima.items():
                self._maxima[name] = max(self._maxima.get(name, -torch.inf), float(values.max()))

    def result(self) -> dict[str, float]:
        if not self._count:
            return {}
        return {name: value / self._count for name, value in self._sums.items()} | self._maxima


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
