"""Helpers around the native functions and what they refuse. Results: `test_gemm.py`, `test_decode_kernels.py`."""

from __future__ import annotations

import pytest
import torch

from graft.kernels.library import (
    K_STEP,
    TILE,
    Engine,
    Kernels,
    PackedWeights,
    activations,
    load_kernels,
    readable,
    round_up,
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    return found


@pytest.mark.parametrize(
    ("value", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32)]
)
def test_rounding_up(value, multiple, expected):
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 32), (17, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_finite_room_behind_rows_and_columns(rows, width, dtype):
    x = activations(rows, width, dtype)
    assert (x.shape, x.dtype) == ((rows, width), dtype)
    assert x.stride() == (round_up(width, K_STEP), 1)
    room = torch.empty(0, dtype=dtype).set_(x.untyped_storage())
    assert len(room) == round_up(rows, TILE) * round_up(width, K_STEP)
    assert not room.any()


def test_what_the_kernels_cannot_read_is_copied():
    whole = torch.arange(12.0).view(3, 4)
    assert readable(whole) is whole
    assert readable(whole.bfloat16()).dtype == torch.bfloat16
    for other in (whole.T, whole.double(), whole.to(torch.float16)):
        copied = readable(other)
        assert (copied.dtype, copied.stride(1)) == (torch.float32, 1)
        assert torch.equal(copied, other.float())


def test_the_fastest_engine_of_a_type(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        usable = {engine for engine in kernels.engines if engine.dtype == dtype}
        assert kernels.engine_for(dtype) == max(usable, default=None)
    assert kernels.engine_for(torch.float64) is None


def test_matrices_that_do_not_fit_are_refused_before_anything_is_written(kernels):
    engine = next(iter(kernels.engines))
    data = torch.zeros(kernels.packed_bytes(engine, 32, 8), dtype=torch.uint8)
    weights = PackedWeights(engine, 32, 8, data)
    for matrix, first in ((torch.ones(33, 8), 0), (torch.ones(32, 9), 0), (torch.ones(1, 8), 32)):
        with pytest.raises(ValueError, match="does not fit packed 32x8"):
            kernels.pack(weights, matrix, first=first)
    with pytest.raises(ValueError, match="scale must be fp32"):
        kernels.pack(weights, torch.ones(32, 8), scale=torch.ones(7))
    fp32 = PackedWeights(Engine.FP32, 32, 8, data)
    with pytest.raises(ValueError, match="is not the transposed"):
        kernels.pack_columns(torch.ones(8, 32), fp32)
    assert not data.any()
