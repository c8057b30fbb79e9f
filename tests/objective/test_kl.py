"""KL estimators: hand values, and their expectations against the exact divergence and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from graft.objective.kl import ESTIMATORS, adapted_coefficient, exact_kl, k1, k2, k3


def test_values_by_hand():
    policy, anchor = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # r = 1/2
    assert k1(policy, anchor).item() == pytest.approx(math.log(2))
    assert k2(policy, anchor).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(policy, anchor).item() == pytest.approx(0.5 - 1 + math.log(2))


def _case():
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(7, dtype=torch.float64).log_softmax(0)
    return logits, anchor


def test_k1_and_k3_are_unbiased_values():
    logits, anchor = _case()
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - anchor)).sum()
    for name in ("k1", "k3"):  # expectation over all seven tokens, not a sample of them
        expectation = (policy.exp() * ESTIMATORS[name](policy, anchor)).sum()
        torch.testing.assert_close(expectation, exact)
    assert (k3(policy, anchor) >= 0).all()


def test_the_gradients_that_the_table_states():
    """E over tokens drawn from the policy (no gradient through the drawing) of each estimator's gradient."""
    logits, anchor = _case()
    policy = logits.log_softmax(0)
    [exact] = torch.autograd.grad((policy.exp() * (policy - anchor)).sum(), logits, retain_graph=True)

    def expected_gradient(name):
        loss = (policy.detach().exp() * ESTIMATORS[name](policy, anchor)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient("k2"), exact)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros_like(exact))
    assert (expected_gradient("k3") - exact).norm() > 0.05 * exact.norm()


def test_the_exact_kl_by_hand():
    policy, anchor = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    by_hand = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert exact_kl((policy + 1e-30).log(), anchor.log()).tolist() == pytest.approx(by_hand)


def test_where_the_exact_kl_belongs():
    """All completions of two tokens out of three, with their probabilities: the gradient of the whole KL is that of k1
    in the reward. The exact KL has a part of it in the loss (each state's own) and the rest in the reward (which states
    are come to)."""
    torch.manual_seed(0)
    first, second = torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    logits = [first.requires_grad_(), second.requires_grad_()]
    anchors = [
        torch.randn(3, dtype=torch.float64).log_softmax(-1),
        torch.randn(3, 3).double().log_softmax(-1),
    ]
    policy = [z.log_softmax(-1) for z in logits]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, logits, retain_graph=True)])

    states = [exact_kl(policy[0][None], anchors[0][None])[0], exact_kl(policy[1], anchors[1])]
    whole = states[0] + (policy[0].exp() * states[1]).sum()
    k1_reward = exact_reward = exact_loss = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            logprobs = torch.stack([policy[0][a], policy[1][a, b]])
            chance = logprobs.sum().exp().detach()
            log_ratio = (logprobs - torch.stack([anchors[0][a], anchors[1][a, b]])).detach()
            divergences = torch.stack([states[0], states[1][a]])
            k1_reward = k1_reward + chance * log_ratio.sum() * logprobs.sum()
            exact_reward = exact_reward + chance * divergences.detach().sum() * logprobs.sum()
            exact_loss = exact_loss + chance * divergences.sum()
    torch.testing.assert_close(gradient(k1_reward), gradient(whole))
    torch.testing.assert_close(gradient(exact_loss) + gradient(exact_reward), gradient(whole))
    assert gradient(exact_reward).norm() < 0.8 * gradient(whole).norm()


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.01),  # 10 % above, a tenth of the horizon
        (5.4, 0.99),
        (60.0, 1.02),  # at most 20 %
        (0.0, 0.98),
    ],
)
def test_the_adaptive_coefficient_by_hand(measured, factor):
    got = adapted_coefficient(0.5, measured=measured, target=6.0, horizon=10_000, samples=1000)
    assert got == pytest.approx(0.5 * factor)


@pytest.mark.parametrize("samples", [10, 11, 10_000])
def test_a_batch_of_a_horizon_or_more_moves_the_weight_by_a_fifth_and_no_further(samples):
    assert adapted_coefficient(1.0, measured=9.0, target=3.0, horizon=10, samples=samples) == pytest.approx(
        1.2
    )


def test_the_adaptive_coefficient_brings_the_divergence_to_its_target():
    """Against a policy whose divergence is 1 / β: the only rest is β = 1 / target."""
    coefficient = 0.01
    for _ in range(400):
        coefficient = adapted_coefficient(
            coefficient, measured=1 / coefficient, target=4.0, horizon=1000, samples=100
        )
    assert coefficient == pytest.approx(0.25, rel=1e-3)
