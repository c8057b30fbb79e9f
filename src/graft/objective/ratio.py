"""Probability ratios of tokens, of segments and of whole completions, one value per token.

A micro-batch holds N trained tokens. Each belongs to a node, a span that is scored as one: a whole completion or one
segment. `nodes` names it, 0 to n - 1; all tokens of a node stand in one micro-batch. Every kind of ratio comes
back as `[N]`, a node's ratio at each of its tokens: with weights that sum to w over the node, the loss is
w · L(ρ_node) and its gradient the right one.

| ratio          | ρ of a token                                         | used by                           |
|----------------|------------------------------------------------------|-----------------------------------|
| `token`        | exp(log π_θ - log π_old) of the token                | PPO, GRPO, DAPO                   |
| `segment`      | exp of the sum of the node's log-ratios              | the deck's RFT                    |
| `segment_mean` | exp of their mean, for whole completions GSPO        | GSPO, arXiv:2507.18071, eq. 7     |

The gradient of a `segment` ratio sums over the node's tokens, that of `segment_mean` averages: N_k times smaller. A
mean drift of 0.012 nats a token is a `segment` ratio of 3.3 over 100 tokens (TRL issues 4772, 5814).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_RATIO_CAP = 20.0
"""Log-ratios count as at most this: ρ <= 4.9e8. Without it the sum over a long segment overflows to an infinity,
and times an advantage or weight of 0 to NaN. Past the cap the gradient stops, as under a dual clip."""


def node_log_ratio(
    logprobs: Float[Tensor, " tokens"], old_logprobs: Float[Tensor, " tokens"], nodes: Int[Tensor, " tokens"]
) -> Float[Tensor, " nodes"]:
    """Σ_j log π_θ - log π_old over the tokens of each node, nats; 0 for a number that no token has.

    Source: the deck, "Chain-of-Thought RFT Objective", the exponent of ρ_k.
    """
    return _sum(logprobs - old_logprobs, nodes)


def node_mean_log_ratio(
    logprobs: Float[Tensor, " tokens"], old_logprobs: Float[Tensor, " tokens"], nodes: Int[Tensor, " tokens"]
) -> Float[Tensor, " nodes"]:
    """The mean of log π_θ - log π_old over the tokens of each node, nats a token.

    Source: GSPO, arXiv:2507.18071, eq. 7, where the node is the whole completion.
    """
    counts = _sum(torch.ones_like(logprobs), nodes).clamp(min=1)
    return node_log_ratio(logprobs, old_logprobs, nodes) / counts


def policy_ratio(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    nodes: Int[Tensor, " tokens"] | None = None,
    *,
    ratio: str,
) -> Float[Tensor, " tokens"]:
    """ρ at each token, of the token itself or of its node.

    Args:
        logprobs: log-probability of each sampled token now, nats. Carries the gradient.
        old_logprobs: the same with the weights that sampled. No gradient.
        nodes: the node of each token; `token` needs none.
        ratio: `token`, `segment` or `segment_mean`.

    Raises:
        ValueError: another `ratio`, or one of a node without `nodes`.
    """
    if ratio not in ("token", "segment", "segment_mean"):
        raise ValueError(f"ratio = {ratio!r}: want 'token', 'segment' or 'segment_mean'")
    if ratio == "token":
        log_ratio = logprobs - old_logprobs
    elif nodes is None:
        raise ValueError(f"ratio = {ratio!r} needs the node of each token")
    else:
        of_nodes = node_log_ratio if ratio == "segment" else node_mean_log_ratio
        log_ratio = of_nodes(logprobs, old_logprobs, nodes).index_select(0, nodes)
    return torch.exp(log_ratio.clamp(max=LOG_RATIO_CAP))


def _sum(values: Float[Tensor, " tokens"], nodes: Int[Tensor, " tokens"]) -> Float[Tensor, " nodes"]:
    number = int(nodes.max()) + 1 if nodes.numel() else 0
    return values.new_zeros(number).index_add(0, nodes, values)
