"""Attention in parts against a dense mask: values and gradients, in float64 and float32."""

from __future__ import annotations

import pytest
import torch

from graft.update.attention import TreeLayout, dense_mask, dense_tree_attention, tree_attention
from graft.update.packing import Span

LAYOUTS = {
    "one span": [Span(0, 7, 7)],
    "group": [Span(0, 5, 13), Span(5, 9, 9), Span(9, 10, 10), Span(10, 13, 13)],
    "two groups": [Span(0, 3, 8), Span(3, 8, 8), Span(8, 12, 20), Span(12, 13, 13), Span(13, 20, 20)],
    "deep": [
        Span(0, 5, 20),
        Span(5, 9, 9),
        Span(9, 14, 20),
        Span(14, 15, 19),
        Span(15, 19, 19),
        Span(19, 20, 20),
        Span(20, 23, 26),
        Span(23, 26, 26),
    ],
}


def qkv(length, heads, key_heads, dtype):
    torch.manual_seed(length)
    return [
        torch.randn(1, h, length, 8, dtype=dtype, requires_grad=True) for h in (heads, key_heads, key_heads)
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
def test_parts_equal_the_dense_mask(spans, heads, key_heads, dtype, tolerance):
    query, key, value = qkv(spans[-1].end, heads, key_heads, dtype)
    layout = TreeLayout.of(spans)
    parts = tree_attention(query, key, value, layout, scale=0.3)
    dense = dense_tree_attention(query, key, value, layout, scale=0.3)
    torch.testing.assert_close(parts, dense, atol=tolerance, rtol=tolerance)
    gradient = torch.randn_like(dense)
    for ours, theirs in zip(
        torch.autograd.grad(parts, (query, key, value), gradient),
        torch.autograd.grad(dense, (query, key, value), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=5 * tolerance, rtol=5 * tolerance)


def test_gradients_against_finite_differences():
    layout = TreeLayout.of(LAYOUTS["group"])
    inputs = [x[:, :, :, :3].detach().requires_grad_() for x in qkv(13, 2, 1, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, layout, scale=0.5), inputs)


def test_the_dense_mask_by_hand():
    mask = dense_mask([Span(0, 2, 5), Span(2, 4, 4), Span(4, 5, 5)], 5, torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_spans_of_one_call_are_of_similar_length():
    layout = TreeLayout.of([Span(0, 50, 100), Span(50, 60, 60), Span(60, 69, 69), Span(69, 100, 100)])
    lengths = [[s.end - s.start for s in bucket] for bucket in layout.buckets]
    assert lengths == [[50], [31], [10, 9]]
