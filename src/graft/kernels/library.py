"""The native kernels as Python functions over torch tensors and numpy arrays.

`load_kernels()` gives the kernels of this machine or the reason why there are none. Buffers are given once
(`product`, `attention`), so that a decoding step passes nothing but the number of rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from graft.kernels.build import BuildError, build
from graft.platform import read_cpu
from graft.types import LogProbs, Tokens

PANEL = 32
"""Packed columns that are computed together; a gate's panel is 16 gate columns and 16 up columns."""

TILE = 16
"""Rows of an AMX tile: the tiles of the last rows read whatever lies behind them."""

K_STEP = 32
"""bf16 rows are read in steps of 32 numbers; those behind the inner dimension must be finite."""

KV_BLOCK = 16
"""Positions in a block of the key/value cache."""


class Engine(IntEnum):
    """How products are computed; decides the layout and type of packed weights."""

    FP32 = 0  # AVX-512
    BF16 = 1  # AVX-512 bf16: bf16 factors, fp32 sums
    AMX = 2  # AMX tiles: bf16 factors, fp32 sums

    @property
    def dtype(self) -> torch.dtype:
        """Type of both factors."""
        return torch.float32 if self is Engine.FP32 else torch.bfloat16


class Epilogue(IntEnum):
    """What becomes of y = x W^T + bias."""

    STORE_FP32 = 0
    STORE_BF16 = 1
    ADD_FP32 = 2  # added to what is there
    GATE_FP32 = 3  # silu(gate) * up, of the halves of each panel
    GATE_BF16 = 4


class ProductFields(ctypes.Structure):
    """`struct Product` in gemm.h."""

    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("m", c_int64),
        ("weights", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("epilogue", c_int32),
    ]


class AttentionFields(ctypes.Structure):
    """`struct Attention` in decode.h."""

    _fields_ = [
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("rows", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("prefix_first", c_void_p),
        ("prefix_capacity", c_void_p),
        ("prefix_length", c_void_p),
        ("own_first", c_void_p),
        ("own_capacity", c_void_p),
        ("own_length", c_void_p),
        ("position", c_void_p),
        ("scale", c_float),
        ("bf16_cache", c_int32),
    ]


SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "graft_engines": (c_int32, []),
    "graft_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "graft_pack_rows": (
        None,
        [c_int32, c_int32, c_void_p, *[c_int64] * 3, c_void_p, c_void_p, *[c_int64] * 3, c_int32],
    ),
    "graft_pack_columns": (None, [c_int32, c_void_p, *[c_int64] * 3, c_void_p, c_int32]),
    "graft_round_rows": (None, [c_int32, c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_int32]),
    "graft_transpose_rows": (None, [c_int32, c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_int32]),
    "graft_gemm": (None, [c_int32, c_void_p, c_int32]),
    "graft_advise_huge_pages": (None, [c_void_p, c_int64]),
    "graft_rms_norm": (None, [c_void_p, c_int64, c_int64, c_float, c_void_p, c_int64, c_int32, c_int32]),
    "graft_attention": (None, [c_void_p, c_int32]),
    "graft_norm": (None, [*[c_void_p] * 2, *[c_int64] * 2, c_float, *[c_void_p] * 2, c_int32]),
    "graft_norm_gradient": (None, [*[c_void_p] * 4, *[c_int64] * 2, *[c_void_p] * 2, c_int32]),
    "graft_gate": (None, [*[c_void_p] * 2, *[c_int64] * 3, c_void_p, c_int32]),
    "graft_gate_gradient": (None, [*[c_void_p] * 3, *[c_int64] * 3, *[c_void_p] * 3, c_int64, c_int32]),
    "graft_softmax_block": (None, [c_void_p, *[c_int64] * 2, c_float, c_void_p, c_int32]),
    "graft_softmax_gradient": (
        None,
        [c_void_p, *[c_int64] * 2, c_float, *[c_void_p] * 2, c_int64, c_void_p, c_int64, c_int32],
    ),
    "graft_tree_attention": (None, [c_void_p, c_int32]),
    "graft_tree_attention_gradient": (None, [c_void_p, c_int32]),
    "graft_rotate": (None, [*[c_void_p] * 3, *[c_int64] * 3, c_void_p, c_int32]),
    "graft_rotate_back": (None, [*[c_void_p] * 3, *[c_int64] * 3, c_int32]),
    "graft_sample": (
        None,
        [c_void_p, c_int64, c_int64, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_int32],
    ),
}


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple


