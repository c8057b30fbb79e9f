"""Packed products of every engine against float64, their epilogues, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graft.kernels.library import (
    Engine,
    Epilogue,
    Kernels,
    PackedWeights,
    activations,
    load_kernels,
    round_up,
)

SHAPES = [
    (1, 33, 17),
    (16, 32, 32),
    (45, 31, 5),
    (13, 100, 70),
    (64, 96, 192),
    (300, 50, 111),
    (33, 1, 64),
    (20, 40, 4100),
]


@pytest.fixture(params=list(Engine), ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture
def kernels(engine: Engine) -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    if engine not in found.engines:
        pytest.skip(f"this CPU has no {engine.name} products")
    return found


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows_of(values: torch.Tensor, engine: Engine) -> torch.Tensor:
    rows, width = values.shape
    return activations(rows, width, engine.dtype).copy_(values)


def packed(
    kernels: Kernels, engine: Engine, n: int, k: int, bias: torch.Tensor | None = None
) -> PackedWeights:
    data = torch.zeros(kernels.packed_bytes(engine, n, k), dtype=torch.uint8)
    return PackedWeights(engine, n, k, data, bias)


def summation_bound(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Worst rounding error of an fp32 sum of k products in any order: k eps sum |x w| (first order)."""
    return x.shape[1] * 2.0**-24 * (x.double().abs() @ w.double().abs().T) + 1e-30


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_the_float64_one_up_to_fp32_summation(kernels, engine, m, n, k, with_bias):
    generator = torch.Generator().manual_seed(m * n * k)
    w = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) if with_bias else None
    x = rows_of(torch.randn(m, k, generator=generator), engine)
    weights = packed(kernels, engine, n, k, bias)
    kernels.pack(weights, w)
    out = torch.full((m, n), torch.nan)
    kernels.product(x, weights, out, Epilogue.STORE_FP32)(m)

    rounded = w.to(engine.dtype).double()
    exact = x.double() @ rounded.T
    # Adding the bias rounds once more, relative to the result.
    bound = 2 * summation_bound(x, rounded) + (0 if bias is None else 2.0**-22 * (exact.abs() + bias.abs()))
    assert ((out - exact - (0 if bias is None else bias)).abs() <= bound).all()


def test_bf16_source_packs_like_its_fp32_copy(kernels, engine):
    w = torch.randn(40, 50).bfloat16()
    from_bf16, from_fp32 = packed(kernels, engine, 40, 50), packed(kernels, engine, 40, 50)
    kernels.pack(from_bf16, w)
    kernels.pack(from_fp32, w.float())
    assert from_bf16.data.equal(from_fp32.data)


def test_rounding_to_bf16_is_torchs(kernels, engine):
    special = torch.tensor(
        [1.00390625, 1.01171875, -1.00390625, 3.3895e38, 1e-40, torch.inf, -torch.inf, 0.0, -0.0]
    )
    stored = torch.empty(1, len(special), dtype=torch.bfloat16)
    biased = packed(kernels, engine, len(special), 1, special)
    kernels.product(rows_of(torch.zeros(1, 1), engine), biased, stored, Epilogue.STORE_BF16)(1)
    assert stored[0].equal((special + 0.0).bfloat16())


def test_scale_and_interleaved_groups(kernels, engine):
    gate, up, scale = torch.randn(20, 24), torch.randn(20, 24), torch.rand(24) + 0.5
    weights = packed(kernels, engine, 2 * round_up(20, 16), 24)
    kernels.pack(weights, gate, scale=scale, first=0, group=16, group_stride=32)
    kernels.pack(weights, up, scale=scale, first=16, group=16, group_stride=32)
    x = rows_of(torch.randn(5, 24), engine)
    out = torch.empty(5, weights.n)
    kernels.product(x, weights, out, Epilogue.STORE_FP32)(5)
    for first, matrix in ((0, gate), (16, up)):
        columns = torch.cat([out[:, first : first + 16], out[:, first + 32 : first + 36]], dim=1)
        expected = x.double() @ (matrix * scale).to(engine.dtype).double().T
        torch.testing.assert_close(columns.double(), expected, rtol=0, atol=2e-5)
    assert out[:, 36:48].eq(0).all()
    assert out[:, 52:].eq(0).all()


