"""GAE: the sum over temporal differences written out, its two ends, and hand-worked values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.credit.gae import generalised_advantages, penalised_rewards, td_advantages


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_by_hand():
    got = generalised_advantages(doubles(0, 0, 8), doubles(1, 2, 4), gamma=0.5, gae_lambda=0.5)
    # δ = 0 + 1 - 1, 0 + 2 - 2, 8 + 0 - 4 = 0, 0, 4; γλ = 1/4: A = 4/16, 4/4, 4
    assert got.advantages.tolist() == [0.25, 1, 4]
    assert got.targets.tolist() == [1.25, 3, 8]


def test_lambda_one_is_the_plain_return_minus_the_value():
    rewards, values = doubles(1, -2, 3), doubles(0.5, 4, -1)
    got = generalised_advantages(rewards, values, gamma=0.5, gae_lambda=1.0)
    plain = doubles(1 - 1 + 0.75, -2 + 1.5, 3)
    assert got.targets.tolist() == plain.tolist()
    assert got.advantages.tolist() == (plain - values).tolist()


def test_lambda_zero_is_the_decks_one_step():
    rewards, values = doubles(1, -2, 3), doubles(0.5, 4, -1)
    got = generalised_advantages(rewards, values, gamma=0.5, gae_lambda=0.0)
    assert got.targets.tolist() == [1 + 0.5 * 4, -2 + 0.5 * -1, 3]
    assert got.advantages.tolist() == [3 - 0.5, -2.5 - 4, 3 + 1]


def test_the_state_after_the_last_step_is_worth_nothing_unless_bootstrapped():
    ended = generalised_advantages(doubles(1), doubles(5), gamma=0.5, gae_lambda=0.9)
    assert ended.targets.tolist() == [1]
    going_on = generalised_advantages(doubles(1), doubles(5), gamma=0.5, gae_lambda=0.9, value_after=4.0)
    assert going_on.targets.tolist() == [3]


def slow_gae(rewards, values, gamma, gae_lambda, value_after):
    """Σ_l (γλ)^l δ_{k+l}, each sum by itself."""
    following = [*values, value_after][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * gae_lambda) ** step * delta for step, delta in enumerate(deltas[k:]))
        for k in range(len(deltas))
    ]


number = st.floats(-10, 10, width=32)
share = st.floats(0, 1)


@given(st.lists(st.tuples(number, number), max_size=15), share, share, number)
def test_against_the_sum_over_temporal_differences(steps, gamma, gae_lambda, value_after):
    rewards, values = doubles(*(r for r, _ in steps)), doubles(*(v for _, v in steps))
    got = generalised_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda, value_after=value_after)
    expected = doubles(*slow_gae(rewards.tolist(), values.tolist(), gamma, gae_lambda, value_after))
    torch.testing.assert_close(got.advantages, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got.targets, expected + values, atol=1e-9, rtol=1e-9)
    single = generalised_advantages(
        rewards.float(), values.float(), gamma=gamma, gae_lambda=gae_lambda, value_after=value_after
    )
    assert single.advantages.dtype == single.targets.dtype == torch.float32
    torch.testing.assert_close(single.targets.double(), got.targets, atol=1e-5, rtol=1e-6)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=15), share, share, number)
def test_a_perfect_value_function_leaves_no_advantage(steps, gamma, gae_lambda, value_after):
    rewards = doubles(*(r for r, _ in steps))
    values = generalised_advantages(
        rewards, torch.zeros_like(rewards), gamma=gamma, gae_lambda=1.0, value_after=value_after
    ).targets
    got = generalised_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda, value_after=value_after)
    torch.testing.assert_close(got.advantages, torch.zeros_like(rewards), atol=1e-9, rtol=0)


def test_before_the_first_update_the_decks_advantage_is_the_same_to_the_bit():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 9)
    got = generalised_advantages(rewards, values, gamma=0.9, gae_lambda=0.3)
    assert td_advantages(got.targets, values.requires_grad_()).tolist() == got.advantages.tolist()


def test_later_the_decks_advantage_is_against_the_value_in_training_without_gradient():
    now = doubles(1, 2).requires_grad_()
    got = td_advantages(doubles(3, 1), now)
    assert got.tolist() == [2, -1]
    assert not got.requires_grad
    estimates = generalised_advantages(doubles(3, 1), now, gamma=1.0, gae_lambda=0.5)
    assert not estimates.advantages.requires_grad
    assert not estimates.targets.requires_grad


def test_the_penalty_is_at_each_token_and_the_score_at_the_last():
    kl = doubles(0.5, -1, 2).requires_grad_()
    got = penalised_rewards(4.0, kl, coefficient=0.5)
    assert got.tolist() == [-0.25, 0.5, 3]
    assert not got.requires_grad
    assert kl.tolist() == [0.5, -1, 2]
    # undiscounted, the return of the first token is the score minus β times the completion's KL
    whole = generalised_advantages(got, torch.zeros_like(got), gamma=1.0, gae_lambda=1.0).targets
    assert whole[0].item() == pytest.approx(4 - 0.5 * 1.5)