def readable(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or its copy if it is neither fp32 nor bf16 or its columns are not neighbours."""
    if matrix.dtype in (torch.float32, torch.bfloat16) and matrix.stride(1) == 1:
        return matrix
    return matrix.float().contiguous()


def activations(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros `[rows, width]` with the room behind each row and the last row that products read."""
    return torch.zeros(round_up(rows, TILE), round_up(width, K_STEP), dtype=dtype)[:rows, :width]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A matrix W `[n, k]` in an engine's layout."""

    engine: Engine
    n: int
    k: int
    data: torch.Tensor
    """uint8 `[bytes]`, aligned to 64."""

    bias: torch.Tensor | None = None
    """fp32 `[n]`, in packed order."""


class Kernels:
    """The compiled library. Threads are torch's (`torch.get_num_threads`)."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.path = path
        self._functions: dict[str, Callable[..., int]] = {}
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._gemm = self._functions["graft_gemm"]
        usable = self._functions["graft_engines"]()
        self.engines = frozenset(engine for engine in Engine if usable >> engine & 1)

    def run(self, name: str, *arguments: torch.Tensor | int | float) -> None:
        """Call a kernel with tensors' addresses, numbers, and torch's number of threads."""
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        self._functions[name](*values, torch.get_num_threads())

    def engine_for(self, dtype: torch.dtype) -> Engine | None:
        """The fastest engine for factors of this type; None if the CPU has none."""
        usable = [engine for engine in self.engines if engine.dtype == dtype]
        return max(usable, default=None)

    def packed_bytes(self, engine: Engine, n: int, k: int) -> int:
        """Size of a packed matrix `[n, k]`."""
        return self._functions["graft_packed_bytes"](engine, n, k)

    def advise_huge_pages(self, memory: torch.Tensor) -> None:
        """Ask for large pages before memory that will be streamed is touched for the first time."""
        self._functions["graft_advise_huge_pages"](memory.data_ptr(), memory.nbytes)

    def pack(
        self,
        weights: PackedWeights,
        matrix: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        first: int = 0,
        group: int | None = None,
        group_stride: int | None = None,
    ) -> None:
        """Write rows of W into their packed columns, each times `scale`.

        Args:
            weights: where to; its data must have started as zeros.
            matrix: fp32 or bf16 `[rows, k]`.
            scale: fp32 `[k]`, e.g. the weight of a norm that stands before this product.
            first: packed column of row 0.
            group: rows that stay neighbours; all, unless given.
            group_stride: packed columns from one group's first row to the next group's.
        """
        matrix = readable(matrix)
        rows, k = matrix.shape
        group = group or rows
        group_stride = group_stride or group
        last = first + (rows - 1) // group * group_stride + (rows - 1) % group
        if k != weights.k or last >= round_up(weights.n, PANEL):
            raise ValueError(
                f"matrix {rows}x{k} at column {first} does not fit packed {weights.n}x{weights.k}"
            )
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != (k,)):
            raise ValueError(f"scale must be fp32 [{k}], not {scale.dtype} {list(scale.shape)}")
        self._functions["graft_pack_rows"](
            weights.engine,
            matrix.dtype == torch.bfloat16,
            matrix.data_ptr(),
            matrix.stride(0),
            rows,
            k,
            None if scale is None else scale.data_ptr(),
            weights.data.data_ptr(),
            first,
            group,
            group_stride,
            torch.get_num_threads(),
        )

    def pack_columns(self, matrix: torch.Tensor, weights: PackedWeights) -> None:
        """Pack `[k, n]` so that products with it are x times the matrix. bf16 engines only.

        Fills the packed data to the last number, so that it may start as anything.
        """
        matrix = readable(matrix)
        k, n = matrix.shape
        if (k, n) != (weights.k, weights.n) or weights.engine is Engine.FP32:
            raise ValueError(f"matrix {k}x{n} is not the transposed of packed {weights.n}x{weights.k}")
        self._functions["graft_pack_columns"](
            matrix.dtype == torch.bfloat16,
            matrix.data_ptr(),
            matrix.stride(0),
            k,
            n,
            weights.data.data_ptr(),
            torch.get_num_threads(),
        )

    def round_rows(self, matrix: torch.Tensor, out: torch.Tensor) -> None:
        """out `[m, k]` = the matrix `[m, k]` in bf16; out is shaped like `activations`."""
        self._to_rows("graft_round_rows", readable(matrix), out, *matrix.shape)

    def transpose_rows(self, matrix: torch.Tensor, out: torch.Tensor) -> None:
        """out `[m, k]` = the transposed matrix `[k, m]` in bf16; out is shaped like `activations`."""
        self._to_rows("graft_transpose_rows", readable(matrix), out, *matrix.T.shape)

    def _to_rows(self, function: str, matrix: torch.Tensor, out: torch.Tensor, m: int, k: int) -> None:
        if out.dtype != torch.bfloat16 or out.shape != (m, k) or out.stride(0) < round_up(k, K_STEP):
            raise ValueError(f"out {out.dtype} {list(out.shape)} is not from activations({m}, {k}, bfloat16)")
        self._functions[function](
            matrix.dtype == torch.bfloat16,
            matrix.data_ptr(),
            matrix.stride(0),
            *matrix.shape,
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )

    def product(
        self, x: torch.Tensor, weights: PackedWeights, out: torch.Tensor, epilogue: Epilogue
    ) -> Callable[[int], None]:
        """A function of m, the number of rows, that computes x[:m] W^T into out[:m].

        Args:
            x: `[rows, k]` from `activations`, of the engine's type.
            weights: W `[n, k]`.
            out: `[rows, n]`, of the epilogue's type; after a gate `[rows, n / 2]` in room for whole panels.
            epilogue: what becomes of the product.
        """
        gate = epilogue in (Epilogue.GATE_FP32, Epilogue.GATE_BF16)
        half = epilogue in (Epilogue.STORE_BF16, Epilogue.GATE_BF16)
        columns = round_up(weights.n, PANEL) // 2 if gate else weights.n
        k = weights.k if weights.engine is Engine.FP32 else round_up(weights.k, K_STEP)
        rows = min(len(x), len(out))
        x_room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        out_room = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
        if (
            x.dtype != weights.engine.dtype
            or x.shape[1] != weights.k
            or x.stride(1) != 1
            or x.stride(0) < k
            or x_room < (round_up(rows, TILE) - 1) * x.stride(0) + k
        ):
            raise ValueError(f"x {x.dtype} {list(x.shape)} is not from activations() for k = {weights.k}")
        if (
            out.dtype != (torch.bfloat16 if half else torch.float32)
            or out.stride(1) != 1
            or out.stride(0) < columns
            or out_room < (rows - 1) * out.stride(0) + columns
        ):
            raise ValueError(
                f"out {out.dtype} {list(out.shape)} cannot take {rows}x{columns} of {epilogue.name}"
            )
        fields = ProductFields(
            x.data_ptr(),
            x.stride(0),
            0,
            weights.data.data_ptr(),
            weights.n,
            weights.k,
            None if weights.bias is None else weights.bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            epilogue,
        )
        address, gemm, engine, keep = (
            ctypes.addressof(fields),
            self._gemm,
            int(weights.engine),
            (x, weights, out),
        )

        def multiply(m: int, fields: ProductFields = fields, _keep: object = keep) -> None:
            if not 0 <= m <= rows:
                raise ValueError(f"{m} rows in a buffer of {rows}")
            fields.m = m
            gemm(engine, address, torch.get_num_threads())

        return multiply

    def rms_norm(self, x: torch.Tensor, out: torch.Tensor, rows: int, epsilon: float) -> None:
        """out[:rows] = x / sqrt(mean(x^2) + epsilon); x fp32 contiguous `[.., width]`, out fp32 or bf16."""
        self._functions["graft_rms_norm"](
            x.data_ptr(),
            rows,
            x.shape[1],
            epsilon,
            out.data_ptr(),
            out.stride(0),
            out.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )

    def attention(self, fields: AttentionFields, rows: int) -> None:
        """Rotate, store and attend for the first `rows` rows of the buffers that `fields` points to."""
        fields.rows = rows
        self._functions["graft_attention"](ctypes.addressof(fields), torch.get_num_threads())

    def sample(
        self, logits: torch.Tensor, uniforms: np.ndarray, temperature: float
    ) -> tuple[Tokens, LogProbs]:
        """Draw one token a row by inverting the cumulative distribution.

            z = logits / temperature,  token = min {i : sum_{j <= i} softmax(z)_j > uniform}

        Args:
            logits: fp32 `[rows, vocabulary]`.
            uniforms: float64 `[rows]`, each in [0, 1).
            temperature: above 0.

        Returns:
            Token ids and log softmax(z) of them in nats, both `[rows]`; token 0 and NaN where the logits have no
            finite maximum.
        """
        rows, vocabulary = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError(f"logits must be fp32 with neighbouring columns, not {logits.dtype}")
        if uniforms.dtype != np.float64 or uniforms.shape != (rows,) or not temperature > 0:
            raise ValueError(f"want float64 [{rows}] uniforms and a temperature above 0, got {temperature}")
        uniforms = np.ascontiguousarray(uniforms)
        tokens, logprobs = np.empty(rows, np.int32), np.empty(rows, np.float32)
        self._functions["graft_sample"](
            logits.data_ptr(),
            rows,
            vocabulary,
            logits.stride(0),
            1.0 / temperature,
            uniforms.ctypes.data,
            tokens.ctypes.data,
            logprobs.ctypes.data,
            torch.get_num_threads(),
        )
        return np.maximum(tokens, 0), logprobs


def load_kernels() -> Kernels | str:
    """The native kernels, built if need be, or the reason why this machine goes without them.

    `GRAFT_KERNELS=off` switches them off.
    """
    if os.environ.get("GRAFT_KERNELS", "").lower() in ("off", "0"):
        return "switched off by GRAFT_KERNELS"
    return _load(os.environ.get("GRAFT_CACHE"), os.environ.get("CXX"))


@functools.cache
def _load(_cache: str | None, _compiler: str | None) -> Kernels | str:
    """One library for each setting that decides which one is built."""
    try:
        return Kernels(build(read_cpu()))
    except BuildError as error:
        return str(error)
    except (OSError, AttributeError) as error:  # the loader refuses it, or a symbol is missing
        return f"the compiled kernels cannot be loaded: {error}"
