"""Fast decoding of the Llama family on a CPU: packed weights, fused kernels, each prefix computed once.

The forward pass is Hugging Face's, rearranged where that is exact: norm weights are folded into the next
product, Q, K and V are one product, gate and up are one whose epilogue is silu(gate) * up, and both residual
additions happen inside the product before them. The residual stream stays fp32 in both modes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graft.errors import ModelError, ResourceError
from graft.kernels.library import (
    KV_BLOCK,
    PANEL,
    TILE,
    AttentionFields,
    Engine,
    Epilogue,
    Kernels,
    PackedWeights,
    activations,
    round_up,
)
from graft.rollout.sampling import Drawn, SamplingSettings, draw_rows
from graft.types import Tokens

MODEL_TYPES = ("llama", "qwen2")

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the length of the sequence."""

PREFILL_ROWS = 512
"""Prefix tokens that are computed together: many enough to be bound by arithmetic, not by memory."""


def supports(config: PreTrainedConfig) -> str | None:
    """None if `LlamaDecoder` computes exactly this architecture; otherwise the reason why not."""
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in getattr(
        config, "layer_types", ()
    ):
        return "some layers have a sliding window"
    if getattr(config, "quantization_config", None) is not None:
        return "the weights are quantised"
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"rotary embedding {kind!r} is not one of {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "the rotary embedding covers only a part of each head"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"{config.num_key_value_heads} key/value heads do not divide {config.num_attention_heads} evenly"
        )
    return None


def head_width(config: PreTrainedConfig) -> int:
    """Numbers in one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer's packed products."""

    qkv: PackedWeights
    output: PackedWeights
    gate_up: PackedWeights
    down: PackedWeights


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One decoder layer with its products bound to the round's buffers."""

    qkv: Callable[[int], None]
    attention: AttentionFields
    output: Callable[[int], None]
    gate_up: Callable[[int], None]
    down: Callable[[int], None]


class RowSpans:
    """Where each row of the batch reads and writes in the key/value cache, as attention is told."""

    names = (
        "prefix_first",
        "prefix_capacity",
        "prefix_length",
        "own_first",
        "own_capacity",
        "own_length",
        "position",
    )

    def __init__(self, rows: int) -> None:
        self.table = np.zeros((len(self.names), rows), np.int64)

    def write(self, **columns: np.ndarray | int) -> None:
        """Set the named arrays for the first rows; a row's meaning is in `struct Attention`."""
        rows = max(np.size(values) for values in columns.values())
        for name, values in columns.items():
            self.table[self.names.index(name), :rows] = values

    def addresses(self) -> dict[str, int]:
        """Address of each array."""
        return {name: self.table[index].ctypes.data for index, name in enumerate(self.names)}


@dataclass(frozen=True, slots=True)
class Round:
    """What lives from `begin` to `end`: activations, the key/value cache and everything bound to them."""

    rows: int
    """Room for this many rows at once."""

    residual: torch.Tensor
    """fp32 `[rows, hidden]`."""

    normed: torch.Tensor
    """`[rows, hidden]` in the engine's type."""

    logits: torch.Tensor
    """fp32 `[slots, vocabulary]`."""

    head: Callable[[int], None]
    layers: list[LayerStep]
    spans: RowSpans
    prefix_first: np.ndarray
    """int64 `[prefixes]`: first block of each prefix's span."""

    prefix_length: np.ndarray
    """int64 `[prefixes]`, tokens."""

    first_slot_block: int
    slot_blocks: int
    max_new_tokens: int
    own: torch.Tensor
    """`[layers, slots, numbers]`: the keys and values of the slots."""

    keep: tuple[torch.Tensor, ...]
    """Memory that is known to the kernels by address only."""


