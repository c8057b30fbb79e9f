from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Qwen3Config,
    T5Config,
)

from graft.errors import ModelError
from graft.model import (
    AdapterSettings,
    Policy,
    export,
    load_model,
    plain_state,
    refuse_dropout,
    resolve,
    sliding_window,
    trainable,
)

Make = Callable[..., Any]

FLAG = "gradient_checkpointing"

TOKENS = torch.tensor([[5, 17, 99, 3, 250, 42]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def edit_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def with_random_adapter(folder: Path, **settings: Any) -> Policy:
    """A policy whose LoRA matrices are both random: B starts at zero, which would hide a wrong merge."""
    policy = load_model(str(folder), adapter=AdapterSettings(rank=4, alpha=16.0, **settings))
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_load(tiny_model_folder: Path) -> None:
    policy = load_model(str(tiny_model_folder))
    assert policy.eos_ids == (2,)
    assert policy.pad_id == 0
    assert policy.adapter is None
    assert policy.plain is policy.model
    assert policy.model.training
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    assert trainable(policy).keys() == dict(policy.model.named_parameters()).keys()
    torch.testing.assert_close(
        logits_of(policy.model),
        logits_of(AutoModelForCausalLM.from_pretrained(tiny_model_folder)),
        rtol=0,
        atol=1e-5,
    )


def test_dtype_and_attention(tiny_model_folder: Path) -> None:
    policy = load_model(str(tiny_model_folder), dtype=torch.bfloat16, attention="sdpa")
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.bfloat16}
    assert policy.model.config._attn_implementation == "sdpa"
    assert load_model(str(tiny_model_folder)).model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="attention 'nosuch' cannot be used"):
        load_model(str(tiny_model_folder), attention="nosuch")


@pytest.mark.parametrize("adapter", [None, AdapterSettings(rank=2)])
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_model_folder: Path, adapter: AdapterSettings | None
) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_model(str(tiny_model_folder), gradient_checkpointing=checkpointing, adapter=adapter)
        policy.model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
        flags = [module.gradient_checkpointing for module in policy.plain.modules() if hasattr(module, FLAG)]
        assert any(flags) is checkpointing
        gradients.append({name: weight.grad for name, weight in trainable(policy).items()})
    plain, checkpointed = gradients
    assert any(gradient.abs().max() > 0 for gradient in plain.values() if gradient is not None)
    torch.testing.assert_close(plain, checkpointed)


