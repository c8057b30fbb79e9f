"""Matrix products and linear layers for training: bf16 factors, fp32 sums, on AMX tiles.

All three products of a linear layer y = x W^T round their factors to bf16 and nothing else:

    y  = round(x)  round(W)^T + bias
    dx = round(dy) round(W)
    dW = round(dy)^T round(x)

Each output element is summed in one fixed order, so results are the same to the bit in every run and for any
number of threads. Weights stay fp32; their packed bf16 copies are made when the weight has changed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from graft.kernels.library import (
    K_STEP,
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


def _kernels() -> Kernels:
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
        self._key, self._result = (weakref.ref(tensor), tensor._version), result
        return result


_scratch = Scratch()


def _rounded(matrix: torch.Tensor) -> torch.Tensor:
    """`[..., k]` as bf16 `[m, k]` that products can read; the matrix itself if it already is that."""
    matrix = matrix.detach().reshape(-1, matrix.shape[-1])
    m, k = matrix.shape
    if (
        matrix.dtype == torch.bfloat16
        and matrix.is_contiguous()
        and k % K_STEP == 0
        and m % TILE == 0
        and matrix.data_ptr() % 64 == 0
    ):
        return matrix
    rows = torch.empty(round_up(m, TILE), round_up(k, K_STEP), dtype=torch.bfloat16)[:m, :k]
    _kernels().round_rows(matrix, rows)
    return rows


def _packed_columns(matrix: torch.Tensor) -> PackedWeights:
    """A fresh pack of `[k, n]` for products x times the matrix."""
    kernels = _kernels()
    k, n = matrix.shape
    data = torch.empty(kernels.packed_bytes(Engine.AMX, n, k), dtype=torch.uint8)
    packed = PackedWeights(Engine.AMX, n, k, data)
    kernels.pack_columns(matrix, packed)
    return packed


_last_rounded = LastResult(_rounded)
_last_packed_columns = LastResult(_packed_columns)


class PackedPair:
    """The packed copies of one weight `[n, k]`, each made at its first use after the weight changed."""

    def __init__(self) -> None:
        self._state: dict[str, tuple[int, int]] = {}
        self._packed: dict[str, PackedWeights] = {}

    def for_nt(self, weight: torch.Tensor) -> PackedWeights:
        """For x W^T."""
        n, k = weight.shape
        return self._fresh("nt", weight, n, k, lambda packed: _kernels().pack(packed, weight))

    def for_nn(self, weight: torch.Tensor) -> PackedWeights:
        """For y W."""
        n, k = weight.shape
        return self._fresh("nn", weight, k, n, lambda packed: _kernels().pack_columns(weight, packed))

    def mark_changed(self) -> None:
        """Pack again at the next use."""
        self._state.clear()

    def _fresh(
        self, form: str, weight: torch.Tensor, n: int, k: int, pack: Callable[[PackedWeights], None]
    ) -> PackedWeights:
        state = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        if self._state.get(form) != state or weight.is_inference():
            if form not in self._packed or (self._packed[form].n, self._packed[form].k) != (n, k):
                data = torch.zeros(_kernels().packed_bytes(Engine.AMX, n, k), dtype=torch.uint8)
                self._packed[form] = PackedWeights(Engine.AMX, n, k, data)
            pack(self._packed[form])
            self._state[form] = state
        return self._packed[form]


_pairs = WeakTensorKeyDictionary()


def packed_pair(weight: torch.Tensor) -> PackedPair:
    """The packed copies of a weight, which live as long as the weight does.

    A change is seen by the weight's address and version counter, or because a `torch.optim` optimizer that
    has the weight took a step. Nothing tells of writing through `weight.data`: call `forget_packed_weights`
    after doing that.
    """
    _watch_optimizers()
    pair = _pairs.get(weight)
    if pair is None:
        pair = _pairs[weight] = PackedPair()
    return pair


@functools.cache
def _watch_optimizers() -> None:
    """Have optimizer steps mark the weights they change: fused ones do not bump version counters."""

    def mark(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                pair = _pairs.get(parameter)
                if pair is not None:
                    pair.mark_changed()

    register_optimizer_step_post_hook(mark)


def forget_packed_weights() -> None:
    """Drop the packed copies of all weights, and with them their memory (4 bytes a parameter)."""
    _pairs.clear()


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
        b: `[n, k]`, or packed by `packed_pair(b).for_nt(b)`.
        bias: `[n]`.
        out: fp32 or bf16 `[m, n]` for the result; fresh fp32 unless given.

    Returns:
        `[m, n]`.
    """
    if isinstance(b, torch.Tensor):
        b = packed_pair(b).for_nt(b)
    b = with_bias(b, bias)
    return _multiply(_last_rounded(a), b, torch.empty(len(a), b.n) if out is None else out)