class LlamaDecoder:
    """`Decoder` for the architectures that `supports` accepts. Raises `ModelError` for others.

    fp32 is the exact mode: log-probabilities agree with Hugging Face's fp32 forward pass up to rounding.
    bf16 rounds weights, activations that enter a product, keys and values; sums, the residual stream,
    softmax and logits are fp32.
    """

    name = "fast"
    width_invariant = True

    def __init__(self, config: PreTrainedConfig, kernels: Kernels, dtype: torch.dtype) -> None:
        reason = supports(config)
        if reason:
            raise ModelError(f"the fast decoder cannot run this model: {reason}. Use the generic one.")
        engine = kernels.engine_for(dtype)
        if engine is None:
            raise ModelError(
                f"the fast decoder has no {dtype} products on this CPU. Use fp32 or the generic one."
            )
        self.kernels = kernels
        self.engine: Engine = engine
        self.dtype = dtype
        self.hidden: int = config.hidden_size
        self.feed_forward: int = config.intermediate_size
        self.vocabulary: int = config.vocab_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim = head_width(config)
        self.epsilon: float = config.rms_norm_eps
        self.layer_count: int = config.num_hidden_layers
        self._rotary = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType] - any config with rope
        self._embedding = torch.empty(0)
        self._layers: list[LayerWeights] = []
        self._head: PackedWeights | None = None
        self._round: Round | None = None

    # Weights

    def load_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Pack the weights of a plain Hugging Face model, given its state dict. Drops all caches.

        The memory of earlier weights is used again: whoever holds them would see them change.
        """
        self.end()
        state = {name.removeprefix("model."): tensor.detach() for name, tensor in state.items()}
        if not self._layers:
            self._allocate(state)
        try:
            with torch.no_grad():
                self._pack(state)
        except KeyError as error:
            raise ModelError(
                f"the model has no weight {error}; the fast decoder wants a plain {MODEL_TYPES} model"
            ) from error

    def drop_weights(self) -> None:
        """Give back the memory of packed weights and caches; see `Decoder.drop_weights`."""
        self.end()
        self._layers, self._head = [], None
        self._embedding = torch.empty(0)

    def _allocate(self, state: Mapping[str, torch.Tensor]) -> None:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        gate_up = 2 * round_up(self.feed_forward, TILE)
        layer = [
            (qkv, self.hidden, "layers.0.self_attn.q_proj.bias"),
            (self.hidden, self.heads * self.head_dim, "layers.0.self_attn.o_proj.bias"),
            (gate_up, self.hidden, "layers.0.mlp.gate_proj.bias"),
            (self.hidden, self.feed_forward, "layers.0.mlp.down_proj.bias"),
        ]
        biases = state.keys()
        self._layers = [LayerWeights(*self._rooms(layer, biases)) for _ in range(self.layer_count)]
        [self._head] = self._rooms([(self.vocabulary, self.hidden, "lm_head.bias")], biases)
        self._embedding = torch.empty(self.vocabulary, self.hidden, dtype=self.dtype)

    def _rooms(self, shapes: Sequence[tuple[int, int, str]], biases: Collection[str]) -> list[PackedWeights]:
        """Zeros for packed weights `[n, k]` with a bias if it is among `biases`; one piece of memory, in order of use.

        A layer has its own: all layers in one would need a hole of their size in what the update has freed, and find
        none. Large pages only come to memory not yet touched.
        """
        sizes = [self.kernels.packed_bytes(self.engine, n, k) for n, k, _ in shapes]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self.kernels.advise_huge_pages(memory)
        return [
            PackedWeights(self.engine, n, k, data, torch.zeros(n) if bias in biases else None)
            for (n, k, bias), data in zip(shapes, memory.zero_().split(sizes), strict=True)
        ]

    def _pack(self, state: Mapping[str, torch.Tensor]) -> None:
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for index, layer in enumerate(self._layers):
            prefix = f"layers.{index}."
            norm = state[prefix + "input_layernorm.weight"].float()
            for name, first in (("q", 0), ("k", q_rows), ("v", q_rows + kv_rows)):
                self._pack_linear(layer.qkv, state, f"{prefix}self_attn.{name}_proj", scale=norm, first=first)
            self._pack_linear(layer.output, state, f"{prefix}self_attn.o_proj")
            norm = state[prefix + "post_attention_layernorm.weight"].float()
            for name, first in (("gate", 0), ("up", TILE)):
                self._pack_linear(
                    layer.gate_up, state, f"{prefix}mlp.{name}_proj", scale=norm, first=first, group=TILE
                )
            self._pack_linear(layer.down, state, f"{prefix}mlp.down_proj")
        embedding = state["embed_tokens.weight"]
        self._embedding.copy_(embedding)
        assert self._head is not None
        # A tied head is missing from some states.
        self.kernels.pack(
            self._head, state.get("lm_head.weight", embedding), scale=state["norm.weight"].float()
        )

    def _pack_linear(
        self,
        weights: PackedWeights,
        state: Mapping[str, torch.Tensor],
        name: str,
        *,
        scale: torch.Tensor | None = None,
        first: int = 0,
        group: int | None = None,
    ) -> None:
        """One linear layer's rows to columns first.. of a product; grouped rows alternate with another's."""
        matrix = state[name + ".weight"]
        stride = PANEL if group else None
        self.kernels.pack(weights, matrix, scale=scale, first=first, group=group, group_stride=stride)
        if weights.bias is not None:
            row = torch.arange(len(matrix))
            column = first + (row // group * PANEL + row % group if group else row)
            weights.bias[column] = state[name + ".bias"].float()

    # Rounds

    def begin(self, prefixes: Sequence[Tokens], slots: int, max_new_tokens: int) -> torch.Tensor:
        """Compute every prefix once and make room for `slots` rows of `max_new_tokens`.

        Returns the logits after the last token of each prefix, fp32 `[len(prefixes), vocabulary]`.
        """
        if not self._layers:
            raise ModelError("the decoder has no weights yet: call load_weights() first")
        if not prefixes or min(len(prefix) for prefix in prefixes) == 0:
            raise ValueError("every prefix needs at least one token")
        self.end()
        lengths = np.array([len(prefix) for prefix in prefixes], np.int64)
        self._round = round_ = self._make_round(lengths, slots, max_new_tokens)
        tokens = np.concatenate(list(prefixes)).astype(np.int64)
        prefix = np.repeat(np.arange(len(prefixes)), lengths)
        position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        last = np.cumsum(lengths) - 1
        final = torch.empty(len(prefixes), self.hidden)
        for start in range(0, len(tokens), round_.rows):
            part = slice(start, start + round_.rows)
            round_.spans.write(
                prefix_length=np.zeros(len(tokens[part]), np.int64),
                own_first=round_.prefix_first[prefix[part]],
                own_capacity=-(-lengths[prefix[part]] // KV_BLOCK),
                own_length=position[part],
                position=position[part],
            )
            self._run_layers(round_, tokens[part])
            (ended,) = np.nonzero((last >= start) & (last < start + round_.rows))
            final[ended] = round_.residual[last[ended] - start]
        return self._head_of_prefixes(final)

    def step(
        self, slots: np.ndarray, prefixes: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> torch.Tensor:
        """Append one token to each row; fp32 logits `[rows, vocabulary]`, valid until the next step.

        Args:
            slots: int32 `[rows]`, which slot each row writes to, all different.
            prefixes: int32 `[rows]`, index into begin()'s prefixes.
            tokens: int32 `[rows]`, the token to append.
            lengths: int32 `[rows]`, tokens already in the row's slot.
        """
        round_ = self._round
        if round_ is None:
            raise ValueError("step() outside begin() and end()")
        rows = len(tokens)
        room = len(round_.logits)
        # The kernels write where they are told to: nothing behind this would notice a wrong place.
        if rows > room or not (0 <= slots.min() <= slots.max() < room):
            raise ValueError(f"{rows} rows in slots {slots.min()}..{slots.max()} of a round of {room} slots")
        if not (0 <= lengths.min() <= lengths.max() < round_.max_new_tokens):
            raise ValueError(
                f"lengths {lengths.min()}..{lengths.max()} leave no room for a token: max_new_tokens is"
                f" {round_.max_new_tokens}"
            )
        prefix_length = round_.prefix_length[prefixes]
        round_.spans.write(
            prefix_first=round_.prefix_first[prefixes],
            prefix_capacity=-(-prefix_length // KV_BLOCK),
            prefix_length=prefix_length,
            own_first=round_.first_slot_block + slots.astype(np.int64) * round_.slot_blocks,
            own_capacity=round_.slot_blocks,
            own_length=lengths,
            position=prefix_length + lengths,
        )
        self._run_layers(round_, tokens.astype(np.int64))
        self.kernels.rms_norm(round_.residual, round_.normed, rows, self.epsilon)
        round_.head(rows)
        return round_.logits[:rows]

    def release(self, slot: int) -> None:
        """See `Decoder.release`: a step touches no slot but its own, so there is nothing to do."""

    def copy_slots(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Let slots go on from where others stand; see `Decoder.copy_slots`."""
        assert self._round is not None
        own = self._round.own
        own[:, torch.from_numpy(targets).long()] = own[:, torch.from_numpy(sources).long()]

    def draw(self, logits: torch.Tensor, uniform: np.ndarray, sampling: SamplingSettings) -> Drawn:
        """Draw one token a row; see `Decoder.draw`."""
        return draw_rows(logits, uniform, sampling)

    def end(self) -> None:
        """Drop the caches of this round."""
        self._round = None

    def _run_layers(self, round_: Round, tokens: np.ndarray) -> None:
        """From token ids to the residual stream behind the last layer, for rows placed by `spans`."""
        rows = len(tokens)
        round_.residual[:rows] = self._embedding[torch.from_numpy(tokens)]
        for layer in round_.layers:
            self.kernels.rms_norm(round_.residual, round_.normed, rows, self.epsilon)
            layer.qkv(rows)
            self.kernels.attention(layer.attention, rows)
            layer.output(rows)
            self.kernels.rms_norm(round_.residual, round_.normed, rows, self.epsilon)
            layer.gate_up(rows)
            layer.down(rows)

    def _head_of_prefixes(self, residual: torch.Tensor) -> torch.Tensor:
        assert self._head is not None
        rows = len(residual)
        normed = activations(rows, self.hidden, self.dtype)
        logits = torch.empty(rows, self.vocabulary)
        self.kernels.rms_norm(residual, normed, rows, self.epsilon)
        self.kernels.product(normed, self._head, logits, Epilogue.STORE_FP32)(rows)
        return logits

    def _make_round(self, lengths: np.ndarray, slots: int, max_new_tokens: int) -> Round:
        assert self._head is not None
        rows = max(slots, min(int(lengths.sum()), PREFILL_ROWS))
        prefix_blocks = -(-lengths // KV_BLOCK)
        slot_blocks = -(-max_new_tokens // KV_BLOCK)
        first_slot_block = int(prefix_blocks.sum())
        blocks = first_slot_block + slots * slot_blocks
        residual = torch.empty(rows, self.hidden)
        normed = activations(rows, self.hidden, self.dtype)
        qkv = torch.empty(rows, (self.heads + 2 * self.kv_heads) * self.head_dim)
        context = activations(rows, self.heads * self.head_dim, self.dtype)
        inner = activations(rows, self.feed_forward, self.dtype)
        logits = torch.empty(slots, self.vocabulary)
        positions = torch.arange(int(lengths.max()) + max_new_tokens)
        cosines, sines = (
            table[0, :, : self.head_dim // 2].contiguous()
            for table in self._rotary(torch.empty(0, dtype=torch.float32), positions[None])
        )
        cache = self._make_cache(blocks)
        spans = RowSpans(rows)
        exact = self.dtype == torch.float32
        gate = Epilogue.GATE_FP32 if exact else Epilogue.GATE_BF16
        product = self.kernels.product
        layers = [
            LayerStep(
                qkv=product(normed, weights.qkv, qkv, Epilogue.STORE_FP32),
                attention=AttentionFields(
                    qkv=qkv.data_ptr(),
                    qkv_stride=qkv.stride(0),
                    cosines=cosines.data_ptr(),
                    sines=sines.data_ptr(),
                    cache=cache[index].data_ptr(),
                    out=context.data_ptr(),
                    out_stride=context.stride(0),
                    heads=self.heads,
                    kv_heads=self.kv_heads,
                    head_dim=self.head_dim,
                    scale=self.head_dim**-0.5,
                    bf16_cache=not exact,
                    **spans.addresses(),
                ),
                output=product(context, weights.output, residual, Epilogue.ADD_FP32),
                gate_up=product(normed, weights.gate_up, inner, gate),
                down=product(inner, weights.down, residual, Epilogue.ADD_FP32),
            )
            for index, weights in enumerate(self._layers)
        ]
        return Round(
            rows=rows,
            residual=residual,
            normed=normed,
            logits=logits,
            head=product(normed, self._head, logits, Epilogue.STORE_FP32),
            layers=layers,
            spans=spans,
            prefix_first=np.cumsum(prefix_blocks) - prefix_blocks,
            prefix_length=lengths,
            first_slot_block=first_slot_block,
            slot_blocks=slot_blocks,
            max_new_tokens=max_new_tokens,
            own=cache.view(self.layer_count, blocks, -1)[:, first_slot_block:].view(
                self.layer_count, slots, -1
            ),
            keep=(qkv, context, inner, cosines, sines, cache),
        )

    def _make_cache(self, blocks: int) -> torch.Tensor:
        """Keys and values of all layers; what a row has not written is never read, so it needs no zeros."""
        block = KV_BLOCK * (self.head_dim + round_up(self.head_dim, TILE))
        try:
            cache = torch.empty(self.layer_count, blocks * self.kv_heads * block, dtype=self.dtype)
        except RuntimeError as error:
            raise ResourceError(
                f"no memory for the key/value cache: {blocks} blocks of {KV_BLOCK} positions in"
                f" {self.layer_count} layers. Lower the number of slots or max_new_tokens."
            ) from error
        self.kernels.advise_huge_pages(cache)
        return cache
