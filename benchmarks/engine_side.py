"""One side of `benchmarks.engine`: transformers' `generate`, or one of graft's decoders, in one type."""

from __future__ import annotations

import graft  # noqa: F401  sets what must be set before torch is loaded

# isort: split
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.side import serve, versions
from benchmarks.workload import questions
from graft.assemble import build_engine
from graft.config import Rollout
from graft.data.chat import ChatEncoder
from graft.model import default_cache, load_model, plain_state, resolve
from graft.rollout.hf_decoder import HuggingFaceDecoder
from graft.rollout.llama_decoder import LlamaDecoder
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.rollout.torch_engine import TorchEngine
from graft.types import Purpose
from graft.update.policy import Precision

Measure = Callable[[str], dict[str, Any]]

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    """Load the model; `settings` has side, dtype, model, prompts, samples, new_tokens."""
    about, run = (prepare_peer if settings["side"] == "hf" else prepare_graft)(settings)

    def measure(_: str) -> dict[str, Any]:
        began = time.perf_counter()
        tokens = run()
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    about |= {"threads": torch.get_num_threads(), "versions": versions("torch", "transformers")}
    return about, measure


def prepare_peer(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], int]]:
    """transformers: all samples as a padded batch, no end of sequence, the model's own distribution."""
    policy = load_model(settings["model"])
    prompts = encode(policy.tokenizer, settings)
    pad = policy.pad_id
    del policy
    gc.collect()
    location = resolve(settings["model"], default_cache())
    model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=TYPES[settings["dtype"]]).eval()
    longest = max(map(len, prompts))
    rows = [p for p in prompts for _ in range(settings["samples"])]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in rows])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows])
    model.generation_config.eos_token_id = None

    def run() -> int:
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings["new_tokens"],
            pad_token_id=pad,
        )
        return (out.shape[1] - longest) * len(rows)

    capability = torch.backends.cpu.get_cpu_capability()
    about = {"kernels": f"torch (oneDNN, {capability})", "prompt_tokens": [len(p) for p in prompts]}
    return about, run


def prepare_graft(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], int]]:
    """graft's engine with the decoder that `side` names."""
    policy = load_model(settings["model"])
    prompts = encode(policy.tokenizer, settings)
    precision = Precision("bf16" if settings["dtype"] == "bf16" else "exact", torch.device("cpu"))
    samples = len(prompts) * settings["samples"]
    rollout = Rollout(engine=settings["side"], slots=samples)
    built, _ = build_engine(rollout, policy, precision)
    engine = TorchEngine(built.decoder, slots=samples, eos_ids=())
    began = time.perf_counter()
    engine.load_weights(plain_state(policy), 0)
    load_seconds = time.perf_counter() - began
    del policy
    gc.collect()
    calls = iter(range(10**9))
    prefixes = [torch.tensor(p, dtype=torch.int32).numpy() for p in prompts]
    sampling = SamplingSettings(max_new_tokens=settings["new_tokens"])

    def run() -> int:
        step = next(calls)
        keys = [
            [stream_key(0, Purpose.TRAIN, step, row, 0, place) for place in range(settings["samples"])]
            for row in range(len(prompts))
        ]
        grown = engine.grow(prefixes, keys, sampling)
        return sum(len(c.tokens) for own in grown for c in own)

    about = {
        "kernels": kernels_of(engine.decoder),
        "load_seconds": load_seconds,
        "prompt_tokens": [len(p) for p in prompts],
    }
    return about, run


def kernels_of(decoder: object) -> str:
    """What multiplies."""
    if isinstance(decoder, LlamaDecoder):
        return f"graft ({decoder.engine.name})"
    assert isinstance(decoder, HuggingFaceDecoder)
    if decoder.packed is not None:
        return f"transformers' layers, linear ones by graft ({decoder.packed.engine.name})"
    return f"torch (oneDNN, {torch.backends.cpu.get_cpu_capability()})"


def encode(tokenizer: Any, settings: dict[str, Any]) -> list[list[int]]:
    """Chat-templated prompts as token ids."""
    encoder = ChatEncoder(tokenizer, {})
    return [
        list(map(int, encoder.encode([{"role": "user", "content": text}])))
        for text in questions(settings["prompts"])
    ]


if __name__ == "__main__":
    serve(prepare)
