"""The clipped surrogate: values and gradients worked by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.objective.clip import cispo_loss, clipped_policy_loss, truncated_importance_weight
from graft.objective.reduce import segment_sum_weights, weighted_sum

clipped_at_20_28 = partial(clipped_policy_loss, clip_low=0.2, clip_high=0.28)


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# The old log-probability is 0, so the ratio is the number given; clip_low 0.2, clip_high 0.28.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 1.0, -1.0, -1.0, False),  # on policy: plain policy gradient
        (1.5, 1.0, -1.28, 0.0, True),  # risen past the ceiling: no reason to push further
        (1.25, 1.0, -1.25, -1.25, False),  # clip-higher: still inside
        (1.5, -1.0, 1.5, 1.5, False),  # risen, but it was bad: full push back
        (0.5, -1.0, 0.8, 0.0, True),  # fallen past the floor: enough
        (0.5, 1.0, -0.5, -0.5, False),  # fallen, but it was good: full push up
        (2.0, 0.0, 0.0, 0.0, False),  # nothing to learn
    ],
)
def test_loss_and_gradient_by_hand(ratio, advantage, loss, gradient, clipped):
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    out = clipped_policy_loss(
        logprob,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=0.2,
        clip_high=0.28,
    )
    out.per_token.sum().backward()
    assert out.per_token.item() == pytest.approx(loss)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(gradient)
    assert out.was_clipped.item() is clipped


def test_the_importance_weight_is_capped_and_has_no_gradient():
    old = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    weight = truncated_importance_weight(old, torch.zeros(3), cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, 0.36787944])
    assert not weight.requires_grad


# As above, with a dual clip at 3.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (2.5, -2.0, 5.0, 5.0, False),  # bad and risen: pushed back
        (4.0, -2.0, 6.0, 0.0, True),  # risen beyond the dual clip: 3 · 2 and no push
        (4.0, 2.0, -2.56, 0.0, True),  # a good token knows no dual clip
        (0.5, -2.0, 1.6, 0.0, True),
        (4.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    logprob = doubles(ratio).log().requires_grad_()
    out = clipped_at_20_28(logprob, doubles(0), doubles(advantage), dual_clip=3.0)
    out.per_token.sum().backward()
    assert out.per_token.item() == pytest.approx(loss)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(gradient)
    assert out.was_clipped.item() is clipped


def test_the_decks_segment_loss_by_hand():
    """Segments of two tokens, one and two; ratios 1.2 · 0.75 = 0.9, 1.5, 2 · 1.25 = 2.5; A = 2, 2, -1."""
    logprobs = doubles(1.2, 0.75, 1.5, 2, 1.25).log().requires_grad_()
    nodes = torch.tensor([0, 0, 1, 2, 2])
    advantages = doubles(2, 2, 2, -1, -1)
    out = clipped_at_20_28(logprobs, torch.zeros_like(advantages), advantages, ratio="segment", nodes=nodes)
    torch.testing.assert_close(out.per_token, doubles(-1.8, -1.8, -2.56, 2.5, 2.5))
    assert out.was_clipped.tolist() == [False, False, True, False, False]
    # one completion: L is the sum over segments, and each token moves its segment's ratio by the whole ratio
    weights = segment_sum_weights(torch.tensor([2, 1, 2]), completions_in_step=1).index_select(0, nodes)
    total = weighted_sum(out.per_token, weights)
    assert total.item() == pytest.approx(-1.8 - 2.56 + 2.5)
    total.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, doubles(-1.8, -1.8, 0, 2.5, 2.5))


def test_segment_mean_over_whole_completions_is_gspo():
    """L = mean over completions of max(-A s, -A clip(s)), s = exp(mean log-ratio), written out, and its gradient."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 4])
    nodes = torch.arange(3).repeat_interleave(lengths)
    old = torch.randn(8, dtype=torch.float64)
    now = (old + 0.3 * torch.randn(8, dtype=torch.float64)).requires_grad_()
    scores = doubles(1, -1, 0.5)
    out = clipped_at_20_28(now, old, scores[nodes], ratio="segment_mean", nodes=nodes)
    weights = segment_sum_weights(lengths, completions_in_step=3)[nodes]
    got = weighted_sum(out.per_token, weights)

    expected = torch.zeros((), dtype=torch.float64)
    for log_ratio, score in zip((now - old).split(lengths.tolist()), scores, strict=True):
        s = log_ratio.mean().exp()
        expected = expected + torch.maximum(-score * s, -score * s.clamp(0.8, 1.28)) / 3
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, now, retain_graph=True)[0], torch.autograd.grad(expected, now)[0]
    )


log_ratios = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.floats(-3, 3, width=32)), min_size=1, max_size=9
)


