"""Matrix products for training: factors rounded to bf16, sums in fp32, on AMX tiles.

Each output element is summed in one fixed order, so results are the same to the bit in every run and for any
number of threads. Weights stay fp32 and are packed at each use.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

from graft.kernels.library import (
    K_STEP,
    PANEL,
    TILE,
    Engine,
    Epilogue,
    Kernels,
    PackedWeights,
    load_kernels,
    round_up,
)

T = TypeVar("T")


@functools.cache
def training_kernels() -> Kernels | str:
    """The native kernels if they multiply on AMX tiles, or the reason why training goes without them."""
    kernels = load_kernels()
    if isinstance(kernels, str):
        return kernels
    if Engine.AMX not in kernels.engines:
        return "this CPU has no AMX: torch's own products are as fast"
    return kernels


def require_kernels() -> Kernels:
    """As `training_kernels`. Raises RuntimeError if there are none."""
    kernels = training_kernels()
    if isinstance(kernels, str):
        raise RuntimeError(f"no bf16 products: {kernels}. Ask training_kernels() first.")
    return kernels


# Operands


class Scratch(threading.local):
    """Memory for operands that are needed during one product only, kept for the next."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, size_bytes: int) -> torch.Tensor:
        """uint8 `[size_bytes]`, whatever is in it."""
        memory = self._memory.get(purpose)
        if memory is None or len(memory) < size_bytes:
            memory = self._memory[purpose] = torch.empty(size_bytes, dtype=torch.uint8)
        return memory[:size_bytes]

    def rows(self, purpose: str, m: int, k: int) -> torch.Tensor:
        """bf16 `[m, k]` with the room of `activations`."""
        height, width = round_up(m, TILE), round_up(k, K_STEP)
        return self.take(purpose, 2 * height * width).view(torch.bfloat16).view(height, width)[:m, :k]


class LastResult(threading.local, Generic[T]):
    """A function of a tensor that remembers its last result.

    The query, key and value layers have the same input, and so have gate and up.
    """

    def __init__(self, function: Callable[[torch.Tensor], T]) -> None:
        self._function = function
        self._key: tuple[weakref.ref[torch.Tensor], int] | None = None
        self._result: T | None = None

    def __call__(self, tensor: torch.Tensor) -> T:
        if tensor.is_inference():  # has no version counter that would tell of changes
            return self._function(tensor)
        if self._key is not None and self._key[0]() is tensor and self._key[1] == tensor._version:
            assert self._result is not None
            return self._result
        result = self._function(tensor)
        self._key, self._result = (weakref.ref(tensor, self._drop), tensor._version), result
        return result

    def _drop(self, of: weakref.ref[torch.Tensor]) -> None:
        if self._key is not None and self._key[0] is of:
            self._key = self._result = None


_scratch = Scratch()


def round_rows(matrix: torch.Tensor) -> torch.Tensor:
    """`[..., k]` as bf16 `[m, k]` that products can read; the matrix itself if it already is that."""
    matrix = matrix.detach().reshape(-1, matrix.shape[-1])
    m, k = matrix.shape
    room = matrix.untyped_storage().nbytes() // matrix.element_size() - matrix.storage_offset()
    if (
        matrix.dtype == torch.bfloat16
        and k % K_STEP == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= k
        and room >= (round_up(m, TILE) - 1) * matrix.stride(0) + k
    ):
        return matrix
    rows = bf16_rows(m, k)
    require_kernels().round_rows(matrix, rows)
    return rows


def bf16_rows(m: int, k: int) -> torch.Tensor:
    """bf16 `[m, k]` with the room of `activations`; whatever is in it, but finite where products read it."""
    whole = k % K_STEP == 0
    make = torch.empty if whole else torch.zeros
    return make(round_up(m, TILE), round_up(k, K_STEP), dtype=torch.bfloat16)[:m, :k]


def _packed_columns(matrix: torch.Tensor) -> PackedWeights:
    """A fresh pack of `[k, n]` for products x times the matrix."""
    kernels = require_kernels()
    k, n = matrix.shape
    data = torch.empty(kernels.packed_bytes(Engine.AMX, n, k), dtype=torch.uint8)
    packed = PackedWeights(Engine.AMX, n, k, data)
    kernels.pack_columns(matrix, packed)
    return packed


last_rounded = LastResult(round_rows)
_last_packed_columns = LastResult(_packed_columns)