def matmul_nn(
    a: torch.Tensor, b: torch.Tensor | PackedWeights, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a b, of fp32 or bf16 factors rounded to bf16.

    Args:
        a: `[m, k]`.
        b: `[k, n]`, or packed by `packed_pair(b).for_nn(b)`.
        out: fp32 or bf16 `[m, n]` for the result; fresh fp32 unless given.

    Returns:
        `[m, n]`.
    """
    if isinstance(b, torch.Tensor):
        b = packed_pair(b).for_nn(b)
    return _multiply(_last_rounded(a), b, torch.empty(len(a), b.n) if out is None else out)


def matmul_tn(a: torch.Tensor, b: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
    """a^T b in fp32, of fp32 or bf16 factors rounded to bf16.

    Args:
        a: `[k, m]`.
        b: `[k, n]`.
        add_to: fp32 `[m, n]` that the product is added to, in place, and that is returned.

    Returns:
        `[m, n]`.
    """
    k, m = a.shape
    rows = _scratch.rows("transposed", m, k)
    _kernels().transpose_rows(a, rows)
    packed = _last_packed_columns(b)
    if add_to is not None:
        return _multiply(rows, packed, add_to, Epilogue.ADD_FP32)
    return _multiply(rows, packed, torch.empty(m, packed.n))


def with_bias(packed: PackedWeights, bias: torch.Tensor | None) -> PackedWeights:
    """The same weights with a bias `[n]` that products add."""
    if bias is None:
        return packed
    return PackedWeights(packed.engine, packed.n, packed.k, packed.data, bias.detach().float().contiguous())


def _multiply(
    rows: torch.Tensor, packed: PackedWeights, out: torch.Tensor, epilogue: Epilogue | None = None
) -> torch.Tensor:
    if epilogue is None:
        epilogue = Epilogue.STORE_FP32 if out.dtype == torch.float32 else Epilogue.STORE_BF16
    _kernels().product(rows, packed, out, epilogue)(len(rows))
    return out


# Linear layers


class Bf16Linear(torch.autograd.Function):
    """y = x W^T + bias for x `[tokens, k]`; see the module's docstring for what is rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rounded: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        # The rounded input is all that the backward pass needs, at half the memory of an fp32 one.
        ctx.save_for_backward(rounded, weight)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        out = torch.empty(len(x), len(weight), dtype=dtype)
        return _multiply(rounded, with_bias(packed_pair(weight).for_nt(weight), bias), out)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rounded, weight = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = matmul_nn(dy, weight, out=torch.empty(rounded.shape, dtype=x_dtype)) if need_x else None
        dw = matmul_tn(dy, rounded).to(weight.dtype) if need_weight else None
        db = dy.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else None
        return dx, dw, db, None, None


def bf16_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer with bf16 products, differentiable once.

    Args:
        x: fp32 or bf16 `[..., k]` on the CPU.
        weight: fp32 or bf16 `[n, k]`.
        bias: `[n]`.
        dtype: of the result, fp32 or bf16; x's unless given.

    Returns:
        `[..., n]`. The gradients have the types of what they belong to.
    """
    y = Bf16Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, _last_rounded(x), dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


class AcceleratedLinears:
    """What `accelerate_linears` did, and the way back: `undo()`, or leave the `with` block."""

    def __init__(self, modules: list[torch.nn.Linear]) -> None:
        self.modules = modules

    def undo(self) -> None:
        """Give the layers their own forward methods back, and drop the packed weights."""
        for module in self.modules:
            del module.forward
            _pairs.pop(module.weight, None)
        self.modules = []

    def __enter__(self) -> AcceleratedLinears:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate_linears(model: torch.nn.Module, *, exclude: Collection[str] = ()) -> AcceleratedLinears | str:
    """Let a model's linear layers multiply with `bf16_linear`, or say why they cannot on this machine.

    Only the instances' forward methods change: classes, parameters and state dict stay as they are. Under
    bf16 autocast the layers return bf16, as torch's own do; otherwise the type of their input.

    Args:
        model: its `torch.nn.Linear` layers with fp32 or bf16 weights on the CPU are taken.
        exclude: names of layers to leave alone, e.g. `{"lm_head"}`.
    """
    kernels = training_kernels()
    if isinstance(kernels, str):
        return kernels
    modules = [
        module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and name not in exclude
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16)
    ]
    for module in modules:
        module.forward = functools.partial(_forward, module)  # pyright: ignore[reportAttributeAccessIssue]
    return AcceleratedLinears(modules)


def _forward(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return bf16_linear(x, module.weight, module.bias, dtype=dtype)
