"""What does training on the tree save? One training step on the same samples, packed in three ways.

    python -m benchmarks.tree --json [--repeats N] [--model NAME | --random-layers N]

- flat: every path a row of its own, prompt and prefix computed for each; a node trains in one of its paths.
- prompt shared: the prompt once a group, everything behind it for each path (other tokens of the same lengths, since
  graft merges equal beginnings wherever they meet).
- tree: every span once.

Cases: (a) a tree that branches 4-4-4 with segments of 32 tokens behind a prompt of 256; (b) 16 completions of 64 tokens
behind a prompt of 512. Tokens are random. A step is forward, backward, clipping and AdamW in the precision that graft
chooses on this machine; the sides take turns in one process. The gradients of flat and tree are compared, too.

The LM head reads the trained tokens alone, the same ones on every side, and AdamW moves the same weights: counting the
head's products, the 135M model's in case (b) come to a ratio of 5.1 where its tokens come to 6.1.

CPU seconds are the process's own, all threads: on a machine that does other work, too, they vary less than seconds.
With --random-layers the model has random weights, SmolLM2-135M's width and vocabulary and so many layers; the cost of
a layer and that of the rest follow from two such runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import graft  # noqa: F401  guards the CPU before torch computes anything

# isort: split
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import harness
from graft.algorithm_settings import GRFT
from graft.assemble import build_forward, choose_device, choose_precision
from graft.losses import loss_nodes
from graft.memory import keep_freed_memory
from graft.model import load_model
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Prompt, StopReason
from graft.update.packing import MicroBatch, pack
from graft.update.policy import PolicyForward
from graft.update.step import POLICY, LossOf, optimise, policy_loss

TARGETS = {
    "a: tokens flat / tree": ">= 6",
    "a: seconds flat / tree": ">= 4",
    "a: seconds prompt_shared / tree": ">= 1.5",
    "b: seconds flat / tree": ">= 5",
}
SIDES = ("flat", "prompt_shared", "tree")


@dataclass(frozen=True)
class Case:
    """A tree to train on."""

    name: str
    prompt: int
    segment: int
    branching: Sequence[int]


CASES = (Case("a", 256, 32, (4, 4, 4)), Case("b", 512, 64, (16,)))


def main() -> None:
    """Run both cases and print the report."""
    options = argparse.ArgumentParser(
        "python -m benchmarks.tree", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    options.add_argument("--repeats", type=int, default=3, help="turns of each side after its warm-up")
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--random-layers", type=int, help="a random model of so many layers instead")
    options.add_argument("--microbatch-tokens", type=int, default=3072)
    asked = options.parse_args()
    machine = harness.machine()
    device = choose_device("auto")
    if device.type == "cpu":
        keep_freed_memory()  # as in a run
    if asked.random_layers is None:
        model = load_model(
            asked.model, device=device, adapter=None, gradient_checkpointing=False, seed=0, progress=None
        ).plain
    else:
        with device:
            model = random_model(asked.random_layers)
    precision = choose_precision("auto", device)
    bench = Bench(build_forward(model, precision), asked.microbatch_tokens)
    cases = [bench.measure(case, asked.repeats) for case in CASES]
    ratios = {name: figures for case in cases for name, figures in case.pop("ratios").items()}
    report = harness.report_of(
        "tree",
        sys.argv[1:],
        machine=machine,
        settings={
            "model": asked.model if asked.random_layers is None else f"random, {asked.random_layers} layers",
            "threads": torch.get_num_threads(),
            "precision": precision.name + (" native" if precision.native else ""),
            "microbatch_tokens": asked.microbatch_tokens,
            "repeats": asked.repeats,
        },
        notes=harness.kernel_notes(),
        figures={"cases": cases, "ratios": ratios},
    )
    harness.publish(report, as_text(report), as_json=asked.json)


class Bench:
    """A model and its optimiser."""

    def __init__(self, forward: PolicyForward, budget: int) -> None:
        self.forward, self.budget = forward, budget
        parameters = [p for p in forward.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([{"name": POLICY, "params": parameters}], lr=0.0, fused=True)

    def measure(self, case: Case, repeats: int) -> dict[str, Any]:
        """Tokens and seconds of a case."""
        sides = {"flat": flat(case), "prompt_shared": prompt_shared(case), "tree": tree(case)}
        batches = {name: self.packed(*side) for name, side in sides.items()}
        tokens = {name: sum(len(batch.tokens) for batch in own) for name, own in batches.items()}
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        cpu: dict[str, list[float]] = {name: [] for name in SIDES}
        for turn in range(repeats + 1):
            for name in SIDES:
                took, worked = self.step(batches[name])
                warm = "" if turn else " (warm-up)"
                harness.say(f"  {case.name} {name}: {took:.2f} s, {worked:.2f} CPU s{warm}")
                if turn:
                    seconds[name].append(took)
                    cpu[name].append(worked)
        one, other = self.gradient(batches["flat"]), self.gradient(batches["tree"])
        return {
            "name": case.name,
            "prompt_tokens": case.prompt,
            "segment_tokens": case.segment,
            "branching": list(case.branching),
            **{f"network_tokens_{name}": tokens[name] for name in SIDES},
            **{f"seconds_{name}": harness.spread(seconds[name]) for name in SIDES},
            **{f"cpu_seconds_{name}": harness.spread(cpu[name]) for name in SIDES},
            "gradient_difference": float((one - other).norm() / other.norm()),
            "ratios": {
                f"{case.name}: tokens flat / tree": harness.spread([tokens["flat"] / tokens["tree"]]),
                f"{case.name}: seconds flat / tree": harness.ratio(seconds["flat"], seconds["tree"]),
                f"{case.name}: seconds prompt_shared / tree": harness.ratio(
                    seconds["prompt_shared"], seconds["tree"]
                ),
                f"{case.name}: CPU seconds flat / tree": harness.ratio(cpu["flat"], cpu["tree"]),
                f"{case.name}: CPU seconds prompt_shared / tree": harness.ratio(
                    cpu["prompt_shared"], cpu["tree"]
                ),
            },
        }

    def packed(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> list[MicroBatch]:
        """On the model's device."""
        device = self.forward.model.device
        return [batch.to(device) for batch in pack(trees, credits, token_budget=self.budget)]

    def step(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Seconds and CPU seconds of a whole optimiser step."""
        began, worked = time.perf_counter(), time.process_time()
        optimise(self._loss(), self.optimizer, batches, max_gradient_norm=1.0, learning_rates={POLICY: 0.0})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - worked

    def gradient(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Of the whole step."""
        loss = self._loss()
        for batch in batches:
            loss(batch).share.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        found = torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _loss(self) -> LossOf:
        return policy_loss(self.forward, lambda tokens: loss_nodes(tokens, GRFT()), temperature=1.0)


def random_model(layers: int) -> PreTrainedModel:
    """SmolLM2-135M's sizes, but so many layers, with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
        )
    )


def tree(case: Case) -> tuple[list[Tree], list[Credit]]:
    """Every span once."""
    made = Tree(prompt_of(case))
    rng = np.random.default_rng(1)
    level = [ROOT]
    for width in case.branching:
        level = [
            child
            for parent in level
            for group in [made.new_group()]
            for child in [
                made.add(parent, draw(rng, case.segment), group=group, kind=Kind.THOUGHT, stop=StopReason.CUT)
                for _ in range(width)
            ]
        ]
    return [made], [credit_of(made, range(1, len(made)))]


def flat(case: Case) -> tuple[list[Tree], list[Credit]]:
    """Every path a tree of its own; a node trains in the first of its paths."""
    [whole], [credit] = tree(case)
    trees, credits, trained = [], [], set()
    for leaf in whole.leaves():
        alone, parent = Tree(whole.prompt), ROOT
        group = alone.new_group()
        own: dict[int, int] = {}
        for node in whole.path(leaf)[1:]:
            parent = alone.add(
                parent, whole.nodes[node].tokens, group=group, kind=Kind.THOUGHT, stop=StopReason.CUT
            )
            if node not in trained:
                own[parent] = node
        trained.update(own.values())
        trees.append(alone)
        credits.append(
            Credit(
                {new: credit.advantages[old] for new, old in own.items()},
                {new: credit.weights[old] for new, old in own.items()},
            )
        )
    return trees, credits


def prompt_shared(case: Case) -> tuple[list[Tree], list[Credit]]:
    """The prompt once, everything behind it for each path."""
    made = Tree(prompt_of(case))
    rng = np.random.default_rng(2)
    group = made.new_group()
    paths = int(np.prod(case.branching))
    for _ in range(paths):
        tokens = draw(rng, case.segment * len(case.branching))
        made.add(ROOT, tokens, group=group, kind=Kind.COMPLETION, stop=StopReason.EOS)
    return [made], [credit_of(made, range(1, len(made)))]


def prompt_of(case: Case) -> Prompt:
    """Random tokens."""
    tokens = draw(np.random.default_rng(0), case.prompt)
    return Prompt(row=0, messages=(), item={}, tokens=tokens, question="")


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Token ids that are no special tokens."""
    return rng.integers(1000, 40_000, count).astype(np.int32)


def credit_of(made: Tree, nodes: Sequence[int]) -> Credit:
    """Different advantages, equal weights."""
    lengths = {node: len(made.nodes[node]) for node in nodes}
    total = sum(lengths.values())
    return Credit(
        {node: np.full(n, (-1.0) ** node * (1 + node % 3), dtype=np.float32) for node, n in lengths.items()},
        {node: np.full(n, 1 / total) for node, n in lengths.items()},
    )


def as_text(report: Mapping[str, Any]) -> str:
    """Tables for people."""
    rows = [
        [
            f"{case['name']}: {name}",
            f"{case[f'network_tokens_{name}']:,}",
            harness.cell(case[f"seconds_{name}"]),
            harness.cell(case[f"cpu_seconds_{name}"]),
        ]
        for case in report["cases"]
        for name in SIDES
    ]
    differences = ", ".join(f"{case['name']} {case['gradient_difference']:.1e}" for case in report["cases"])
    return "\n".join(
        [
            harness.header(report),
            harness.table(["side", "network tokens", "seconds: median (low-high)", "CPU seconds"], rows),
            f"relative difference of the gradients of flat and tree: {differences}",
            harness.ratio_table(report["ratios"], TARGETS),
        ]
    )


if __name__ == "__main__":
    main()
