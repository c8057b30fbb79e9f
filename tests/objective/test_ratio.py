"""Ratios of tokens and nodes: by hand, their gradients, and that no log-ratio overflows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.objective.ratio import LOG_RATIO_CAP, node_log_ratio, node_mean_log_ratio, policy_ratio

KINDS = ["token", "segment", "segment_mean"]

# Two nodes of three tokens and one; log-ratios 0.5, -0.25, 1.25 (sum 1.5, mean 0.5) and -2.
NOW = [-1.0, -1.25, 0.25, -3.0]
OLD = [-1.5, -1.0, -1.0, -1.0]
NODES = torch.tensor([0, 0, 0, 1])


def _case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(NOW, dtype=dtype, requires_grad=True), torch.tensor(OLD, dtype=dtype)


def test_log_ratios_by_hand():
    now, old = _case()
    assert node_log_ratio(now, old, NODES).tolist() == [1.5, -2]
    assert node_mean_log_ratio(now, old, NODES).tolist() == [0.5, -2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "exponents"),
    [("token", [0.5, -0.25, 1.25, -2]), ("segment", [1.5] * 3 + [-2]), ("segment_mean", [0.5] * 3 + [-2])],
)
def test_ratios_by_hand(kind, exponents, dtype):
    now, old = _case(dtype)
    got = policy_ratio(now, old, NODES, ratio=kind)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.tensor(exponents, dtype=dtype).exp())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind):
    now, old = _case()
    assert torch.autograd.gradcheck(lambda x: policy_ratio(x, old, NODES, ratio=kind), (now,))


def test_the_gradient_of_a_segment_sums_and_that_of_its_mean_averages():
    """d(w ρ) / d log π of each token, for weights 1/2, 1/4, 1/4 of a node: ρ, and ρ / 3."""
    weights = torch.tensor([0.5, 0.25, 0.25, 1.0], dtype=torch.float64)
    for kind, expected in (
        ("segment", [math.exp(1.5)] * 3 + [math.exp(-2)]),
        ("segment_mean", [math.exp(0.5) / 3] * 3 + [math.exp(-2)]),
    ):
        now, old = _case()
        (weights * policy_ratio(now, old, NODES, ratio=kind)).sum().backward()
        assert now.grad is not None
        torch.testing.assert_close(now.grad, torch.tensor(expected, dtype=torch.float64))


@given(
    st.lists(st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32)), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_against_one_node_after_the_other(tokens, sizes):
    now = torch.tensor([a for a, _ in tokens], dtype=torch.float64)
    old = torch.tensor([b for _, b in tokens], dtype=torch.float64)
    numbers = [node for node, size in enumerate(sizes) for _ in range(size)]
    nodes = torch.tensor((numbers + [len(sizes)] * 12)[: len(tokens)], dtype=torch.int64)
    for kind in ("segment", "segment_mean"):
        got = policy_ratio(now, old, nodes, ratio=kind).tolist()
        for place, node in enumerate(nodes.tolist()):
            own = [a - b for (a, b), n in zip(tokens, nodes.tolist(), strict=True) if n == node]
            exponent = sum(own) / (1 if kind == "segment" else len(own))
            assert got[place] == pytest.approx(math.exp(min(exponent, LOG_RATIO_CAP)))


def test_nodes_of_one_token_make_all_kinds_alike():
    now, old = _case()
    each = torch.arange(4)
    token = policy_ratio(now, old, ratio="token").tolist()
    for kind in KINDS:
        assert policy_ratio(now, old, each, ratio=kind).tolist() == token


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_log_ratio_is_capped_and_its_gradient_stops(kind):
    now = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1000.0, -1000.0])
    nodes = torch.tensor([0, 0])
    got = policy_ratio(now, old, nodes, ratio=kind)
    assert got.tolist() == pytest.approx([math.exp(LOG_RATIO_CAP)] * 2)
    (got * torch.tensor([0.0, 1.0])).sum().backward()
    assert now.grad is not None
    assert now.grad.tolist() == [0, 0]


@given(
    st.lists(st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 2)), max_size=8),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_no_finite_log_probability_gives_nan(tokens, kind, dtype):
    now = torch.tensor([x for x, _ in tokens], dtype=dtype, requires_grad=True)
    nodes = torch.tensor([n for _, n in tokens], dtype=torch.int64)
    got = policy_ratio(now, torch.zeros_like(now), nodes, ratio=kind)
    got.sum().backward()
    assert now.grad is not None
    assert torch.isfinite(got).all()
    assert torch.isfinite(now.grad).all()


def test_what_cannot_be_computed_is_refused():
    now, old = _case()
    with pytest.raises(ValueError, match="want 'token', 'segment' or 'segment_mean'"):
        policy_ratio(now, old, NODES, ratio="sequence")
    with pytest.raises(ValueError, match="needs the node of each token"):
        policy_ratio(now, old, ratio="segment")
