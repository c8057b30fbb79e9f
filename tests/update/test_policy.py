"""The packed forward pass on model families that treat positions, windows and logits in their own ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from graft.errors import ModelError
from graft.update import attention
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision, check_packed_forward
from tests.trees import random_credit, random_deep_tree

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}

GPT2 = GPT2Config(
    vocab_size=120,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)

RIGHT: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral without a window": MistralConfig(**SIZES, sliding_window=None),
    "gpt2": GPT2,  # learned positions
}

REFUSED: dict[str, PretrainedConfig] = {
    "mistral with a short window": MistralConfig(**SIZES, sliding_window=8),
    "gemma2, capped logits": Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4096, final_logit_softcapping=5.0
    ),
    "gemma2, capped attention": Gemma2Config(
        **SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4096,
        final_logit_softcapping=None,
        attn_logit_softcapping=0.5,
    ),
}


def forward_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PolicyForward:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return PolicyForward(model, Precision("exact", torch.device("cpu")))


@pytest.mark.parametrize("config", RIGHT.values(), ids=RIGHT)
def test_families_that_can_be_packed(config):
    forward = forward_of(config)
    check_packed_forward(forward, tolerance=1e-4)
    assert forward.model.config._attn_implementation == attention.NAME  # left as it was


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_families_that_would_train_wrongly_are_refused(config):
    forward = forward_of(config)
    with pytest.raises(
        ModelError, match=rf"model type '{config.model_type}': .* differ by .* use another model"
    ):
        check_packed_forward(forward)
    assert forward.model.config._attn_implementation == attention.NAME


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ModelError, match="LM head has a bias"):
        forward_of(PhiConfig(**SIZES))  # Phi's has one


def test_a_model_without_a_head_is_refused():
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="model type 'llama' has no LM head"):
        PolicyForward(model, Precision("exact", torch.device("cpu")))


def test_a_model_that_goes_its_own_way_is_refused():
    """Bloom computes its own attention, with ALiBi."""
    config = BloomConfig(
        vocab_size=120,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    with pytest.raises(ModelError, match="model type 'bloom'"):
        check_packed_forward(forward_of(config))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_models_own_logits(temperature):
    forward = forward_of(RIGHT["qwen2"])
    rng = np.random.default_rng(0)
    trees = [random_deep_tree(rng, row=i, vocabulary=120) for i in range(2)]
    credits = [random_credit(tree, rng) for tree in trees]
    [batch] = pack(trees, credits, token_budget=10_000)
    with torch.no_grad():
        scores = forward(batch, temperature=temperature)
        forward.model.set_attn_implementation("eager")
        for where in batch.slices:
            tree = trees[where.tree]
            path = np.concatenate([tree.nodes[i].tokens for i in tree.path(where.node)]).astype(np.int64)
            tokens = torch.from_numpy(path)[None]
            log_p = (forward.model(input_ids=tokens, use_cache=False).logits[0] / temperature).log_softmax(-1)
            own = slice(tree.start(where.node) - 1, len(path) - 1)
            expected = log_p[own].gather(1, tokens[0, own.start + 1 :, None])[:, 0]
            torch.testing.assert_close(
                scores.logprobs[where.start : where.end], expected, atol=1e-5, rtol=1e-5
            )
            entropy = -(log_p[own].exp() * log_p[own]).sum(-1)
            torch.testing.assert_close(
                scores.entropies[where.start : where.end], entropy, atol=1e-5, rtol=1e-5
            )


def test_autocast_is_near_the_exact_pass_and_its_scores_are_fp32():
    forward = forward_of(RIGHT["llama"])
    rng = np.random.default_rng(2)
    tree = random_deep_tree(rng, vocabulary=120)
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=10_000)
    with torch.no_grad():
        exact = forward(batch, temperature=1.0).logprobs
        rounded = PolicyForward(forward.model, Precision("bf16", torch.device("cpu")))(batch, temperature=1.0)
    assert rounded.logprobs.dtype == rounded.entropies.dtype == torch.float32
    assert 0 < (rounded.logprobs - exact).abs().mean() < 0.1