@given(
    log_ratios,
    st.sampled_from(["token", "segment", "segment_mean"]),
    st.none() | st.just(3.0),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_against_the_formula_in_plain_python(tokens, kind, dual_clip, dtype):
    nodes = [place // 3 for place in range(len(tokens))]
    of_node = {n: next(a for (_, a), m in zip(tokens, nodes, strict=True) if m == n) for n in nodes}
    expected, given_advantages = [], []
    for place, (log_ratio, advantage) in enumerate(tokens):
        own = [x for (x, _), n in zip(tokens, nodes, strict=True) if n == nodes[place]]
        if kind == "token":
            rho = math.exp(log_ratio)
        else:
            advantage = of_node[nodes[place]]
            rho = math.exp(sum(own) / (len(own) if kind == "segment_mean" else 1))
        loss = max(-advantage * rho, -advantage * min(max(rho, 0.8), 1.28))
        if dual_clip is not None and advantage < 0:
            loss = min(loss, -dual_clip * advantage)
        expected.append(loss)
        given_advantages.append(advantage)
    zeros = torch.zeros(len(tokens), dtype=dtype)
    out = clipped_at_20_28(
        torch.tensor([x for x, _ in tokens], dtype=dtype),
        zeros,
        torch.tensor(given_advantages, dtype=dtype),
        ratio=kind,
        nodes=torch.tensor(nodes),
        dual_clip=dual_clip,
    )
    assert out.per_token.dtype == dtype
    torch.testing.assert_close(out.per_token.double(), doubles(*expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["token", "segment", "segment_mean"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradients_against_finite_differences(kind, dual_clip):
    torch.manual_seed(1)
    old, advantages = torch.randn(2, 12, dtype=torch.float64)
    now = (old + 0.5 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    nodes = torch.arange(4).repeat_interleave(3)
    assert torch.autograd.gradcheck(
        lambda x: (
            clipped_at_20_28(x, old, advantages, ratio=kind, nodes=nodes, dual_clip=dual_clip).per_token
        ),
        (now,),
    )


@given(
    st.lists(
        st.tuples(st.floats(-(2.0**60), 2.0**60, width=32), st.floats(-(2.0**60), 2.0**60, width=32)),
        max_size=6,
    ),
    st.sampled_from(["token", "segment", "segment_mean"]),
    st.none() | st.just(3.0),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_no_finite_input_gives_nan(tokens, kind, dual_clip, dtype):
    now = torch.tensor([x for x, _ in tokens], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([a for _, a in tokens], dtype=dtype)
    nodes = torch.tensor([place // 2 for place in range(len(tokens))], dtype=torch.int64)
    losses = [
        clipped_at_20_28(
            now, torch.zeros_like(now), advantages, ratio=kind, nodes=nodes, dual_clip=dual_clip
        ),
        cispo_loss(now, torch.zeros_like(now), advantages / 2.0**60, cap=5.0),
    ]
    for loss in losses:
        now.grad = None
        weighted_sum(
            loss.per_token, torch.zeros_like(now)
        ).backward()  # weight 0: an infinity would become NaN
        assert torch.isfinite(loss.per_token).all()
        assert now.grad is not None
        assert torch.isfinite(now.grad).all()


# The old log-probability is log ½ and cap 5.
@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "capped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -3.0, False),  # a clipped surrogate would have stopped here
        (0.01, -2.0, 0.02, False),  # no lower bound: the push fades with the ratio
        (8.0, 2.0, -10.0, True),
        (8.0, -2.0, 10.0, True),
    ],
)
def test_cispo_by_hand(ratio, advantage, gradient, capped):
    old = doubles(0.5).log()
    now = (old + math.log(ratio)).requires_grad_()
    out = cispo_loss(now, old, doubles(advantage), cap=5.0)
    out.per_token.sum().backward()
    assert out.per_token.item() == pytest.approx(gradient * now.item())
    assert now.grad is not None
    assert now.grad.item() == pytest.approx(gradient)  # -min(ρ, cap) A
    assert out.was_clipped.item() is capped


def test_on_policy_all_losses_have_the_gradient_of_reinforce():
    logprobs, advantages = doubles(-1, -2, -0.5), doubles(1, -2, 0.5)
    nodes = torch.tensor([0, 1, 2])
    for loss in (
        lambda x: clipped_at_20_28(x, logprobs, advantages),
        lambda x: clipped_at_20_28(x, logprobs, advantages, ratio="segment", nodes=nodes, dual_clip=3.0),
        lambda x: cispo_loss(x, logprobs, advantages, cap=5.0),
    ):
        now = logprobs.clone().requires_grad_()
        loss(now).per_token.sum().backward()
        assert now.grad is not None
        assert now.grad.tolist() == (-advantages).tolist()