def test_all_end_tokens_are_found(make_tiny_model: Make, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", eos_token_id=[7])
    edit_config(folder, "generation_config.json", eos_token_id=[9, 11])
    assert load_model(str(folder)).eos_ids == (2, 7, 9, 11)  # 2: tokenizer and chat template


def test_the_end_of_turn_counts_although_nothing_else_names_it(
    make_tiny_model: Make, make_tiny_tokenizer: Make, tmp_path: Path
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    folder = make_tiny_model(tmp_path / "model", tokenizer=tokenizer, eos_token_id=0)
    edit_config(folder, "generation_config.json", eos_token_id=0)
    assert load_model(str(folder)).eos_ids == (0, 2)


def test_a_model_without_end_tokens_is_refused(
    make_tiny_model: Make, make_tiny_tokenizer: Make, tmp_path: Path
) -> None:
    tokenizer = make_tiny_tokenizer(None)
    tokenizer.eos_token = None
    folder = make_tiny_model(tmp_path / "model", tokenizer=tokenizer, eos_token_id=None)
    with pytest.raises(ModelError, match="no completion would ever end"):
        load_model(str(folder))


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_merged_state_is_pefts_own_merge_and_leaves_the_policy_alone(
    tiny_model_folder: Path, targets: tuple[str, ...]
) -> None:
    policy = with_random_adapter(tiny_model_folder, target_modules=targets)
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    merged = plain_state(policy)
    after = policy.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

    expected = copy.deepcopy(policy.model).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    touched = [key for key in base if not torch.equal(base[key], merged[key])]
    changed = {key.split(".")[-2] for key in touched}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == (set(targets) or every)


def test_merge_in_bf16_rounds_as_peft_does(tiny_model_folder: Path) -> None:
    policy = load_model(str(tiny_model_folder), dtype=torch.bfloat16, adapter=AdapterSettings(rank=4))
    with torch.no_grad():
        for name, weight in trainable(policy).items():
            assert weight.dtype == torch.float32
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    merged = plain_state(policy)
    expected = copy.deepcopy(policy.model).merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    assert all(merged[key].dtype == expected[key].dtype for key in expected)


def test_adapter_trains_alone_scales_and_starts_the_same(tiny_model_folder: Path) -> None:
    settings = AdapterSettings(rank=4, alpha=8.0, target_modules=("q_proj",))
    policy = load_model(str(tiny_model_folder), adapter=settings, seed=3)
    assert isinstance(policy.model, PeftModel)
    assert policy.adapter == settings
    weights = trainable(policy)
    assert len(weights) == 2 * 2  # A and B, in each of two layers
    assert all("q_proj.lora_" in name for name in weights)
    torch.manual_seed(12345)
    again = trainable(load_model(str(tiny_model_folder), adapter=settings, seed=3))
    other = trainable(load_model(str(tiny_model_folder), adapter=settings, seed=4))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    torch.testing.assert_close(logits_of(policy.model), logits_of(load_model(str(tiny_model_folder)).model))


def test_adapter_mistakes(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"nosuch.*Its linear layers: down_proj, gate_proj, k_proj, lm_head"):
        load_model(str(tiny_model_folder), adapter=AdapterSettings(target_modules=("nosuch",)))
    with pytest.raises(ModelError, match="rank 0"):
        load_model(str(tiny_model_folder), adapter=AdapterSettings(rank=0))


def test_adapter_on_a_tied_matrix_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match="one matrix as embedding and LM head"):
        load_model(str(tiny_model_folder), adapter=AdapterSettings(target_modules=("lm_head",)))


def test_plain_state_without_adapter_is_the_state(tiny_model_folder: Path) -> None:
    policy = load_model(str(tiny_model_folder))
    state, expected = plain_state(policy), policy.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_export_merged(make_tiny_model: Make, tmp_path: Path, tied: bool, adapted: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    policy = with_random_adapter(folder) if adapted else load_model(str(folder))
    policy.plain.set_attn_implementation("sdpa")
    export(policy, tmp_path / "out" / "exported", merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exported")
    expected = plain_state(policy)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == 2
    assert policy.plain.config._attn_implementation == "sdpa"
    assert all(weight.device.type == "cpu" for weight in policy.model.parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "exported").chat_template
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["exported"]
    torch.testing.assert_close(logits_of(policy.model), logits_of(loaded), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call
def test_export_adapter(tiny_model_folder: Path, tmp_path: Path) -> None:
    policy = with_random_adapter(tiny_model_folder)
    export(policy, tmp_path / "adapter", merged=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(policy.model), logits_of(loaded), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="adapter without its base model"):
        resolve(str(tmp_path / "adapter"), tmp_path)


def test_export_mistakes(tiny_model_folder: Path, tmp_path: Path) -> None:
    policy = load_model(str(tiny_model_folder))
    with pytest.raises(ModelError, match="without an adapter"):
        export(policy, tmp_path / "x", merged=False)
    (tmp_path / "mine").mkdir()
    export(policy, tmp_path / "mine", merged=True)  # empty: fine
    with pytest.raises(ModelError, match="not empty"):
        export(policy, tmp_path / "mine", merged=True)


def test_a_failed_export_leaves_nothing(tiny_model_folder: Path, tmp_path: Path) -> None:
    class Failing:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    policy = load_model(str(tiny_model_folder))
    broken = Policy(policy.model, Failing(), policy.eos_ids, policy.pad_id, policy.name, None)
    with pytest.raises(OSError, match="disk full"):
        export(broken, tmp_path / "out", merged=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "field", ["attention_dropout", "hidden_dropout", "embd_pdrop", "router_jitter_noise"]
)
def test_dropout_in_the_config_is_refused(tiny_model_folder: Path, field: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    refuse_dropout("it", model)
    setattr(model.config, field, 0.1)
    with pytest.raises(ModelError, match=rf"it uses dropout or noise: config.{field} = 0.1.*Set it to 0"):
        refuse_dropout("it", model)


def test_dropout_in_a_module_is_refused(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.model.layers[1].extra = nn.Dropout(0.25)
    with pytest.raises(ModelError, match=r"module model.layers.1.extra has p = 0.25"):
        refuse_dropout("it", model)


def test_dropout_is_found_on_loading(make_tiny_model: Make, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", attention_dropout=0.1, classifier_dropout=0.1)
    with pytest.raises(ModelError, match="attention_dropout"):
        load_model(str(folder))
    edit_config(folder, attention_dropout=0.0)
    load_model(str(folder))


def test_vocabulary_mismatch_is_refused(make_tiny_model: Make, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", vocab_size=100)
    with pytest.raises(ModelError, match=r"ids up to \d+, its embedding only 100 rows"):
        load_model(str(folder))


def test_models_that_are_not_causal_are_refused(make_tiny_tokenizer: Make, tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="is a t5, not a causal"):
        load_model(str(tmp_path / "t5"))

    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 320, "eos_token_id": 2}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    LlamaForSequenceClassification(LlamaConfig(**small)).save_pretrained(tmp_path / "judge")
    make_tiny_tokenizer().save_pretrained(tmp_path / "judge")
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, not a causal"):
        load_model(str(tmp_path / "judge"))

    config = BertConfig(**small, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    make_tiny_tokenizer().save_pretrained(tmp_path / "bert")
    load_model(str(tmp_path / "bert"))
    edit_config(tmp_path / "bert", is_decoder=False)
    with pytest.raises(ModelError, match="see later tokens"):
        load_model(str(tmp_path / "bert"))


def test_damaged_folders_are_model_errors(make_tiny_model: Make, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    contents = weights.read_bytes()

    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lack 9 of the weights.*model.layers.2"):
        load_model(str(folder))
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"9 weights for which config.json has no layer.*model.layers.1"):
        load_model(str(folder))
    edit_config(folder, num_hidden_layers=2, intermediate_size=128)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(folder))
    edit_config(folder, intermediate_size=64)

    weights.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ModelError, match="cannot be loaded from that folder"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded from that folder"):
        load_model(str(folder))
    weights.write_bytes(contents)
    load_model(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded from that folder"):
        load_model(str(folder))


def test_resolve(tiny_model_folder: Path, embedded_model_folder: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny_model_folder), tmp_path) == tiny_model_folder
    assert resolve("openai-community/gpt2", tmp_path) == "openai-community/gpt2"
    assert resolve("smollm2-135m-instruct", embedded_model_folder.parents[1]) == embedded_model_folder
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "weights.gguf"), tmp_path) == tmp_path / "weights.gguf"
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("smollm2-135m", r"unknown model; did you mean 'smollm2-135m-instruct'"),
        ("gpt2", r"unknown model; embedded: smollm2-135m-instruct"),
        ("./nosuch", "no such folder"),
        ("models/nosuch.gguf", "no such file"),
        (str(tmp_path / "weights.bin"), "kind '.bin'"),
        (str(tmp_path / "empty"), "no config.json"),
    ]:
        with pytest.raises(ModelError, match=message):
            resolve(name, tmp_path)


def test_a_hub_model_that_cannot_be_fetched_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="cannot be loaded from the hub"):
        load_model("graft-tests/there-is-no-such-model")


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (LlamaConfig(), None),
        (MistralConfig(sliding_window=4096), 4096),
        (MistralConfig(sliding_window=None), None),
        (Qwen3Config(), None),
        (Qwen3Config(use_sliding_window=True, sliding_window=128, max_window_layers=1), 128),
        (Gemma3TextConfig(sliding_window=512), 512),
        (Gemma3TextConfig(sliding_window=512, layer_types=["full_attention"] * 26), None),
        (GPT2Config(), None),
    ],
)
def test_sliding_window(config: Any, window: int | None) -> None:
    assert sliding_window(config) == window


def test_sliding_window_of_other_spellings() -> None:
    assert sliding_window(AutoConfig.for_model("gpt_neo", window_size=64)) == 64
    assert sliding_window(AutoConfig.for_model("llama4_text", attention_chunk_size=8192)) == 8192


def test_embedded_model(embedded_model_folder: Path) -> None:
    policy = load_model("smollm2-135m-instruct", dtype=torch.bfloat16, cache=embedded_model_folder.parents[1])
    assert policy.eos_ids == (2,)
    assert policy.pad_id == 2
    assert policy.name == "smollm2-135m-instruct"
    assert sum(weight.numel() for weight in policy.model.parameters()) == 134_515_008
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    text = "The capital of France is"
    with torch.no_grad():
        ids = policy.tokenizer(text, return_tensors="pt")["input_ids"]
        best = policy.model(input_ids=ids).logits[0, -1].argmax().item()
    assert policy.tokenizer.decode([best]) == " Paris"
