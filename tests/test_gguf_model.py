from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.errors import ModelError
from graft.gguf_model import convert_gguf, load_gguf, load_gguf_tokenizer
from graft.model import load_model

TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(key: str) -> str:
    if not key.startswith("model.layers."):
        return TENSORS[key]
    number, part = key.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{number}.{TENSORS[part]}.weight"


def write_gguf(path: Path, model: Any, tokenizer: Any, *, pre: str = "smollm") -> Path:
    """A Llama as llama.cpp stores it: unquantised, query and key rows permuted for its rotary embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)

    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    tokens += [f"unused{number}" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array: np.ndarray = tensor.numpy()
        part = key.split(".")[-2]
        if part in heads:
            rows, columns = array.shape
            array = array.reshape(heads[part], 2, rows // heads[part] // 2, columns).swapaxes(1, 2)
            array = np.ascontiguousarray(array.reshape(rows, columns))
        writer.add_tensor(gguf_name(key), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    return model, AutoTokenizer.from_pretrained(tiny_model_folder)


def test_a_file_loads_as_a_policy_with_the_same_weights(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    policy = load_model(str(path))
    loaded, original = policy.model.state_dict(), model.state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[key], original[key]) for key in original)
    assert policy.eos_ids == (2,)
    tokens = torch.tensor([[5, 17, 99, 3]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_conversion_gives_an_ordinary_folder(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    folder = tmp_path / "converted"
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, tokenizer), folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text()
    saved, original = AutoModelForCausalLM.from_pretrained(folder), model.state_dict()
    assert all(torch.equal(value, original[key]) for key, value in saved.state_dict().items())
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token_id, again.pad_token_id, again.model_max_length) == (2, 0, 256)
    text = "<|im_start|>user\n  12\n\n34 the answer<|im_end|>\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text


def test_digits_are_cut_out_only_where_the_rule_says_so(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    smollm = load_gguf_tokenizer(write_gguf(tmp_path / "smollm.gguf", model, tokenizer))
    gpt2 = load_gguf_tokenizer(write_gguf(tmp_path / "gpt2.gguf", model, tokenizer, pre="gpt-2"))
    assert smollm.convert_ids_to_tokens(smollm("\n\n4")["input_ids"]) == ["ĊĊ", "4"]
    assert gpt2.convert_ids_to_tokens(gpt2("\n\n4")["input_ids"]) == ["Ċ", "Ċ", "4"]


def test_other_tokenizers_need_the_original_files(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2")
    with pytest.raises(ModelError, match=r"splitting rule 'qwen2'\) cannot be rebuilt exactly"):
        load_gguf_tokenizer(path)
    tokenizer.save_pretrained(tmp_path)
    assert load_gguf_tokenizer(path)("\n\n4")["input_ids"] == tokenizer("\n\n4")["input_ids"]


def test_files_that_are_no_gguf_are_model_errors(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense" * 10)
    with pytest.raises(ModelError, match="cannot load it"):
        load_gguf(tmp_path / "x.gguf", dtype=torch.float32)
