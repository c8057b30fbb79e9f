"""GGUF files -> plain models and tokenizers.

Transformers dequantises the weights. What it leaves to mend:
- The model it returns calls itself quantised and refuses to be saved, though its weights are plain.
- It rebuilds byte-level BPE tokenizers with GPT-2's rule for splitting text, whatever `tokenizer.ggml.pre`
  names, unless it knows the name. SmolLM's rule cuts out every digit first. Under GPT-2's rule most text
  comes out right, but two spaces or newlines before a number become two tokens where the model was trained on
  one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graft.errors import ModelError


def _gpt2_split() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def _digits_then_gpt2_split() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


SPLIT_RULES: Mapping[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2_split,
    "smollm": _digits_then_gpt2_split,
}
"""`tokenizer.ggml.pre` -> how text is cut before byte-pair encoding. Others need the original tokenizer
files."""


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder with fp32 safetensors, and check that it loads to the
    same bits.

    Raises:
        ModelError: as `load_gguf` and `load_gguf_tokenizer`, or the saved folder does not give the same
            weights.
    """
    model = load_gguf(gguf_file, dtype=torch.float32)
    with no_progress_bars():
        model.save_pretrained(folder)
        load_gguf_tokenizer(gguf_file).save_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    original = model.state_dict()
    different = [
        key
        for key in original.keys() | saved.keys()
        if key not in original or key not in saved or not torch.equal(original[key], saved[key])
    ]
    if different:
        raise ModelError(
            f"{gguf_file}: {len(different)} tensors change when saved, e.g. {min(different)!r}. "
            "This version of transformers cannot convert the file; use the original model folder."
        )


def load_gguf(gguf_file: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantise a GGUF file into a plain model that can be trained and saved.

    Args:
        gguf_file: the file.
        dtype: of the weights. fp32 holds what 4- and 8-bit weights dequantise to exactly.

    Raises:
        ModelError: transformers cannot read the file or does not know its architecture.
    """
    try:
        with no_progress_bars():
            source = AutoModelForCausalLM.from_pretrained(
                gguf_file.parent, gguf_file=gguf_file.name, dtype=dtype, attn_implementation="eager"
            )
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(
            f"{gguf_file}: transformers {transformers.__version__} cannot load it: {error}. "
            "Use the model's original folder or hub id instead."
        ) from error
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(source.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    return model


def plain_model(
    config: transformers.PretrainedConfig,
    generation_config: transformers.GenerationConfig | None,
    state: Mapping[str, torch.Tensor],
) -> PreTrainedModel:
    """A model around existing tensors, to be saved and not to be run: nothing is copied or initialised.

    Args:
        config: architecture; copied, and the copy's dtype set to that of the floating-point tensors.
        generation_config: saved along with it.
        state: all parameters and persistent buffers, by name.
    """
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="eager"
        )
    model.load_state_dict(dict(state), assign=True)
    model.tie_weights()
    if generation_config is not None:
        model.generation_config = generation_config
    return model


def load_gguf_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: the original files if they lie beside it, else rebuilt from its metadata.

    Raises:
        ModelError: the file names a rule for splitting text that cannot be rebuilt exactly, and no
            `tokenizer.json` lies beside it.
    """
    if (gguf_file.parent / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(gguf_file.parent)
    metadata = _read_metadata(gguf_file)
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(rule, str) or rule not in SPLIT_RULES:
        raise ModelError(
            f"{gguf_file}: its tokenizer (kind {kind!r}, splitting rule {rule!r}) cannot be rebuilt exactly "
            f"from the file; known rules: {', '.join(SPLIT_RULES)}. Put tokenizer.json and "
            "tokenizer_config.json of the original model beside it."
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLIT_RULES[rule]()
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context:
        tokenizer.model_max_length = int(context)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _read_metadata(gguf_file: Path) -> dict[str, Any]:
    """The file's single values (no arrays), by key."""
    reader = gguf.GGUFReader(gguf_file)
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
    }


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off stderr; restores what was set before."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
