"""Our functions against TRL's, from numbers that `fixtures/make_trl.py` took from TRL 1.16 and, for PPO, 0.11.4.

What differs on purpose is said beside each comparison: the reductions here are over the whole optimiser step, which in
the fixtures is one micro-batch.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from graft.credit.gae import generalised_advantages, penalised_rewards
from graft.credit.group import group_relative_advantages, leave_one_out_advantages
from graft.credit.whiten import whiten
from graft.objective.clip import cispo_loss, clipped_policy_loss
from graft.objective.kl import adapted_coefficient, k1, k3
from graft.objective.reduce import (
    constant_weights,
    sample_mean_weights,
    segment_sum_weights,
    token_mean_weights,
    weighted_sum,
)
from graft.objective.value import value_loss

TRL = json.loads((Path(__file__).parent / "fixtures" / "trl.json").read_text(encoding="utf-8"))
GROUPS = torch.arange(3).repeat_interleave(4)


def doubles(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def equal(got: torch.Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, doubles(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", TRL["grpo_advantages"], ids=lambda case: case["scale"])
def test_group_relative_advantages(case):
    got = group_relative_advantages(doubles(case["scores"]), GROUPS, scale=case["scale"])
    # TRL's standard deviation corrects with N / (N - 1) in float32, whatever the rewards are in
    equal(got, case["advantages"], tolerance=1e-12 if case["scale"] == "none" else 1e-7)


def test_leave_one_out():
    case = TRL["rloo_advantages"]
    equal(leave_one_out_advantages(doubles(case["scores"]), GROUPS), case["advantages"])


@pytest.mark.parametrize("name", TRL["grpo_losses"]["losses"])
def test_grpo_losses_and_gradients(name):
    case = TRL["grpo_losses"]
    lengths = torch.tensor(case["lengths"])
    nodes = torch.arange(len(lengths)).repeat_interleave(lengths)
    now, old, anchor = (doubles(case[key]) for key in ("logprobs", "old_logprobs", "anchor_logprobs"))
    now.requires_grad_()
    advantages = doubles(case["advantages"])[nodes]
    if name == "cispo":
        per_token = cispo_loss(now, old, advantages, cap=1.1).per_token
    else:
        per_token = clipped_policy_loss(
            now,
            old,
            advantages,
            clip_low=0.2,
            clip_high=0.28,
            ratio="segment_mean" if name == "gspo" else "token",
            nodes=nodes,
            dual_clip=1.6 if name == "dual_clip" else None,  # TRL's delta
        ).per_token
    if name == "k3":
        per_token = per_token + 0.3 * k3(now, anchor)
    samples, tokens = len(lengths), int(lengths.sum())
    weights = {
        "dapo": token_mean_weights(lengths, tokens_in_step=tokens),
        "cispo": token_mean_weights(lengths, tokens_in_step=tokens),
        "dr_grpo": constant_weights(lengths, samples_in_step=samples, max_new_tokens=8),
        "gspo": segment_sum_weights(lengths, completions_in_step=samples),
    }.get(name, sample_mean_weights(lengths, samples_in_step=samples))
    loss = weighted_sum(per_token, weights[nodes])
    loss.backward()
    expected = case["losses"][name]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert now.grad is not None
    equal(now.grad, expected["gradient"])


def test_the_fixture_reaches_every_clip():
    """Otherwise the comparison above would say nothing of them."""
    losses = TRL["grpo_losses"]["losses"]
    for name in ("grpo", "dual_clip", "gspo"):
        zeros = sum(g == 0 for g in losses[name]["gradient"])
        assert 0 < zeros < len(losses[name]["gradient"]), name
    assert losses["dual_clip"]["loss"] != losses["grpo"]["loss"]
    zeros_of_ppo = [TRL["ppo"][f"{part}_gradient"].count(0.0) for part in ("policy", "value")]
    assert min(zeros_of_ppo) > 0


def test_ppo_rewards_advantages_and_returns():
    case = TRL["ppo"]
    settings = case["settings"]
    ends = [0, *torch.tensor(case["lengths"]).cumsum(0).tolist()]
    old, anchor, values = (doubles(case[key]) for key in ("old_logprobs", "anchor_logprobs", "values"))
    rewards, advantages, targets = [], [], []
    for (a, b), score in zip(pairwise(ends), case["scores"], strict=True):
        own = penalised_rewards(score, k1(old[a:b], anchor[a:b]), coefficient=settings["coefficient"])
        estimates = generalised_advantages(
            own, values[a:b], gamma=settings["gamma"], gae_lambda=settings["gae_lambda"]
        )
        rewards.append(own)
        advantages.append(estimates.advantages)
        targets.append(estimates.targets)
    equal(torch.cat(rewards), case["rewards"])
    equal(torch.cat(targets), case["returns"])
    # TRL adds 1e-8 to the variance; ours adds nothing
    torch.testing.assert_close(
        whiten(torch.cat(advantages), how="full"), doubles(case["whitened_advantages"]), atol=0, rtol=1e-7
    )


def test_ppo_losses_and_gradients():
    case = TRL["ppo"]
    settings = case["settings"]
    now, values = doubles(case["logprobs"]).requires_grad_(), doubles(case["values_now"]).requires_grad_()
    tokens = len(now)
    weights = token_mean_weights(torch.ones(tokens, dtype=torch.int64), tokens_in_step=tokens)
    policy = clipped_policy_loss(
        now,
        doubles(case["old_logprobs"]),
        doubles(case["whitened_advantages"]),
        clip_low=settings["clip"],
        clip_high=settings["clip"],
    )
    value = value_loss(values, doubles(case["values"]), doubles(case["returns"]), clip=settings["value_clip"])
    policy_total = weighted_sum(policy.per_token, weights)
    value_total = case["value_coefficient"] * weighted_sum(value.per_state, weights)
    policy_total.backward()
    value_total.backward()
    assert policy_total.item() == pytest.approx(case["policy_loss"], rel=1e-12)
    assert value_total.item() == pytest.approx(case["value_loss"], rel=1e-12)
    assert now.grad is not None
    assert values.grad is not None
    equal(now.grad, case["policy_gradient"])
    equal(values.grad, case["value_gradient"])


def test_the_adaptive_coefficient():
    case = TRL["ppo"]["adaptive"]
    for measured, (before, after) in zip(case["measured"], pairwise(case["coefficients"]), strict=True):
        got = adapted_coefficient(
            before, measured=measured, target=6.0, horizon=10_000, samples=case["samples"]
        )
        assert got == pytest.approx(after, rel=1e-12)
