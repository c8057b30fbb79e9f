"""Tree attention and the attention block against dense attention in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from graft.kernels.products import training_kernels
from graft.kernels.tree_attention import (
    AttentionBlock,
    HeadShape,
    SpanTable,
    attend,
    attend_gradient,
    rotate,
    rotate_back_,
)
from graft.update.attention import TreeLayout, dense_tree_attention
from graft.update.packing import Span
from tests.update.test_attention import LAYOUTS

LAYOUTS = {
    **LAYOUTS,
    "long": [Span(0, 45, 170), Span(45, 78, 170), Span(78, 111, 111), Span(111, 170, 170)],
}
SHAPES = [
    HeadShape(6, 2, 16, 0.3),
    HeadShape(3, 1, 64, 0.125),
    HeadShape(4, 4, 80, 0.2),
    HeadShape(5, 1, 128, 0.1),
]


@pytest.fixture(autouse=True)
def _amx() -> None:
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    torch.manual_seed(0)


def heads_first(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[T, heads dim]` -> `[1, heads, T, dim]`."""
    return x.unflatten(1, (-1, dim)).transpose(0, 1)[None]


def dense(qkv, spans, shape):
    q, k, v = (heads_first(x, shape.dim) for x in qkv)
    out = dense_tree_attention(q, k, v, TreeLayout.of(spans), scale=shape.scale)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(spans, shape):
    tokens = spans[-1].end
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = [torch.randn(tokens, count * shape.dim).bfloat16() for count in heads]
    table = SpanTable.of(spans)
    attended = attend(q, k, v, table, shape)
    exact = tuple(x.double().requires_grad_() for x in (q, k, v))
    want = dense(exact, spans, shape)
    torch.testing.assert_close(attended.out.double(), want.detach(), rtol=2**-8, atol=1e-5)
    gradient = torch.randn(tokens, shape.heads * shape.dim)
    for ours, theirs in zip(
        attend_gradient(gradient, attended, table, shape),
        torch.autograd.grad(want, exact, gradient.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_values_that_have_much_in_common():
    """As with a bias of the value projection: the common part must cancel in the gradients of query and key."""
    spans, shape = LAYOUTS["long"], HeadShape(6, 2, 32, 0.2)
    tokens = spans[-1].end
    q, k = (torch.randn(tokens, h * 32).bfloat16() for h in (6, 2))
    v = (16 + torch.randn(tokens, 64)).bfloat16()
    table, gradient = SpanTable.of(spans), torch.randn(tokens, 192)
    exact = tuple(x.double().requires_grad_() for x in (q, k, v))
    wanted = torch.autograd.grad(dense(exact, spans, shape), exact, gradient.double())
    got = attend_gradient(gradient, attend(q, k, v, table, shape), table, shape)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_wrong_shapes_and_types_are_refused():
    x, angle = torch.randn(5, 64), torch.randn(5, 32)
    with pytest.raises(
        ValueError, match=r"cosines: want contiguous torch.float32 \[5, 32\], got .*\[5, 16\]"
    ):
        rotate(x, angle[:, :16], angle, 32)
    with pytest.raises(ValueError, match="x: want contiguous"):
        rotate(x.double(), angle, angle, 32)
    shape, table = HeadShape(2, 1, 32, 0.2), SpanTable.one_span(5)
    with pytest.raises(ValueError, match=r"value: want contiguous torch\.bfloat16"):
        attend(x.bfloat16(), x[:, :32].bfloat16(), x[:, :32], table, shape)


def test_the_same_for_any_number_of_threads():
    spans, shape = LAYOUTS["deep"], HeadShape(6, 2, 32, 0.2)
    q, k, v = (torch.randn(26, h * 32).bfloat16() for h in (6, 2, 2))
    gradient, table = torch.randn(26, 192), SpanTable.of(spans)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            attended = attend(q, k, v, table, shape)
            results.append([attended.out, attended.sums, *attend_gradient(gradient, attended, table, shape)])
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def angles(tokens, dim):
    half = torch.outer(torch.arange(tokens) % 9, torch.linspace(1, 0.01, dim // 2))
    both = torch.cat([half, half], -1)
    return both.cos(), both.sin()


def turned(x, cosines, sines, dim):
    """The formula of the models: x cos + rotate_half(x) sin."""
    x = x.unflatten(1, (-1, dim))
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    return (x * cosines[:, None] + half * sines[:, None]).flatten(1)


@pytest.mark.parametrize("dim", [16, 48, 64])
def test_rotation_and_its_gradient(dim):
    x = torch.randn(21, 3 * dim)
    cosines, sines = angles(21, dim)
    torch.testing.assert_close(rotate(x, cosines, sines, dim), turned(x, cosines, sines, dim).bfloat16())
    exact = x.double().requires_grad_()
    gradient = torch.randn_like(x)
    [want] = torch.autograd.grad(
        turned(exact, cosines.double(), sines.double(), dim), exact, gradient.double()
    )
    torch.testing.assert_close(
        rotate_back_(gradient.clone(), cosines, sines, dim).double(), want, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_whole_block(with_bias):
    spans, shape, width = LAYOUTS["deep"], HeadShape(6, 2, 16, 0.25), 96
    tokens = spans[-1].end
    outs = [96, 32, 32]
    x = torch.randn(1, tokens, width)
    weights = [torch.randn(o, width) / width**0.5 for o in outs] + [torch.randn(width, 96) / 96**0.5]
    biases = [torch.randn(o) if with_bias else None for o in outs]
    cosines, sines = angles(tokens, 16)
    tensors = [x, *weights, *biases]
    ours = [None if t is None else t.clone().requires_grad_() for t in tensors]
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]

    def reference(x, wq, wk, wv, wo, bq, bk, bv):
        q, k, v = (torch.nn.functional.linear(x[0], w, b) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
        q, k = (turned(t, cosines.double(), sines.double(), 16) for t in (q, k))
        return (dense((q, k, v), spans, shape) @ wo.T)[None]

    got = AttentionBlock.apply(*ours, cosines, sines, SpanTable.of(spans), shape)
    want = reference(*exact)
    assert (got - want).norm() < 0.01 * want.norm()
    direction = torch.randn(got.shape)
    pick = [t for t in ours if t is not None], [t for t in exact if t is not None]
    for a, b in zip(
        torch.autograd.grad(got, pick[0], direction),
        torch.autograd.grad(want, pick[1], direction.double()),
        strict=True,
    ):
        assert a.shape == b.shape
        assert (a - b).norm() < 0.015 * b.norm()
