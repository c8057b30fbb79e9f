"""Models whose layers compute with the native kernels: the same up to rounding, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from graft.kernels.accelerate import accelerate
from graft.kernels.products import matmul_nt, training_kernels
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision, _probe_tree


@pytest.fixture(autouse=True)
def _amx() -> None:
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    torch.manual_seed(0)


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def loss_and_gradients(model: LlamaForCausalLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.arange(40).view(2, 20) % 100
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


def test_a_model_trains_the_same_up_to_rounding_and_can_go_back(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    exact_loss, exact = loss_and_gradients(model)
    accelerated = accelerate(model)
    assert not isinstance(accelerated, str)
    with accelerated:
        assert (
            len(accelerated.modules) == 2 * 7 + 1 + 5 + 2 + 2
        )  # linear layers, norms, MLPs, attention blocks
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == list(state)
        loss, rounded = loss_and_gradients(model)
        repeated_loss, repeated = loss_and_gradients(model)
    assert loss.equal(repeated_loss)
    assert all(a.equal(b) for a, b in zip(rounded, repeated, strict=True))
    assert 0 < abs(loss - exact_loss) < 1e-2
    errors = [
        ((a - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True) if b.norm() > 1e-4
    ]
    assert max(errors) < 0.05
    assert min(errors) > 1e-5
    after_loss, after = loss_and_gradients(model)
    assert after_loss.equal(exact_loss)
    assert all(a.equal(b) for a, b in zip(after, exact, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_exclude_autocast_and_copies(model):
    accelerated = accelerate(model, exclude={"lm_head"})
    assert not isinstance(accelerated, str)
    with accelerated:
        assert model.lm_head not in accelerated.modules
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(3, 64)
        assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.zero_()
        assert twin.model.layers[0].mlp.up_proj(x).eq(0).all()
        assert not layer(x).eq(0).all()


def test_without_amx_it_says_so(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_KERNELS", "off")
    training_kernels.cache_clear()
    try:
        assert accelerate(model) == "switched off by GRAFT_KERNELS"
        with pytest.raises(RuntimeError, match="no bf16 products: switched off"):
            matmul_nt(torch.ones(1, 1), torch.ones(1, 1))
    finally:
        training_kernels.cache_clear()
    assert not any("forward" in vars(module) for module in model.modules())


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention"}),
    # normalises queries and keys
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}, {"Qwen3RMSNorm", "Qwen3MLP"}),
    # adds 1 to its norms' weights, and its gate is not silu
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16}, {"GemmaAttention"}),
    # rotates half of each head: seen when it is called, by the width of the angles
    "glm4 moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {"head_dim": 32, "use_qk_norm": False, "partial_rotary_factor": 0.5},
        {"Glm4MoeRMSNorm", "Glm4MoeMLP", "Glm4MoeAttention"},
    ),
    "gelu llama": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "gelu"}, {"LlamaRMSNorm", "LlamaAttention"}),
    # a bias behind the attention
    "odd llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}, {"LlamaRMSNorm", "LlamaMLP"}),
}


@pytest.mark.parametrize("scale", [None, 0.15])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_up_to_rounding(family, scale):
    make_config, make_model, settings, expected = FAMILIES[family]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    model = make_model(make_config(**sizes, **settings))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
        elif scale is not None and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=scale)
    tree, credit = _probe_tree(100)
    [batch] = pack([tree], [credit], token_budget=1000)
    device = torch.device("cpu")

    def run(precision):
        scores = PolicyForward(model, precision)(batch, temperature=1.0)
        model.zero_grad()
        scores.logprobs.sum().backward()
        return scores.logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    exact, exact_gradients = run(Precision("exact", device))
    accelerated = accelerate(model)
    assert not isinstance(accelerated, str)
    taken = {type(m).__name__ for m in accelerated.modules} - {"Linear"}
    assert taken == expected
    native, native_gradients = run(Precision("bf16", device, native=True))
    assert 0 < (native - exact).abs().max() < 0.05
    whole, exact_whole = (torch.cat([g.flatten() for g in gs]) for gs in (native_gradients, exact_gradients))
    assert (whole - exact_whole).norm() < 0.03 * exact_whole.norm()


def test_layers_of_one_class_may_differ():
    """SmolLM3: one layer in four does not rotate."""
    config = SmolLM3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        pad_token_id=0,
    )
    model = SmolLM3ForCausalLM(config)
    accelerated = accelerate(model)
    assert not isinstance(accelerated, str)
    blocks = [layer.self_attn in accelerated.modules for layer in model.model.layers]
    assert blocks == [True, True, True, False]


def test_what_cannot_be_compared_is_left_alone(model):
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.layers[1].self_attn.config.clip_qkv = 8.0
    accelerated = accelerate(model)
    assert not isinstance(accelerated, str)
    first, second = model.model.layers
    assert first.mlp not in accelerated.modules
    assert second.mlp in accelerated.modules
    assert first.self_attn not in accelerated.modules  # the layers share their settings
    twice = accelerate(model)
    assert not isinstance(twice, str)
    twice.undo()
    accelerated.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_bf16_weights_multiply_natively_and_keep_their_type(model):
    accelerated = accelerate(model.bfloat16())
    assert not isinstance(accelerated, str)
    assert {type(m).__name__ for m in accelerated.modules} == {"Linear"}
    assert model(torch.arange(9)[None]).logits.dtype == torch.bfloat16
