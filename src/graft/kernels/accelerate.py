"""Let a Hugging Face model train with the native kernels: its layers' forward methods change, nothing else.

Linear layers are known by their class. Norms, gated MLPs and attention blocks have a class of their own in every
model file, so they are known by what they do: a layer that has the parts is compared with its kernel on random input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeGuard

import torch
from torch import nn

from graft.kernels.layers import GatedMlp, RmsNorm
from graft.kernels.library import TILE
from graft.kernels.linear import bf16_linear
from graft.kernels.products import training_kernels
from graft.kernels.tree_attention import AttentionBlock, HeadShape, SpanTable

NORM_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.02
"""Largest norm of the difference to the layer's own result, as a share of that result's norm. On input of the scale
at which layers differ, the right ones stay below 0.007, a gelu in place of silu or another rotation is above 0.07."""


class Accelerated:
    """What `accelerate` did, and the way back: `undo()`, or leave the `with` block."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one module another forward method."""
        module.forward = functools.partial(forward, module)  # pyright: ignore[reportAttributeAccessIssue]
        self.modules.append(module)

    def undo(self) -> None:
        """Give the modules their own forward methods back."""
        for module in self.modules:
            vars(module).pop("forward", None)
        self.modules = []

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate(model: nn.Module, *, exclude: Collection[str] = ()) -> Accelerated | str:
    """Let a model's layers compute with the native kernels, or say why they cannot on this machine.

    Only the instances' forward methods change: classes, parameters and state dict stay as they are. Under
    bf16 autocast linear layers return bf16, as torch's own do; otherwise the type of their input.

    Args:
        model: its layers with fp32 weights on the CPU are taken, linear ones also with bf16 weights.
        exclude: names of layers to leave alone, e.g. `{"lm_head"}`.
    """
    kernels = training_kernels()
    if isinstance(kernels, str):
        return kernels
    modules = [module for name, module in model.named_modules() if name not in exclude]
    accelerated = Accelerated()
    for has_parts, is_same, forward in LAYERS:
        for module in modules:
            if has_parts(module):
                with torch.no_grad():
                    same = is_same(module)  # layers of one class differ, e.g. in whether they rotate
                if same:
                    accelerated.replace(module, forward)
    for module in modules:
        if _plain_linear(module):
            accelerated.replace(module, _linear)
    return accelerated


def _plain_linear(module: object) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype
        in (
            torch.float32,
            torch.bfloat16,
        )
    )


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return bf16_linear(x, module.weight, module.bias, dtype=dtype)


def _norm_parts(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        return type(module).forward(module, x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)  # pyright: ignore[reportReturnType]


def _same_norm(module: Any) -> bool:
    x = _random(5, len(module.weight))
    return _close(_norm(module, x), module(x), NORM_TOLERANCE)


def _mlp_parts(module: nn.Module) -> bool:
    parts = _linears(module, "gate_proj", "up_proj", "down_proj")
    return len(parts) == 3 and all(part.bias is None for part in parts)


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        return type(module).forward(module, x)
    weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
    return GatedMlp.apply(x, *weights)  # pyright: ignore[reportReturnType]


def _same_mlp(module: Any) -> bool:
    x = _random(16, module.gate_proj.in_features)
    x *= 2 / module.gate_proj(x).std()
    return _close(_gated_mlp(module, x), module(x), BF16_TOLERANCE)


def _attention_parts(module: Any) -> bool:
    parts = _linears(module, "q_proj", "k_proj", "v_proj", "o_proj")
    dim, config = getattr(module, "head_dim", None), getattr(module, "config", None)
    if len(parts) != 4 or not isinstance(dim, int) or dim % TILE:
        return False
    query, key, value, output = parts
    return (
        output.bias is None
        and key.out_features == value.out_features
        and output.in_features == query.out_features
        and key.out_features % dim == 0
        and query.out_features % key.out_features == 0
        and isinstance(getattr(module, "scaling", None), float)
        and hasattr(config, "_attn_implementation")
        # what random input would not show
        and getattr(config, "clip_qkv", None) is None
        and getattr(module, "attn_logit_softcapping", None) is None
    )


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The block's own forward method, except on a packed row of trees."""
    layout = others.get("tree_layout")
    whole = position_embeddings is not None and position_embeddings[0].shape == (
        1,
        hidden_states.shape[1],
        module.head_dim,
    )
    if layout is None or not whole or torch.is_autocast_enabled("cpu"):
        return type(module).forward(
            module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **others,
        )
    assert position_embeddings is not None
    return _attend(module, hidden_states, position_embeddings, layout.table), None


def _attend(
    module: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], table: SpanTable
) -> torch.Tensor:
    heads, kv_heads = (p.out_features // module.head_dim for p in (module.q_proj, module.k_proj))
    cosines, sines = (a[0].float().contiguous() for a in angles)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    return AttentionBlock.apply(  # pyright: ignore[reportReturnType]
        x,
        *(projection.weight for projection in projections),
        module.o_proj.weight,
        *(projection.bias for projection in projections),
        cosines,
        sines,
        table,
        HeadShape(heads, kv_heads, module.head_dim, module.scaling),
    )


def _same_attention(module: Any) -> bool:
    """Compare on one causal span. Blocks that also normalise, cap or rotate in part differ."""
    tokens = 20
    x = _random(tokens, module.q_proj.in_features)[None]
    query, key = (p(x)[0].unflatten(1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj))
    x *= (2 / (torch.einsum("qhd,kd->hqk", query, key[:, 0]) * module.scaling).std()) ** 0.5
    half = torch.outer(torch.arange(tokens), torch.linspace(1, 0.01, module.head_dim // 2))
    angles = torch.cat([half, half], -1)[None]
    position_embeddings = (angles.cos(), angles.sin())
    mask = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)
    former = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        ours = _attend(module, x, position_embeddings, SpanTable.one_span(tokens))
        theirs = module(hidden_states=x, position_embeddings=position_embeddings, attention_mask=mask)[0]
    except Exception:  # a block that takes other arguments is not one of these
        return False
    finally:
        module.config._attn_implementation = former
    return _close(ours, theirs, BF16_TOLERANCE)


def _linears(module: nn.Module, *names: str) -> list[nn.Linear]:
    """The layers of these names that are plain linear layers and own all of the module's parameters; else none."""
    parts: list[nn.Linear] = []
    for name in names:
        part = getattr(module, name, None)
        if _plain_linear(part) and part.weight.dtype == torch.float32:
            parts.append(part)
    owned = {id(parameter) for parameter in module.parameters()}
    return parts if owned == {id(parameter) for part in parts for parameter in part.parameters()} else []


def _random(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool(theirs.norm() > 0 and (ours - theirs).norm() <= tolerance * theirs.norm())


LAYERS: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], bool], Callable[..., Any]], ...] = (
    (_norm_parts, _same_norm, _norm),
    (_mlp_parts, _same_mlp, _gated_mlp),
    (_attention_parts, _same_attention, _attention),
)
"""Has it the parts? Does the kernel compute the same? What takes the place of its forward method."""
