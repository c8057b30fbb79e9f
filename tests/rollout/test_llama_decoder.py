"""The fast decoder against Hugging Face's fp32 forward pass, on tiny random models of awkward shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from graft.errors import ModelError
from graft.kernels.library import Engine, Kernels, load_kernels
from graft.rollout.llama_decoder import LlamaDecoder, supports

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {
        "hidden_size": 60,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    | {"head_dim": 16, "vocab_size": 97, "tie_word_embeddings": False},
    "multi-head, tied": {"hidden_size": 40, "intermediate_size": 50, "num_attention_heads": 5}
    | {"num_key_value_heads": 5, "vocab_size": 101, "tie_word_embeddings": True},
    "one key head, biases": {"hidden_size": 70, "intermediate_size": 36, "num_attention_heads": 5}
    | {"num_key_value_heads": 1, "head_dim": 80, "vocab_size": 33, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "hidden_size": 36,
        "intermediate_size": 33,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    | {"head_dim": 14, "vocab_size": 64}
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn rope": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    | {"vocab_size": 40}
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}

QWEN2 = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "vocab_size": 90,
    "tie_word_embeddings": True,
}

PREFIX_LENGTHS = (1, 16, 5, 33)
SLOTS = 6
NEW_TOKENS = 20


def make_model(name: str, seed: int = 0) -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(seed)
    common = {"num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.25}
    if name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN2, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], **common))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in parameter_name:  # ones at first, which would hide a forgotten fold
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def kernels() -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    return Kernels(found.path)


def hold_to(kernels: Kernels, engine: Engine) -> Kernels:
    if engine not in kernels.engines:
        pytest.skip(f"this CPU has no {engine.name} products")
    kernels.engines = frozenset({engine})
    return kernels


@pytest.fixture(params=list(Engine), ids=lambda engine: engine.name)
def engine_kernels(request: pytest.FixtureRequest, kernels: Kernels) -> tuple[Kernels, torch.dtype]:
    """Kernels that are held to one engine, and its type."""
    return hold_to(kernels, request.param), request.param.dtype


@pytest.fixture(params=[Engine.BF16, Engine.AMX], ids=lambda engine: engine.name)
def bf16_kernels(request: pytest.FixtureRequest, kernels: Kernels) -> Kernels:
    return hold_to(kernels, request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Script:
    """Rows that come and go, so that slots are used again and the batch shrinks and grows."""

    def __init__(self, vocabulary: int, seed: int = 1) -> None:
        self.generator = np.random.default_rng(seed)
        self.prefixes = [
            self.generator.integers(0, vocabulary, length).astype(np.int32) for length in PREFIX_LENGTHS
        ]
        # (first step, slot, prefix, tokens): slots 0, 3 and 5 are used twice.
        plan = [(0, 0, 0, 7), (0, 1, 3, 20), (0, 2, 2, 3), (0, 3, 3, 2), (1, 4, 1, 17), (2, 5, 0, 1)]
        plan += [(7, 0, 3, 13), (2, 3, 1, 18), (4, 5, 2, 16)]
        self.rows = [
            (first, slot, prefix, self.generator.integers(0, vocabulary, count).astype(np.int32))
            for first, slot, prefix, count in plan
        ]

    def run(self, decoder: LlamaDecoder, *, width: int = SLOTS, reverse: bool = False) -> list[torch.Tensor]:
        """Logits `[1 + tokens, vocabulary]` of each row: after its prefix, then after each token.

        At most `width` rows share a batch.
        """
        first = decoder.begin(self.prefixes, SLOTS, NEW_TOKENS)
        logits = [[first[prefix].clone()] for _, _, prefix, _ in self.rows]
        for now in range(NEW_TOKENS):
            active = [
                index
                for index, (start, _, _, tokens) in enumerate(self.rows)
                if start <= now < start + len(tokens)
            ]
            active = active[::-1] if reverse else active
            for at in range(0, len(active), width):
                part = active[at : at + width]
                rows = [self.rows[index] for index in part]
                done = decoder.step(
                    np.array([slot for _, slot, _, _ in rows], np.int32),
                    np.array([prefix for _, _, prefix, _ in rows], np.int32),
                    np.array([tokens[now - start] for start, _, _, tokens in rows], np.int32),
                    np.array([now - start for start, _, _, _ in rows], np.int32),
                )
                for index, row in zip(part, done, strict=True):
                    logits[index].append(row.clone())
        decoder.end()
        return [torch.stack(rows) for rows in logits]

    @torch.no_grad()
    def reference(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """The same logits from whole sequences through the model."""
        result = []
        for _, _, prefix, tokens in self.rows:
            sequence = np.concatenate([self.prefixes[prefix], tokens]).astype(np.int64)
            logits = model(torch.from_numpy(sequence)[None]).logits[0]
            result.append(logits[len(self.prefixes[prefix]) - 1 :])
        return result


def decoder_for(model: Any, kernels: Kernels, dtype: torch.dtype) -> LlamaDecoder:
    decoder = LlamaDecoder(model.config, kernels, dtype)
    decoder.load_weights(model.state_dict())
    return decoder


def worst_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference of any log-probability, nats."""
    return max(
        (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item() for a, b in zip(left, right, strict=True)
    )


def mean_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Mean difference of all log-probabilities, nats."""
    pairs = zip(left, right, strict=True)
    return (
        torch.cat([(a.log_softmax(-1) - b.log_softmax(-1)).abs().flatten() for a, b in pairs]).mean().item()
    )


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", [*SHAPES, "qwen2"])
def test_fp32_is_hugging_faces_forward_pass(kernels, name):
    model = make_model(name)
    script = Script(model.config.vocab_size)
    logits = script.run(decoder_for(model, kernels, torch.float32))
    expected = script.reference(model)
    assert max(row.std().item() for row in expected) > 0.5  # not a model that says the same of everything
    assert worst_difference(logits, expected) < 1e-4


@pytest.mark.parametrize("name", [*SHAPES, "qwen2"])
def test_bf16_is_as_close_as_autocast(bf16_kernels, name):
    model = make_model(name)
    script = Script(model.config.vocab_size)
    expected = script.reference(model)
    ours = mean_difference(script.run(decoder_for(model, bf16_kernels, torch.bfloat16)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = mean_difference([row.float() for row in script.reference(model)], expected)
    assert 1e-4 < ours < 1.1 * theirs


@pytest.mark.parametrize("name", ["grouped", "multi-head, tied", "one key head, biases"])
def test_a_row_does_not_depend_on_the_batch(engine_kernels, name, threads):
    kernels, dtype = engine_kernels
    model = make_model(name)
    script = Script(model.config.vocab_size)
    decoder = decoder_for(model, kernels, dtype)
    torch.set_num_threads(2)
    whole = script.run(decoder)
    assert all_equal(script.run(decoder), whole)
    for width in (1, 2, 5):
        assert all_equal(script.run(decoder, width=width), whole)
    assert all_equal(script.run(decoder, reverse=True), whole)
    torch.set_num_threads(1)
    assert all_equal(script.run(decoder), whole)


def test_wide_batches_and_long_prefixes(engine_kernels):
    """More rows than a tile and more prefix tokens than are computed at once."""
    kernels, dtype = engine_kernels
    model = make_model("grouped")
    decoder = decoder_for(model, kernels, dtype)
    generator = np.random.default_rng(2)
    prefixes = [generator.integers(0, 97, length).astype(np.int32) for length in (300, 7, 290)]
    rows = 70
    which, tokens = (
        generator.integers(0, 3, rows).astype(np.int32),
        generator.integers(0, 97, rows).astype(np.int32),
    )
    slots = generator.permutation(rows).astype(np.int32)
    lengths = np.zeros(rows, np.int32)
    first = decoder.begin(prefixes, rows, 4)
    wide = decoder.step(slots, which, tokens, lengths).clone()
    second = decoder.begin(prefixes, rows, 4)
    narrow = [
        decoder.step(slots[r : r + 1], which[r : r + 1], tokens[r : r + 1], lengths[r : r + 1]).clone()
        for r in range(rows)
    ]
    assert first.equal(second)
    assert torch.cat(narrow).equal(wide)
    alone = decoder.begin(prefixes[2:], 1, 1)
    assert alone[0].equal(first[2])

    if dtype == torch.float32:
        with torch.no_grad():
            for row in (0, 33, 69):
                sequence = torch.from_numpy(np.append(prefixes[which[row]], tokens[row]).astype(np.int64))
                expected = model(sequence[None]).logits[0]
                assert worst_difference([expected[-2:]], [torch.stack([first[which[row]], wide[row]])]) < 1e-4


def test_new_weights_take_the_place_of_the_old(engine_kernels):
    kernels, dtype = engine_kernels
    old, new = make_model("one key head, biases"), make_model("one key head, biases", seed=5)
    script = Script(old.config.vocab_size)
    decoder = decoder_for(old, kernels, dtype)
    before = script.run(decoder)

    def places() -> list[int]:
        return [
            w.data.data_ptr() for own in decoder._layers for w in (own.qkv, own.output, own.gate_up, own.down)
        ]

    first = places()
    decoder.load_weights(new.state_dict())
    assert places() == first
    after = script.run(decoder)
    assert all_equal(after, script.run(decoder_for(new, kernels, dtype)))
    assert not all_equal(after, before)


def test_weights_are_a_copy(kernels):
    model = make_model("multi-head, tied")
    script = Script(model.config.vocab_size)
    decoder = decoder_for(model, kernels, torch.float32)
    before = script.run(decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all_equal(script.run(decoder), before)


def test_state_dict_without_the_tied_head_and_in_bf16(kernels):
    model = make_model("multi-head, tied")
    state = {
        name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    model.load_state_dict(state, strict=False)
    script = Script(model.config.vocab_size)
    decoder = LlamaDecoder(model.config, kernels, torch.float32)
    decoder.load_weights(state)
    assert worst_difference(script.run(decoder), script.reference(model)) < 1e-4


def config(kind: type[PreTrainedConfig] = LlamaConfig, **settings: Any) -> PreTrainedConfig:
    return kind(**{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **settings})


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (config(), None),
        (config(Qwen2Config), None),
        (config(MistralConfig), "model type 'mistral'"),
        (config(hidden_act="gelu"), "activation 'gelu'"),
        (config(Qwen2Config, use_sliding_window=True, sliding_window=8), "sliding window"),
        (config(num_key_value_heads=3), "evenly"),
        (config(quantization_config={"quant_method": "gptq"}), "quantised"),
        (
            config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rotary embedding 'dynamic'",
        ),
        (
            config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "only a part of each head",
        ),
    ],
)
def test_supports(asked, reason):
    said = supports(asked)
    if reason is None:
        assert said is None
    else:
        assert said is not None
        assert reason in said


def test_refusals(kernels):
    with pytest.raises(ModelError, match="cannot run this model: activation 'gelu'"):
        LlamaDecoder(config(hidden_act="gelu"), kernels, torch.float32)
    with pytest.raises(ModelError, match=r"no torch\.float16 products"):
        LlamaDecoder(config(), kernels, torch.float16)
    model = make_model("grouped")
    decoder = LlamaDecoder(model.config, kernels, torch.float32)
    prefix = np.zeros(3, np.int32)
    with pytest.raises(ModelError, match="no weights yet"):
        decoder.begin([prefix], 1, 1)
    with pytest.raises(ModelError, match=r"layers\.0\.input_layernorm\.weight"):
        decoder.load_weights({"embed_tokens.weight": torch.zeros(97, 60)})
    decoder.load_weights(model.state_dict())
    with pytest.raises(ValueError, match="at least one token"):
        decoder.begin([prefix, prefix[:0]], 1, 1)
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="outside begin"):
        decoder.step(one, one, one, one)
    decoder.begin([prefix], 2, 3)
    decoder.step(one, one, one, one)
    for length in (3, -1):
        with pytest.raises(ValueError, match="max_new_tokens is 3"):
            decoder.step(one, one, one, one + length)
    for slot in (2, -1):
        with pytest.raises(ValueError, match="a round of 2 slots"):
            decoder.step(one + slot, one, one, one)
    with pytest.raises(ValueError, match="3 rows in slots"):
        decoder.step(*(np.zeros(3, np.int32) for _ in range(4)))
    decoder.end()
    with pytest.raises(ValueError, match="outside begin"):
        decoder.step(one, one, one, one)
