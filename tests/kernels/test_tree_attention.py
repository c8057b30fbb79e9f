"""Tree attention and the attention block against dense attention in float64, values and gradients."""

from __future__ import annotations

import random

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
from graft.update.attention import TreeLayout, dense_mask, dense_tree_attention
from graft.update.packing import Span
from tests.update.test_attention import LAYOUTS


def random_forest(seed: int, *, trees: int, lengths: list[int], depth: int) -> list[Span]:
    """Trees one behind the other; spans of random lengths, up to three below each."""
    chance = random.Random(seed)
    spans: list[Span] = []

    def grow(start: int, levels: int) -> int:
        place, end = len(spans), start + chance.choice(lengths)
        spans.append(Span(start, end, end))
        below = end
        for _ in range(chance.randint(0, 3) if levels else 0):
            below = grow(below, levels - 1)
        spans[place] = Span(start, end, below)
        return below

    end = 0
    for _ in range(trees):
        end = grow(end, depth)
    return spans


LAYOUTS = {
    **LAYOUTS,
    "long": [Span(0, 45, 170), Span(45, 78, 170), Span(78, 111, 111), Span(111, 170, 170)],
    "empty spans": [Span(0, 0, 40), Span(0, 20, 20), Span(20, 20, 40), Span(20, 40, 40), Span(40, 40, 40)],
    "wide": [Span(0, 40, 640), *[Span(at, at + 15, at + 15) for at in range(40, 640, 15)]],
    "chain": [Span(at, at + 9, 450) for at in range(0, 450, 9)],
    "cut in pieces": [Span(0, 400, 800), Span(400, 600, 600), Span(600, 633, 800), Span(633, 800, 800)],
    "whole blocks": random_forest(1, trees=3, lengths=[16, 32, 64], depth=2),
    "around blocks": random_forest(2, trees=4, lengths=[1, 15, 17, 31, 33, 65], depth=3),
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


def inputs(tokens, shape):
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [torch.randn(tokens, count * shape.dim).bfloat16() for count in heads]


def errors_in_roundings(got, exact, dim):
    """Norm of the error as a multiple of what rounding to bf16 gives; and that of the worst head of a token, as a
    multiple of 2^-9 of the exact one's norm and the root mean square of all.

    Outputs are rounded so by the kernel itself, gradients by the products that take them.
    """
    error, rounding = got.double() - exact, exact.bfloat16().double() - exact
    by_head, sizes = (x.unflatten(1, (-1, dim)).norm(dim=2) for x in (error, exact))
    worst = by_head / (sizes + sizes.square().mean().sqrt()) / 2**-9
    return float(error.norm() / rounding.norm()), float(worst.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(spans, shape):
    tokens, table = spans[-1].end, SpanTable.of(spans)
    q, k, v = inputs(tokens, shape)
    attended = attend(q, k, v, table, shape)
    exact = tuple(x.double().requires_grad_() for x in (q, k, v))
    want = dense(exact, spans, shape)
    gradient = torch.randn(tokens, shape.heads * shape.dim)
    wanted = torch.autograd.grad(want, exact, gradient.double())
    got = attend_gradient(gradient, attended, table, shape)
    for ours, theirs in zip((attended.out, *got), (want.detach(), *wanted), strict=True):
        total, worst = errors_in_roundings(ours, theirs, shape.dim)
        assert total < 2
        assert worst < 6


@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
def test_the_sums_are_the_scores_log_sum_exp(spans):
    shape = HeadShape(4, 2, 48, 0.2)
    q, k, v = inputs(spans[-1].end, shape)
    sums = attend(q, k, v, SpanTable.of(spans), shape).sums
    query, key = (heads_first(x.double(), shape.dim)[0] for x in (q, k))
    scores = shape.scale * query @ key.repeat_interleave(2, 0).transpose(1, 2)
    seen = dense_mask(spans, len(q), q.device)
    want = scores.masked_fill(~seen, -torch.inf).logsumexp(2).T
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)


def test_values_that_have_much_in_common():
    """As with a bias of the value projection: the common part must cancel in the gradients of query and key."""
    spans, shape = LAYOUTS["long"], HeadShape(6, 2, 32, 0.2)
    q, k, v = inputs(spans[-1].end, shape)
    v = (16 + v.float()).bfloat16()
    table, gradient = SpanTable.of(spans), torch.randn(len(q), 192)
    exact = tuple(x.double().requires_grad_() for x in (q, k, v))
    wanted = torch.autograd.grad(dense(exact, spans, shape), exact, gradient.double())
    got = attend_gradient(gradient, attend(q, k, v, table, shape), table, shape)
    for ours, theirs in zip(got, wanted, strict=True):
        total, _ = errors_in_roundings(ours, theirs, shape.dim)
        assert total < 2


def test_a_tree_does_not_depend_on_its_neighbours_in_the_row():
    """To the bit, apart from the gradients of keys and values, whose sums are cut elsewhere in a longer row."""
    spans, shape = LAYOUTS["cut in pieces"], HeadShape(6, 2, 32, 0.2)
    length = spans[-1].end
    row = [*LAYOUTS["long"], *[Span(170 + s.start, 170 + s.end, 170 + s.subtree_end) for s in spans]]
    q, k, v = inputs(170 + length, shape)
    gradient = torch.randn(170 + length, 192)

    def of(first, last, spans):
        table = SpanTable.of(spans)
        attended = attend(q[first:last].clone(), k[first:last].clone(), v[first:last].clone(), table, shape)
        gradients = attend_gradient(gradient[first:last].clone(), attended, table, shape)
        return [attended.out, attended.sums, *gradients]

    both, alone = [x[170:] for x in of(0, 170 + length, row)], of(170, 170 + length, spans)
    for index, (one, other) in enumerate(zip(both, alone, strict=True)):
        if index < 3:
            assert one.equal(other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_hidden_tokens_leave_no_trace():
    """A sample whose numbers are not finite spoils neither its siblings nor what is computed afterwards."""
    spans, shape = [Span(0, 20, 55), Span(20, 50, 50), Span(50, 55, 55)], HeadShape(3, 1, 64, 0.125)
    table, gradient = SpanTable.of(spans), torch.randn(55, 192)
    clean = inputs(55, shape)

    def results(qkv):
        queries, keys, values = qkv
        attended = attend(queries, keys, values, table, shape)
        return [attended.out, attended.sums, *attend_gradient(gradient, attended, table, shape)]

    want = results(clean)
    spoilt = [x.clone() for x in clean]
    for x in spoilt:
        x[20:50] = torch.nan
    for ours, theirs in zip(results(spoilt), want, strict=True):
        assert ours[50:].equal(theirs[50:])
    assert all(a.equal(b) for a, b in zip(results(clean), want, strict=True))


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


@pytest.mark.parametrize("layout", ["deep", "cut in pieces", "whole blocks"])
def test_the_same_for_any_number_of_threads(layout):
    spans, shape = LAYOUTS[layout], HeadShape(6, 2, 32, 0.2)
    q, k, v = inputs(spans[-1].end, shape)
    gradient, table = torch.randn(len(q), 192), SpanTable.of(spans)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            attended = attend(q, k, v, table, shape)
            results.append([attended.out, attended.sums, *attend_gradient(gradient, attended, table, shape)])
    finally:
        torch.set_num_threads(before)
    assert all(x.equal(first) for first, *others in zip(*results, strict=True) for x in others)


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