def pack_nt(weight: torch.Tensor, *, keep: bool = False) -> PackedWeights:
    """A weight `[n, k]` packed for x W^T.

    Args:
        weight: fp32 or bf16.
        keep: in memory of its own; otherwise in memory that the next packed weight takes. Packing at each use costs
            less than half a percent of a product and saves two bf16 copies of the model.
    """
    n, k = weight.shape
    packed = PackedWeights(Engine.AMX, n, k, _weight_memory(n, k, keep=keep))
    if n % PANEL:  # packing leaves the columns behind the last one as they were
        packed.data.zero_()
    require_kernels().pack(packed, weight.detach())
    return packed


def pack_nn(weight: torch.Tensor, *, keep: bool = False) -> PackedWeights:
    """A weight `[n, k]` packed for y W; see `pack_nt`."""
    n, k = weight.shape
    packed = PackedWeights(Engine.AMX, k, n, _weight_memory(k, n, keep=keep))
    require_kernels().pack_columns(weight.detach(), packed)
    return packed


def _weight_memory(n: int, k: int, *, keep: bool) -> torch.Tensor:
    size = require_kernels().packed_bytes(Engine.AMX, n, k)
    return torch.empty(size, dtype=torch.uint8) if keep else _scratch.take("weight", size)


# Products


def matmul_nt(
    a: torch.Tensor,
    b: torch.Tensor | PackedWeights,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """a b^T + bias, of fp32 or bf16 factors rounded to bf16.

    Args:
        a: `[m, k]`.
        b: `[n, k]`, or packed by `pack_nt`.
        bias: `[n]`.
        out: fp32 or bf16 `[m, n]` for the result; fresh fp32 unless given.

    Returns:
        `[m, n]`.
    """
    if isinstance(b, torch.Tensor):
        b = pack_nt(b)
    b = with_bias(b, bias)
    return multiply(last_rounded(a), b, torch.empty(len(a), b.n) if out is None else out)


def matmul_nn(
    a: torch.Tensor,
    b: torch.Tensor | PackedWeights,
    *,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """a b, of fp32 or bf16 factors rounded to bf16.

    Args:
        a: `[m, k]`.
        b: `[k, n]`, or packed by `pack_nn`.
        out: fp32 or bf16 `[m, n]` for the result; fresh fp32 unless given.
        add_to: fp32 `[m, n]` that the product is added to, in place, and that is returned.

    Returns:
        `[m, n]`.
    """
    if isinstance(b, torch.Tensor):
        b = pack_nn(b)
    if add_to is not None:
        return multiply(last_rounded(a), b, add_to, Epilogue.ADD_FP32)
    return multiply(last_rounded(a), b, torch.empty(len(a), b.n) if out is None else out)


def sum_of_matmul_nn(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sum of the products a b over pairs of `[m, k]` and `[k, n]` (k may differ), in fp32 `[m, n]`."""
    total: torch.Tensor | None = None
    for a, b in pairs:
        total = matmul_nn(a, b, add_to=total)
    assert total is not None
    return total


def matmul_tn(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """a^T b in fp32, of fp32 or bf16 factors rounded to bf16.

    Args:
        a: `[k, m]`.
        b: `[k, n]`.
        out: fp32 `[m, n]` for the result; fresh unless given.
        add_to: fp32 `[m, n]` that the product is added to, in place, and that is returned.

    Returns:
        `[m, n]`.
    """
    k, m = a.shape
    rows = _scratch.rows("transposed", m, k)
    require_kernels().transpose_rows(a, rows)
    packed = _last_packed_columns(b)
    if add_to is not None:
        return multiply(rows, packed, add_to, Epilogue.ADD_FP32)
    return multiply(rows, packed, torch.empty(m, packed.n) if out is None else out)


def with_bias(packed: PackedWeights, bias: torch.Tensor | None) -> PackedWeights:
    """The same weights with a bias `[n]` that products add."""
    if bias is None:
        return packed
    return PackedWeights(packed.engine, packed.n, packed.k, packed.data, bias.detach().float().contiguous())


def multiply(
    rows: torch.Tensor, packed: PackedWeights, out: torch.Tensor, epilogue: Epilogue | None = None
) -> torch.Tensor:
    if epilogue is None:
        epilogue = Epilogue.STORE_FP32 if out.dtype == torch.float32 else Epilogue.STORE_BF16
    require_kernels().product(rows, packed, out, epilogue)(len(rows))
    return out
