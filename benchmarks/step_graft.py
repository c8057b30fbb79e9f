"""graft's side of `benchmarks.step`: the loop's own step, with the end of sequence switched off."""

from __future__ import annotations

import graft  # noqa: F401  sets what must be set before torch is loaded

# isort: split
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.side import serve, versions
from benchmarks.workload import questions, rewards
from graft.algorithm_settings import GRPO
from graft.assemble import assemble
from graft.config import Data, Model, Optimizer, Rollout, RunConfig, Sampling, Training
from graft.interrupt import Interrupt
from graft.loop import Loop
from graft.phases import phases_of
from graft.report.run_folder import RunFolder
from graft.report.terminal import Terminal
from graft.rollout.llama_decoder import LlamaDecoder
from graft.rollout.torch_engine import TorchEngine
from graft.step_records import step_clock
from graft.trainer import Trainer

PARTS = ("load", "sample", "grade", "update")


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Assemble a run; `settings` has model, prompts, samples, new_tokens, dtype, microbatch_tokens,
    gradient_checkpointing."""
    prompts, samples = settings["prompts"], settings["samples"]
    scores: list[float] = []
    parts = assemble(
        run_config(settings),
        rows=[{"prompt": text} for text in questions(prompts)],
        reward=lambda completion, item: scores.pop(0),
    )
    assert parts.engine is not None
    parts.engine = TorchEngine(parts.engine.decoder, slots=prompts * samples, eos_ids=())
    folder = RunFolder(Path(tempfile.gettempdir()) / "unused")  # a step writes nothing
    loop = Loop(parts, folder, Terminal(), Interrupt())
    [phase] = phases_of(parts.config, training_rows=prompts)
    cursor = loop.open_cursor(phase)
    loop.trainer = Trainer(parts, phase, loop.checkpoints, done=0, restored=None)

    def measure(case: str) -> dict[str, Any]:
        scores[:] = rewards(prompts, samples, sparse=case == "sparse")
        number = loop.state.number + 1
        with step_clock(number) as step:
            loop.step(phase, step, cursor)
        loop.state.steps[phase.stage] = number  # the next step shall load the engine again
        assert step.result is not None
        assert step.credit is not None
        return {
            "seconds": step.seconds["step"],
            "parts": {name: step.seconds[name] for name in PARTS},
            "tokens": sum(tree.sampled_tokens for tree in step.trees),
            "tokens_trained": step.result.tokens_trained,
            "tokens_computed": step.result.tokens_computed,
            "groups_with_signal": step.credit.groups_with_signal,
        }

    decoder = parts.engine.decoder
    sampling = decoder.engine.name if isinstance(decoder, LlamaDecoder) else "torch"
    training = "graft's bf16 products" if parts.forward.precision.native else "torch"
    about = {
        "kernels": f"sampling: {decoder.name} engine ({sampling}); training: {training}",
        "threads": torch.get_num_threads(),
        "prompt_tokens": [len(p.tokens) for p in parts.train],
        "versions": versions("torch", "transformers", "graft-rl"),
    }
    return about, measure


def run_config(settings: dict[str, Any]) -> RunConfig:
    """The settings of a run that does this."""
    return RunConfig(
        run="unused",
        model=Model(
            name=settings["model"],
            device="cpu",
            precision="bf16" if settings["dtype"] == "bf16" else "exact",
            gradient_checkpointing=settings["gradient_checkpointing"],
        ),
        data=Data(shuffle=False),
        algorithm=GRPO(group_size=settings["samples"]),
        sampling=Sampling(max_new_tokens=settings["new_tokens"]),
        rollout=Rollout(slots=settings["prompts"] * settings["samples"]),
        training=Training(
            prompts_per_step=settings["prompts"],
            steps=10**6,
            microbatch_tokens=settings["microbatch_tokens"],
        ),
        optimizer=Optimizer(learning_rate=1e-6),
    )


if __name__ == "__main__":
    serve(prepare)
