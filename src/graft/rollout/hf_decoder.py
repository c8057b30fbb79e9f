"""The generic decode path: any Hugging Face causal model, with our own key/value cache.

Keys and values enter and leave through transformers' AttentionInterface under the name `graft_cache`. Every prefix
goes through the network once; its keys and values are copied, not computed, into the slots that continue it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft.kernels.library import Kernels
from graft.kernels.packed_linear import PackedLinears
from graft.rollout.sampling import Drawn, SamplingSettings, draw_rows
from graft.types import Tokens

NAME = "graft_cache"

PREFILL_TOKENS = 4096
"""Prefix tokens, padding included, that go through the network at once."""

COMPACT_BELOW = 0.75
"""When fewer than this share of the cache's rows are alive, the dead ones are squeezed out."""


class HuggingFaceDecoder:
    """`Decoder` over a copy of a Hugging Face model."""

    name = "generic"
    width_invariant = False  # the library's matrix products may choose another kernel for another width

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        """Build an empty model of this configuration; `load_weights` fills it.

        Args:
            config: of the plain model, without adapters.
            dtype: of weights, cache and matrix products; logits are fp32.
            device: where it runs.
            kernels: compute the linear layers, where they have an engine for this type on the CPU; None: torch does.
        """
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_for_transformers)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
        with torch.device(device):
            self._model: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=NAME
            )
        self._model.eval().requires_grad_(False)
        self._body: nn.Module = self._model.get_decoder()  # pyright: ignore[reportCallIssue]
        self._head: nn.Module = self._model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        self._device = device
        self._cache = _Cache()
        engine = kernels.engine_for(dtype) if kernels is not None and device.type == "cpu" else None
        self.packed = None  # what computes the linear layers instead of torch
        if kernels is not None and engine is not None:
            self.packed = PackedLinears(self._model, kernels, engine)

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights in; `state` is the plain model's state dict."""
        for name, target in self._model.state_dict(keep_vars=True).items():
            if target.shape != state[name].shape:  # after drop_weights
                target.data = target.data.new_empty(state[name].shape)
            target.copy_(state[name])
        if self.packed is not None:
            self.packed.load()
        self._cache = _Cache()

    def drop_weights(self) -> None:
        """Give back the memory of weights and caches; see `Decoder.drop_weights`."""
        self._cache = _Cache()
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        if self.packed is not None:
            self.packed.drop()

    @torch.no_grad()
    def begin(self, prefixes: Sequence[Tokens], slots: int, max_new_tokens: int) -> Tensor:
        """Compute every prefix once; see `Decoder.begin`."""
        cache = self._cache = _Cache()
        cache.prefix_lengths = np.array([len(p) for p in prefixes])
        cache.capacity = int(cache.prefix_lengths.max()) + max_new_tokens
        cache.reserve(slots)
        logits: list[Tensor | None] = [None] * len(prefixes)
        for group in _by_length(cache.prefix_lengths, PREFILL_TOKENS):
            longest = int(cache.prefix_lengths[group].max())
            tokens = np.zeros((len(group), longest), dtype=np.int64)
            for row, prefix in enumerate(group):
                tokens[row, : len(prefixes[prefix])] = prefixes[prefix]
            cache.filling = group
            hidden = self._forward(torch.from_numpy(tokens), torch.arange(longest).expand(len(group), -1))
            last = torch.from_numpy(cache.prefix_lengths[group] - 1).to(self._device)
            scores = self._logits(hidden[torch.arange(len(group), device=self._device), last])
            for row, prefix in enumerate(group):
                logits[prefix] = scores[row]
        cache.filling = None
        return torch.stack([x for x in logits if x is not None])

    @torch.no_grad()
    def step(
        self, slots: np.ndarray, prefixes: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Append one token to each row; see `Decoder.step`."""
        cache = self._cache
        for slot, prefix in zip(slots[lengths == 0], prefixes[lengths == 0], strict=True):
            cache.enter(int(slot), int(prefix))
        rows = cache.compact(slots)
        positions = np.zeros(cache.rows, dtype=np.int64)
        positions[rows] = cache.prefix_lengths[prefixes] + lengths
        ids = np.zeros(cache.rows, dtype=np.int64)
        ids[rows] = tokens
        cache.point_at(torch.from_numpy(positions).to(self._device))
        cache.stepping = torch.from_numpy(rows).to(self._device)
        hidden = self._forward(torch.from_numpy(ids)[:, None], torch.from_numpy(positions)[:, None])
        return self._logits(hidden[cache.stepping, 0])

    def release(self, slot: int) -> None:
        """Its row may be squeezed out; see `Decoder.release`."""
        self._cache.alive.discard(slot)

    def copy_slots(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Let slots go on from where others stand; see `Decoder.copy_slots`."""
        self._cache.copy(sources.tolist(), targets.tolist())

    def draw(self, logits: Tensor, uniform: np.ndarray, sampling: SamplingSettings) -> Drawn:
        """Draw one token a row; see `Decoder.draw`."""
        return draw_rows(logits, uniform, sampling)

    def end(self) -> None:
        """Drop the cache."""
        self._cache = _Cache()

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._body(
            input_ids=tokens.to(self._device),
            position_ids=positions.to(self._device),
            use_cache=False,
            graft_cache=self._cache,
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.packed is not None and self.packed.holds(self._head):
            return self.packed.multiply(self._head, hidden, torch.float32)
        return self._head(hidden).float()


class _Cache:
    """Keys and values of one round: the prefixes', and one row for each slot in use."""

    def __init__(self) -> None:
        self.prefix_lengths = np.zeros(0, dtype=np.int64)
        self.capacity = 0
        self.filling: np.ndarray | None = None  # prefixes that the current forward pass computes
        self.rows = 0
        self.alive: set[int] = set()  # slots that grow or wait
        self.stepping = torch.zeros(0, dtype=torch.int64)  # rows that the current forward pass appends to
        self._row_of: dict[int, int] = {}  # slot -> row
        self._prefixes: list[
            dict[int, tuple[Tensor, Tensor]]
        ] = []  # layer -> prefix -> keys, values [heads, n, width]
        self._layers: list[tuple[Tensor, Tensor]] = []  # layer -> keys, values [rows, heads, capacity, width]
        self._positions = torch.zeros(0)
        self._mask = torch.zeros(0)
        self._length = 0

    def reserve(self, slots: int) -> None:
        """Every slot starts with a row of its own."""
        self.rows = slots
        self._row_of = {slot: slot for slot in range(slots)}

    def enter(self, slot: int, prefix: int) -> None:
        """Let a slot start again after a prefix: copy the prefix's keys and values into its row."""
        self._take(slot)
        row, length = self._row_of[slot], int(self.prefix_lengths[prefix])
        for layer, stored in enumerate(self._prefixes):
            keys, values = stored[prefix]
            if len(self._layers) <= layer:
                shape = (self.rows, keys.shape[0], self.capacity, keys.shape[2])
                self._layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
            self._layers[layer][0][row, :, :length] = keys
            self._layers[layer][1][row, :, :length] = values

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the rows of slots into those of others."""
        for slot in targets:
            self._take(slot)
        to, of = ([self._row_of[slot] for slot in slots] for slots in (targets, sources))
        for keys, values in self._layers:
            keys[to], values[to] = keys[of], values[of]

    def _take(self, slot: int) -> None:
        """Begin to use a slot; one that was squeezed out gets a row again."""
        self.alive.add(slot)
        if slot in self._row_of:
            return
        self._row_of[slot] = self.rows
        self.rows += 1
        self._layers = [
            (torch.cat([k, torch.zeros_like(k[:1])]), torch.cat([v, torch.zeros_like(v[:1])]))
            for k, v in self._layers
        ]

    def compact(self, slots: np.ndarray) -> np.ndarray:
        """Rows of these slots, after squeezing out dead rows if there are many."""
        if len(self.alive) < COMPACT_BELOW * self.rows:
            kept = sorted(self.alive)
            keep = torch.tensor([self._row_of[slot] for slot in kept])
            self._layers = [
                (k.index_select(0, keep.to(k.device)), v.index_select(0, keep.to(v.device)))
                for k, v in self._layers
            ]
            self._row_of = {slot: row for row, slot in enumerate(kept)}
            self.rows = len(kept)
        return np.array([self._row_of[int(s)] for s in slots])

    def point_at(self, positions: Tensor) -> None:
        """Set where the next keys and values go, and what each row sees."""
        self._positions = positions
        self._length = int(positions.max()) + 1
        seen = torch.arange(self._length, device=positions.device) <= positions[:, None]
        self._mask = seen[:, None, None, :]

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention of the prefixes being computed; keeps their keys and values."""
        assert self.filling is not None
        if len(self._prefixes) <= layer:
            self._prefixes.append({})
        for row, prefix in enumerate(self.filling):
            length = int(self.prefix_lengths[prefix])
            self._prefixes[layer][int(prefix)] = (
                key[row, :, :length].clone(),
                value[row, :, :length].clone(),
            )
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )

    def append(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One more position for the rows that take a step: query `[rows, heads, 1, width]`, of all rows."""
        keys, values = self._layers[layer]
        own, at = self.stepping, self._positions[self.stepping]
        keys[own, :, at] = key[own, :, 0]
        values[own, :, at] = value[own, :, 0]
        rows, heads, _, width = query.shape
        # query heads that share a key head become its queries: keys and values are not repeated
        folded = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
        out = torch.nn.functional.scaled_dot_product_attention(
            folded,
            keys[:, :, : self._length],
            values[:, :, : self._length],
            attn_mask=self._mask,
            scale=scale,
        )
        return out.reshape(rows, heads, 1, width)


def _by_length(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices in groups of similar length whose padded size stays within the budget."""
    groups: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable")[::-1]:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(g) for g in groups]


def _no_mask(*_: Any, **__: Any) -> None:
    """The cache says what is seen; transformers need not build a mask."""


def _attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    graft_cache: _Cache,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    step = graft_cache.append if graft_cache.filling is None else graft_cache.prefill
    return step(layer, query, key, value, scale).transpose(1, 2), None