@pytest.mark.parametrize("half", [False, True])
def test_gate(kernels, engine, half):
    gate, up = torch.randn(20, 24), torch.randn(20, 24)
    weights = packed(kernels, engine, 64, 24)
    kernels.pack(weights, gate, group=16, group_stride=32)
    kernels.pack(weights, up, first=16, group=16, group_stride=32)
    x = rows_of(torch.randn(37, 24) * 4, engine)
    out = activations(37, 20, torch.bfloat16 if half else torch.float32)
    kernels.product(x, weights, out, Epilogue.GATE_BF16 if half else Epilogue.GATE_FP32)(37)
    g, u = (x.double() @ matrix.to(engine.dtype).double().T for matrix in (gate, up))
    expected = torch.nn.functional.silu(g) * u
    tolerance = 2.0**-8 if half else 1e-6
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=2e-4)
    # What the next product reads behind the last column must be finite.
    assert out.as_strided((37, 12), (out.stride(0), 1), 20).eq(0).all()


def test_add_leaves_other_rows_and_columns_alone(kernels, engine):
    w = torch.randn(20, 16)
    weights = packed(kernels, engine, 20, 16)
    kernels.pack(weights, w)
    x = rows_of(torch.randn(9, 16), engine)
    room = torch.randn(12, 40)
    before = room.clone()
    kernels.product(x, weights, room[:, 4:24], Epilogue.ADD_FP32)(7)
    expected = before[:7, 4:24] + (x[:7].double() @ w.to(engine.dtype).double().T)
    torch.testing.assert_close(room[:7, 4:24].double(), expected.double(), rtol=0, atol=1e-5)
    room[:7, 4:24] = before[:7, 4:24]
    assert room.equal(before)


def test_a_row_does_not_depend_on_the_others_nor_on_threads(kernels, engine, two_threads):
    m, n, k = 300, 70, 90
    values = torch.randn(m, k)
    weights = packed(kernels, engine, n, k)
    kernels.pack(weights, torch.randn(n, k))
    whole = torch.empty(m, n)
    kernels.product(rows_of(values, engine), weights, whole, Epilogue.STORE_FP32)(m)
    for count in (1, 7, 16, 17, 33, 65, 257):
        order = torch.randperm(m)[:count]
        part = torch.empty(count, n)
        kernels.product(rows_of(values[order], engine), weights, part, Epilogue.STORE_FP32)(count)
        assert part.equal(whole[order])
    torch.set_num_threads(1)
    alone = torch.empty(m, n)
    kernels.product(rows_of(values, engine), weights, alone, Epilogue.STORE_FP32)(m)
    assert alone.equal(whole)


def test_nan_behind_the_last_row_stays_there(kernels, engine):
    x = activations(5, 32, engine.dtype)
    x.copy_(torch.randn(5, 32))
    x.as_strided((11, 32), (x.stride(0), 1), 5 * x.stride(0)).fill_(torch.nan)
    weights = packed(kernels, engine, 40, 32)
    kernels.pack(weights, torch.randn(40, 32))
    out = torch.zeros(5, 40)
    kernels.product(x, weights, out, Epilogue.STORE_FP32)(5)
    assert out.isfinite().all()


def test_buffers_that_do_not_fit_are_refused(kernels, engine):
    weights = packed(kernels, engine, 40, 33)
    x, out = activations(4, 33, engine.dtype), torch.empty(4, 40)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.pack(weights, torch.zeros(70, 33))
    with pytest.raises(ValueError, match="does not fit"):
        kernels.pack(weights, torch.zeros(40, 32))
    with pytest.raises(ValueError, match="scale must be"):
        kernels.pack(weights, torch.zeros(40, 33), scale=torch.ones(32))
    with pytest.raises(ValueError, match="not from activations"):
        kernels.product(activations(4, 32, engine.dtype), weights, out, Epilogue.STORE_FP32)
    with pytest.raises(ValueError, match="cannot take"):
        kernels.product(x, weights, out[:, :39], Epilogue.STORE_BF16)
    with pytest.raises(ValueError, match="cannot take"):
        kernels.product(x, weights, torch.empty(4, 39), Epilogue.STORE_FP32)
    with pytest.raises(ValueError, match="5 rows in a buffer of 4"):
        kernels.product(x, weights, out, Epilogue.STORE_FP32)(5)
