"""The generic decoder against whole sequences through the model, with slots that leave, stand empty and come back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from graft.kernels import load_kernels
from graft.kernels.library import Kernels
from graft.kernels.packed_linear import PackedLinears
from graft.rollout import hf_decoder
from graft.rollout.hf_decoder import HuggingFaceDecoder

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    # learned positions: they must come from `position_ids`, not from counting the tokens of a call
    "gpt2": GPT2Config(
        vocab_size=90,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, initializer_range=0.2),
}

PREFIXES = [np.random.default_rng(0).integers(0, 90, n).astype(np.int32) for n in (5, 1, 17, 9)]

# (first step, slot, prefix, tokens). Slot 3 stands empty from step 2 to 5 while the batch is small enough to be
# squeezed; slots 0 and 1 are taken over at once by rows of another prefix.
ROWS = [
    (0, 0, 2, 4),
    (0, 1, 0, 9),
    (0, 2, 1, 2),
    (0, 3, 3, 2),
    (0, 4, 0, 1),
    (4, 0, 3, 6),
    (6, 3, 2, 5),
    (9, 1, 1, 3),
    (8, 2, 0, 4),
]


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def native_kernels() -> Kernels:
    kernels = load_kernels()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    return kernels


def decoder_for(model: Any, kernels: Kernels | None = None) -> HuggingFaceDecoder:
    decoder = HuggingFaceDecoder(
        model.config, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels
    )
    decoder.load_weights(model.state_dict())
    return decoder


def play(decoder: HuggingFaceDecoder, tokens: list[np.ndarray]) -> list[torch.Tensor]:
    """Logits of each row: after its prefix, then after each of its tokens."""
    first = decoder.begin(PREFIXES, 5, 10)
    logits = [[first[prefix]] for _, _, prefix, _ in ROWS]
    for now in range(12):
        active = [i for i, (start, _, _, count) in enumerate(ROWS) if start <= now < start + count]
        if not active:
            continue
        rows = [ROWS[i] for i in active]
        done = decoder.step(
            np.array([slot for _, slot, _, _ in rows], np.int32),
            np.array([prefix for _, _, prefix, _ in rows], np.int32),
            np.array([tokens[i][now - ROWS[i][0]] for i in active], np.int32),
            np.array([now - start for start, *_ in rows], np.int32),
        )
        for i, row in zip(active, done, strict=True):
            logits[i].append(row)
            start, slot, _, count = ROWS[i]
            if now == start + count - 1:
                decoder.release(slot)
    decoder.end()
    return [torch.stack(own) for own in logits]


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_whole_sequence(config, native):
    model = make_model(config)
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, 90, count).astype(np.int32) for *_, count in ROWS]
    decoder = decoder_for(model, native_kernels() if native else None)
    for _ in range(2):  # a second round finds nothing of the first
        played = play(decoder, tokens)
        for (_, _, prefix, _), own, logits in zip(ROWS, tokens, played, strict=True):
            sequence = torch.from_numpy(np.concatenate([PREFIXES[prefix], own]).astype(np.int64))
            with torch.no_grad():
                expected = model(input_ids=sequence[None], use_cache=False).logits[0]
            assert expected.std() > 0.3
            torch.testing.assert_close(
                logits, expected[len(PREFIXES[prefix]) - 1 :], atol=1e-4, rtol=1e-4, check_dtype=False
            )
            assert logits.dtype == torch.float32


def test_rows_leave_the_cache(monkeypatch):
    """The script above does squeeze the cache, and brings a slot back after that."""
    squeezed: list[tuple[int, int]] = []
    compact = hf_decoder._Cache.compact

    def watched(self: Any, slots: np.ndarray) -> np.ndarray:
        before = self.rows
        rows = compact(self, slots)
        squeezed.append((before, self.rows))
        return rows

    monkeypatch.setattr(hf_decoder._Cache, "compact", watched)
    tokens = [np.zeros(count, np.int32) for *_, count in ROWS]
    play(decoder_for(make_model(CONFIGS["llama"])), tokens)
    assert any(after < before for before, after in squeezed)
    sizes = [after for _, after in squeezed]
    assert any(later > earlier for earlier, later in pairwise(sizes))


def test_prefixes_go_through_the_network_in_several_groups(monkeypatch):
    model = make_model(CONFIGS["llama"])
    whole = decoder_for(model).begin(PREFIXES, 1, 1)
    monkeypatch.setattr(hf_decoder, "PREFILL_TOKENS", 12)
    torch.testing.assert_close(decoder_for(model).begin(PREFIXES, 1, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (100, [[2, 3, 0, 1]]),  # 4 x 17 fits
        (40, [[2, 3], [0, 1]]),  # 2 x 17; then 2 x 5
        (10, [[2], [3], [0, 1]]),  # longer than the budget: alone
    ],
)
def test_groups_by_hand(budget, groups):
    found = hf_decoder._by_length(np.array([5, 1, 17, 9]), budget)
    assert [group.tolist() for group in found] == groups


def test_a_prefix_does_not_depend_on_the_others():
    decoder = decoder_for(make_model(CONFIGS["llama"]))
    together = decoder.begin(PREFIXES, 1, 1)
    for prefix, logits in zip(PREFIXES, together, strict=True):
        torch.testing.assert_close(decoder.begin([prefix], 1, 1)[0], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_bf16_weights_give_fp32_logits_near_those_of_fp32(native):
    model = make_model(CONFIGS["qwen2"])
    exact = decoder_for(model).begin(PREFIXES, 1, 1)
    decoder = HuggingFaceDecoder(
        model.config,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        kernels=native_kernels() if native else None,
    )
    if native and decoder.packed is None:
        pytest.skip("this CPU has no bf16 products")
    decoder.load_weights(model.state_dict())
    rounded = decoder.begin(PREFIXES, 1, 1)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_packed_layers_follow_the_weights():
    """Loaded anew after they were dropped, and loaded over others, as after every update."""
    model = make_model(CONFIGS["qwen2"])
    decoder = decoder_for(model, native_kernels())
    assert decoder.packed is not None
    first = decoder.begin(PREFIXES, 1, 1)
    decoder.drop_weights()
    decoder.load_weights(model.state_dict())
    assert torch.equal(decoder.begin(PREFIXES, 1, 1), first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    decoder.load_weights(model.state_dict())
    torch.testing.assert_close(
        decoder.begin(PREFIXES, 1, 1), decoder_for(model).begin(PREFIXES, 1, 1), atol=1e-4, rtol=1e-4
    )


def test_a_head_of_another_type_stays_torchs():
    """As in models that keep some layers in fp32."""
    model = make_model(CONFIGS["llama"])
    decoder = HuggingFaceDecoder(model.config, dtype=torch.float32, device=torch.device("cpu"))
    head = decoder._head.double()
    assert isinstance(head.weight, torch.Tensor)
    weight = head.weight
    kernels = native_kernels()
    engine = kernels.engine_for(torch.float32)
    assert engine is not None
    decoder.packed = PackedLinears(decoder._model, kernels, engine)
    decoder.load_weights(model.state_dict())
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.double(), weight)
    torch.testing.assert_close(
        decoder.begin(PREFIXES, 1, 1), decoder_for(model).begin(PREFIXES, 1, 1), atol=1e-4, rtol=1e-4
    )


def test_no_packed_layers_for_a_type_that_the_kernels_do_not_multiply():
    decoder = HuggingFaceDecoder(
        CONFIGS["llama"], dtype=torch.float64, device=torch.device("cpu"), kernels=native_kernels()
    )
    assert decoder.packed is None
