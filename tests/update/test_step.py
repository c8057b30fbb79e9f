"""One optimiser step: schedules and clipping by hand, and what no cutting into micro-batches may change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from graft.algorithm_settings import GRPO, TokenClip
from graft.errors import DivergenceError
from graft.losses import TokenBatch, TokenLoss, loss_clipped
from graft.update.kept_rows import forbid_
from graft.update.packing import MicroBatch, pack
from graft.update.policy import PolicyForward, Precision
from graft.update.step import (
    POLICY,
    StepResult,
    clip_gradients,
    learning_rate_at,
    learning_rate_by_share,
    make_moments,
    optimise,
    policy_loss,
)
from tests.trees import random_credit, random_group, truncated
from tests.update.test_exactness import load


@pytest.mark.parametrize(
    ("schedule", "warmup", "final", "expected"),
    [
        ("constant", 0, 0.0, [8, 8, 8, 8, 8]),
        ("constant", 2, 0.0, [4, 8, 8, 8, 8]),
        ("linear", 0, 0.0, [8, 6, 4, 2, 0]),
        ("linear", 0, 0.5, [8, 7, 6, 5, 4]),
        ("linear", 2, 0.0, [4, 8, 8, 4, 0]),
        ("cosine", 0, 0.0, [8, 8 * (1 + 0.5**0.5) / 2, 4, 8 * (1 - 0.5**0.5) / 2, 0]),
        ("cosine", 0, 0.25, [8, 2 + 6 * (1 + 0.5**0.5) / 2, 5, 2 + 6 * (1 - 0.5**0.5) / 2, 2]),
        ("cosine", 4, 0.0, [2, 4, 6, 8, 8]),  # one step is left after the rise: at the peak
        ("linear", 8, 0.0, [1, 2, 3, 4, 5]),  # the run ends before the rise does
        ("constant", 8, 0.0, [1, 2, 3, 4, 5]),
    ],
)
def test_the_learning_rate_by_hand(schedule, warmup, final, expected):
    rates = [
        learning_rate_at(
            step, steps=5, peak=8.0, schedule=schedule, warmup_steps=warmup, final_fraction=final
        )
        for step in range(5)
    ]
    assert rates == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "shares", "expected"),
    [
        ("constant", [0, 0.5, 1], [4, 8, 8]),
        ("linear", [0, 0.5, 1], [4, 5, 2]),  # 2 + 6 x what is left, after one step of rise
        ("cosine", [0, 0.5, 1], [4, 5, 2]),
        ("cosine", [0.9, 0.25, 0.75], [4, 2 + 3 * (1 + 0.5**0.5), 2 + 3 * (1 - 0.5**0.5)]),
    ],
)
def test_the_learning_rate_by_share(schedule, shares, expected):
    rates = [
        learning_rate_by_share(
            step, share=share, peak=8.0, schedule=schedule, warmup_steps=2, final_fraction=0.25
        )
        for step, share in zip((0, 2, 3), shares, strict=True)
    ]
    assert rates == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_uses_the_peak(schedule):
    rate = learning_rate_at(0, steps=1, peak=3.0, schedule=schedule, warmup_steps=0, final_fraction=0.0)
    assert rate == 3.0


def parameters(*gradients: Sequence[float] | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(1 if gradient is None else len(gradient), dtype=torch.float64))
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        made.append(parameter)
    return made


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (6.5, [1.5, 2.0, 6.0]),  # half of the norm of 13
        (13.0, [3.0, 4.0, 12.0]),
        (20.0, [3.0, 4.0, 12.0]),
        (0.0, [3.0, 4.0, 12.0]),  # no clipping
    ],
)
def test_clipping_by_hand(limit, expected):
    own = parameters([3.0, 4.0], None, [12.0])
    assert clip_gradients(own, limit) == pytest.approx(13.0)
    assert [x for p in own if p.grad is not None for x in p.grad.tolist()] == pytest.approx(expected)
    assert own[1].grad is None


def test_clipping_nothing():
    assert clip_gradients(parameters(None), 1.0) == 0.0
    own = parameters([0.0, 0.0])
    assert clip_gradients(own, 1.0) == 0.0
    assert own[0].grad is not None
    assert own[0].grad.tolist() == [0.0, 0.0]


@pytest.fixture
def forward(tiny_model_folder) -> PolicyForward:
    return PolicyForward(load(tiny_model_folder, torch.float64), Precision("exact", torch.device("cpu")))


def make_batches(budget: int, *, seed: int = 0) -> list[MicroBatch]:
    rng = np.random.default_rng(seed)
    trees = [random_group(rng, row=i) for i in range(4)]
    credits = [random_credit(tree, rng) for tree in trees]
    return pack(trees, credits, token_budget=budget)


def clipped(tokens: TokenBatch) -> TokenLoss:
    return loss_clipped(tokens, GRPO(clip=TokenClip(low=0.2, high=0.3)))


def step(
    forward: PolicyForward,
    batches: Sequence[MicroBatch],
    *,
    loss=clipped,
    learning_rate: float = 1.0,
    old_logprobs: Sequence[torch.Tensor] | None = None,
    anchor_logprobs: Sequence[torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    entropy_gradient: bool = False,
    max_gradient_norm: float = 0.0,
    **changes,
) -> StepResult:
    """One step of SGD, from which the gradient can be read."""
    if old_logprobs is not None:
        batches = [replace(b, old_logprobs=own) for b, own in zip(batches, old_logprobs, strict=True)]
    if anchor_logprobs is not None:
        batches = [replace(b, anchor_logprobs=own) for b, own in zip(batches, anchor_logprobs, strict=True)]
    return optimise(
        policy_loss(forward, loss, temperature=0.8, entropy_gradient=entropy_gradient),
        optimizer or torch.optim.SGD(policy_group(forward.model), lr=123.0),
        batches,
        max_gradient_norm=max_gradient_norm,
        learning_rates={POLICY: learning_rate},
        **changes,
    )


def policy_group(model: nn.Module) -> list[dict[str, object]]:
    return [{"name": POLICY, "params": list(model.parameters())}]


def weights(forward: PolicyForward) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in forward.model.parameters()]).clone()


def test_the_first_step_on_a_batch_has_ratio_one(forward):
    batches = make_batches(1000)
    before = weights(forward)
    result = step(forward, batches)
    assert result.facts["ratio_max"] == 1.0
    assert result.facts["clipped_share"] == 0.0
    # with ratio 1 the loss is -Σ A w, known without the model
    expected = -sum(float((b.advantages.double() * b.weights).sum()) for b in batches)
    assert result.loss == pytest.approx(expected)
    assert result.tokens_trained == sum(len(b.predictions) for b in batches)
    assert result.tokens_computed == sum(len(b.tokens) for b in batches)
    assert float((weights(forward) - before).norm()) == pytest.approx(result.gradient_norm, rel=1e-9)


def test_the_ratio_is_one_under_truncated_sampling(forward):
    """Old, new and entropy are of the kept tokens: at a place that kept one, log-probability and entropy are 0."""
    rng = np.random.default_rng(0)
    trees = [truncated(random_group(rng, row=i), rng) for i in range(4)]
    batches = pack(trees, [random_credit(tree, rng) for tree in trees], token_budget=40)
    old = _old(forward, batches)
    logits = [forbid_(torch.zeros(len(b.targets), 300), b.kept.bitmaps(), 0) for b in batches if b.kept]
    alone = torch.cat([(z.eq(0).sum(1) == 1)[b.predictions] for z, b in zip(logits, batches, strict=True)])
    assert 0 < alone.sum() < len(alone) == sum(len(b.predictions) for b in batches)
    assert torch.cat(old)[alone].abs().max() == 0
    assert step(forward, batches, learning_rate=0.0).facts["ratio_max"] == 1.0
    result = step(forward, batches, old_logprobs=old)
    assert result.facts["ratio_max"] == 1.0
    assert result.gradient_norm > 0


def test_no_cutting_into_micro_batches_changes_the_step(forward, tiny_model_folder):
    """Weights, loss, norm and facts; facts are means over tokens, not over micro-batches of unequal size."""
    start = weights(forward)
    outcomes = []
    reference: dict[tuple[int, int], torch.Tensor] = {}
    for budget in (1000, 40, 15):
        own = PolicyForward(load(tiny_model_folder, torch.float64), forward.precision)
        assert torch.equal(weights(own), start)
        batches = make_batches(budget)
        old = [scores - 0.3 * torch.sin(torch.arange(len(scores))) for scores in _old(own, batches)]
        if budget == 1000:
            assert len(batches) == 1
            reference = {(w.tree, w.node): old[0][w.start : w.end] for w in batches[0].slices}
        old = [torch.cat([reference[w.tree, w.node] for w in b.slices]) for b in batches]
        result = step(own, batches, old_logprobs=old)
        outcomes.append((len(batches), result, weights(own)))
    (_, whole, moved), *others = outcomes
    assert 0 < whole.facts["clipped_share"] < 1
    assert whole.facts["ratio_max"] == pytest.approx(math.exp(0.3), rel=1e-2)
    assert others[-1][0] > 4
    for _, result, other in others:
        torch.testing.assert_close(other, moved, rtol=1e-9, atol=1e-11)
        assert result.loss == pytest.approx(whole.loss, rel=1e-9)
        assert result.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-9)
        assert result.tokens_trained == whole.tokens_trained
        assert result.facts.keys() == whole.facts.keys()
        for name, value in result.facts.items():
            assert value == pytest.approx(whole.facts[name], rel=1e-6), name


def _old(forward: PolicyForward, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [forward(batch, temperature=0.8).logprobs for batch in batches]


def test_facts_by_hand(forward):
    [batch] = make_batches(1000)
    with torch.no_grad():
        scores = forward(batch, temperature=0.8)
    result = step(forward, [batch])
    gap = (scores.logprobs - batch.engine_logprobs).abs()
    assert result.facts["engine_gap_mean"] == pytest.approx(float(gap.mean()))
    assert result.facts["engine_gap_max"] == pytest.approx(float(gap.max()))
    assert result.facts["entropy"] == pytest.approx(float(scores.entropies.mean()))


def test_later_updates_measure_their_ratio_from_the_rollout_weights(forward):
    batches = make_batches(40)
    old = _old(forward, batches)
    first = step(forward, batches, old_logprobs=old, learning_rate=0.05)
    assert first.facts["ratio_max"] == 1.0
    moved = _old(forward, batches)
    second = step(forward, batches, old_logprobs=old, learning_rate=0.05)
    largest = max(float((m - o).exp().max()) for m, o in zip(moved, old, strict=True))
    assert second.facts["ratio_max"] == pytest.approx(largest) != 1.0
    forgotten = step(forward, batches, learning_rate=0.0)
    assert forgotten.facts["ratio_max"] == 1.0


def test_the_anchor_reaches_the_loss_batch_by_batch(forward):
    batches = make_batches(40)
    anchor = [torch.full((len(b.predictions),), float(i)) for i, b in enumerate(batches)]
    seen = []

    def loss(tokens: TokenBatch) -> TokenLoss:
        assert tokens.anchor_logprobs is not None
        seen.append(tokens.anchor_logprobs)
        return TokenLoss(tokens.logprobs, {})

    step(forward, batches, loss=loss, anchor_logprobs=anchor)
    assert [x.tolist() for x in seen] == [x.tolist() for x in anchor]
    assert len(seen) == len(batches) > 1


def test_the_gradient_is_clipped_before_the_step(forward):
    before = weights(forward)
    result = step(forward, make_batches(40), max_gradient_norm=0.01)
    assert result.gradient_norm > 0.1  # reported as it was
    assert float((weights(forward) - before).norm()) == pytest.approx(0.01)


def test_the_learning_rate_of_the_step_is_used(forward):
    before = weights(forward)
    result = step(forward, make_batches(1000), learning_rate=0.5)
    assert float((weights(forward) - before).norm()) == pytest.approx(0.5 * result.gradient_norm)


def test_entropies_train_only_where_asked(forward):
    batches = make_batches(1000)

    def entropy_alone(tokens: TokenBatch) -> TokenLoss:
        return TokenLoss(0.0 * tokens.logprobs - tokens.entropies, {})

    def entropy() -> float:
        with torch.no_grad():
            scores = forward(batches[0], temperature=0.8)
        return float((scores.entropies * batches[0].weights).sum())

    before = entropy()
    assert step(forward, batches, loss=entropy_alone).gradient_norm == 0.0
    assert entropy() == before
    step(forward, batches, loss=entropy_alone, entropy_gradient=True, learning_rate=0.01)
    assert entropy() > before


def test_a_step_without_signal_moves_weights_by_momentum(forward):
    """Two identical gradients g, then none: with momentum 0.5 the third step is lr (0.5 · 1.5 g)."""
    optimizer = torch.optim.SGD(policy_group(forward.model), lr=1.0, momentum=0.5)
    at = [weights(forward)]
    for batches in (make_batches(1000), [], []):
        result = step(forward, batches, optimizer=optimizer, learning_rate=0.1)
        at.append(weights(forward))
    steps = [b - a for a, b in pairwise(at)]
    assert steps[0].norm() > 0
    torch.testing.assert_close(steps[1], 0.5 * steps[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steps[2], 0.25 * steps[0], rtol=1e-9, atol=1e-12)
    assert result == StepResult(loss=0.0, gradient_norm=0.0, tokens_trained=0, tokens_computed=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.sum() * torch.nan, "step 4: loss is nan and gradient_norm is nan, so"),
        (lambda x: x.sum() * torch.inf, "step 4: loss is -inf and gradient_norm is nan, so"),
        (lambda x: torch.full((), torch.inf), "step 4: loss is inf, so"),  # a constant has no gradient
        (lambda x: (x - x.detach()).sum().abs().sqrt(), "step 4: gradient_norm is nan, so"),  # 0 · inf
    ],
)
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_what_is_not_finite_stops_before_the_weights_move(forward, spoil, message, limit):
    """The last micro-batch is spoilt; after the error a healthy step goes as if nothing had been."""
    batches = make_batches(40)
    calls: list[int] = []

    def loss(tokens: TokenBatch) -> TokenLoss:
        calls.append(1)
        healthy = clipped(tokens)
        if len(calls) < len(batches):
            return healthy
        return TokenLoss(healthy.per_token + spoil(tokens.logprobs), healthy.facts)

    optimizer = torch.optim.AdamW(policy_group(forward.model), lr=1e-3)
    step(forward, batches, optimizer=optimizer, learning_rate=1e-3)
    before = weights(forward)
    moments = {i: s["exp_avg"].clone() for i, s in enumerate(optimizer.state.values())}
    with pytest.raises(DivergenceError, match=message) as stopped:
        step(
            forward,
            batches,
            loss=loss,
            optimizer=optimizer,
            max_gradient_norm=limit,
            where="training step 4",
        )
    assert "optimizer.learning_rate" in str(stopped.value)
    assert torch.equal(weights(forward), before)
    assert all(torch.equal(s["exp_avg"], moments[i]) for i, s in enumerate(optimizer.state.values()))
    assert all(p.grad is None for p in forward.model.parameters())
    assert math.isfinite(step(forward, batches, optimizer=optimizer, learning_rate=1e-3).gradient_norm)


def test_no_gradient_is_left_behind(forward):
    step(forward, make_batches(40))
    assert all(p.grad is None for p in forward.model.parameters())


def test_progress_is_told_of_every_micro_batch(forward):
    batches = make_batches(40)
    told: list[int] = []
    step(forward, batches, progress=told.append)
    assert told == [len(b.tokens) for b in batches]


def test_moments_made_early_are_those_of_the_first_step():
    rng = torch.Generator().manual_seed(3)
    gradients = [torch.randn(5, 3, generator=rng) for _ in range(3)]
    weights = []
    for early in (False, True):
        parameter = nn.Parameter(torch.ones(5, 3))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01, fused=True)
        if early:
            make_moments(optimizer)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        weights.append(parameter.detach())
    assert torch.equal(*weights)
