"""The loss of supervised training on rows that it does not see, and when to stop for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from graft.algorithm_settings import SFT
from graft.crediting import Evidence, credit_worked
from graft.losses import TokenBatch, loss_cross_entropy
from graft.objective.reduce import weighted_sum
from graft.tree import Tree
from graft.types import Prompt
from graft.update.packing import pack
from graft.update.policy import PolicyForward


def having_worked(prompts: Sequence[Prompt], reference: str) -> list[Prompt]:
    """The rows that have a worked completion. A function is taken to have one for every row.

    Args:
        prompts: held-out rows.
        reference: `algorithm.worked`.
    """
    if not reference.startswith("key:"):
        return list(prompts)
    return [prompt for prompt in prompts if prompt.item.get(reference.removeprefix("key:")) is not None]


@torch.no_grad()
def held_out_loss(
    forward: PolicyForward,
    trees: Sequence[Tree],
    settings: SFT,
    *,
    temperature: float,
    microbatch_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> float:
    """What a training step on these worked completions would report as its `loss`: nats a token.

    Args:
        forward: the policy.
        trees: worked completions, at least one.
        settings: give the reduction.
        temperature: that of sampling.
        microbatch_tokens: tokens that go through the network at once.
        progress: called after each micro-batch with its tokens.
    """
    credit = credit_worked(Evidence(trees), settings)
    total = 0.0
    for packed in pack(trees, credit.trees, token_budget=microbatch_tokens):
        batch = packed.to(forward.model.device)
        scores = forward(batch, temperature=temperature)
        tokens = TokenBatch(
            logprobs=scores.logprobs.double(),
            entropies=scores.entropies,
            old_logprobs=scores.logprobs,
            engine_logprobs=batch.engine_logprobs,
            anchor_logprobs=None,
            advantages=batch.advantages,
            nodes=batch.nodes,
        )
        total += float(weighted_sum(loss_cross_entropy(tokens, settings).per_token, batch.weights))
        if progress is not None:
            progress(len(batch.tokens))
    return total


def after_loss(
    former: Mapping[str, float] | None, loss: float, *, minimum_improvement: float
) -> dict[str, float]:
    """The best loss so far, and how many measurements in a row did not improve on it.

    Args:
        former: what this gave for the measurement before; None at the first.
        loss: measured now. One that is not finite is no improvement.
        minimum_improvement: a loss counts as better when it is lower than the best by more than this.
    """
    best = math.inf if former is None else former["best"]
    if loss < best - minimum_improvement:
        return {"best": loss, "waited": 0}
    return {"best": best, "waited": 1 + (0 if former is None else former["waited"])}
