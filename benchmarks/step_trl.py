"""The peer of `benchmarks.step`: TRL's GRPOTrainer. Runs in an environment of its own, without graft.

The trainer's own loop runs; a callback holds it before each optimiser step until the harness asks for one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports] - in requirements-bench.lock alone

from benchmarks.side import Channel, versions
from benchmarks.workload import questions, rewards


class Turns(TrainerCallback):
    """Lets one optimiser step through for each line that the harness writes."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.cases = channel.cases()
        self.case = "full"
        self.tokens = 0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        case = next(self.cases, None)
        if case is None:
            sys.exit(0)
        self.case, self._began = case, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._began
        self.channel.send({"seconds": seconds, "tokens": self.tokens})


def main() -> None:
    """Train until the harness closes the pipe."""
    channel = Channel()
    settings = json.loads(sys.argv[1])
    prompts, samples, new_tokens = settings["prompts"], settings["samples"], settings["new_tokens"]
    turns = Turns(channel)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    texts = questions(prompts)
    conversations = [[{"role": "user", "content": text}] for text in texts]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.tokens = sum(map(len, completion_ids))
        return rewards(prompts, samples, sparse=turns.case == "sparse")

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=settings["dtype"] == "bf16",
            gradient_checkpointing=settings["gradient_checkpointing"],
            per_device_train_batch_size=settings["batch"],
            gradient_accumulation_steps=prompts * samples // settings["batch"],
            num_generations=samples,
            max_completion_length=new_tokens,
            generation_kwargs={"min_new_tokens": new_tokens},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_steps=10**6,
            shuffle_dataset=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=settings["model"],
            reward_funcs=reward,  # pyright: ignore[reportArgumentType]
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": conversations * 32}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        encoded: Any = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_dict=True
        )
        channel.send(
            {
                "kernels": f"torch (oneDNN, {torch.backends.cpu.get_cpu_capability()})",
                "threads": torch.get_num_threads(),
                "prompt_tokens": [len(ids) for ids in encoded["input_ids"]],
                "versions": versions("torch", "transformers", "trl", "accelerate", "datasets"),
            }
        )
        trainer.train()


if __name__ == "__main__":
    main()
