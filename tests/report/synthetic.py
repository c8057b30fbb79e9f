"""Run folders made up from a seed, for tests of everything that reads one.

    folder = write_run(tmp_path / "run", steps=20)
    folder = write_trees(tmp_path / "run", [chains_record(1, [judged_chain(["3 + 4 = 7.\n"], "7")])])

The curves look like those of a run that learns; nothing in them was measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.trees import tree_record
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Critique, Grade, Outcome, Prompt, StopReason, Tokens

CONFIG = """run = "runs/arithmetic"
seed = 7

[model]
name = "smollm2-135m-instruct"

[data]
source = "gym:chain_sum"
rows = 2200
held_out = 200

[grader]
type = "number"

[algorithm]
name = "grpo"
group_size = 8

[training]
prompts_per_step = 8
steps = {steps}

[warm_start]
worked = "key:solution"
steps = 10
"""


THOUGHT_METRICS = {
    "segments_per_completion": 4.5,
    "critic_failed": 1,
    "critic_thought_mean": 7.5,
    "critic_progress_mean": 6.25,
    "critic_overall_mean": 5.5,
    "standardised_thought_absolute_mean": 0.625,
    "progress_effect_mean": -0.125,
    "critic_agreement": 0.75,
    "segments_clipped_share": 0.125,
    "value_explained_variance": 0.25,
}
"""Metrics that only methods with thoughts record."""


def decode(tokens: Tokens) -> str:
    """One character a token: token ids are code points."""
    return "".join(map(chr, tokens.tolist()))


def encode(text: str) -> list[int]:
    """The inverse of `decode`."""
    return [ord(character) for character in text]


def make_prompt(
    row: int, question: str, answer: str = "", messages: Sequence[Mapping[str, Any]] = ()
) -> Prompt:
    """A prompt whose tokens are its characters."""
    return Prompt(
        row=row,
        messages=messages or [{"role": "user", "content": question}],
        item={"answer": answer, "question": question},
        tokens=np.array(encode(question) or [32], dtype=np.int32),
        question=question,
    )


def make_tree(prompt: Prompt, completions: Sequence[str], *, stop: StopReason = StopReason.EOS) -> Tree:
    """A group of whole completions below a prompt."""
    tree = Tree(prompt)
    group = tree.new_group()
    for text in completions:
        tokens = encode(text)
        tree.add(ROOT, tokens, [-0.5] * len(tokens), group=group, kind=Kind.COMPLETION, stop=stop)
    return tree


def make_credit(tree: Tree, scores: Sequence[float]) -> Credit:
    """Score minus the mean of the group on every token."""
    advantages = {
        leaf: np.full(len(tree.nodes[leaf]), score - sum(scores) / len(scores), dtype=np.float32)
        for leaf, score in zip(tree.leaves(), scores, strict=True)
    }
    return Credit(advantages, {leaf: np.ones(len(values)) for leaf, values in advantages.items()})


def train_metrics(step: int, steps: int, random_numbers: random.Random) -> dict[str, Any]:
    """A record of one training step, all metrics measured."""
    progress = step / max(steps, 1)
    reward = 0.3 + 0.45 * (1 - math.exp(-3 * progress)) + random_numbers.gauss(0, 0.06)
    tokens = round(64 * (60 - 15 * progress + random_numbers.gauss(0, 2)))
    return {
        "step": step,
        "stage": Stage.TRAIN,
        "reward_mean": min(max(reward, 0.0), 1.0),
        "reward_std": 0.4,
        "solved_share": min(max(reward, 0.0), 1.0),
        "groups_with_signal": min(1.0, max(0.0, 0.85 - 0.3 * progress + random_numbers.gauss(0, 0.1))),
        "completion_length_mean": tokens / 64,
        "truncated_share": max(0.0, 0.08 * (1 - progress)),
        "entropy": 0.55 - 0.3 * progress + random_numbers.gauss(0, 0.02),
        "loss": random_numbers.gauss(0, 0.01),
        "gradient_norm": 0.9 + random_numbers.expovariate(4),
        "learning_rate": 2e-6,
        "clipped_share": 0.0,
        "ratio_max": 1.0,
        "kl_to_initial": 0.06 * progress**1.5 if step % 5 == 0 or step == 1 else None,
        "engine_gap_mean": 0.032 + random_numbers.gauss(0, 0.002),
        "engine_gap_max": 0.24 + random_numbers.expovariate(20),
        "tokens_sampled": tokens,
        "tokens_trained": tokens,
        "tokens_computed": tokens + 400,
        "tokens_per_s": 1400 + random_numbers.gauss(0, 60),
        "sample_seconds": tokens / 1400,
        "grade_seconds": 0.01,
        "update_seconds": 2.8,
        "load_seconds": 0.12,
        "step_seconds": tokens / 1400 + 2.93,
        "grades_failed": 0,
        "peak_memory_gb": 2.4,
        "generated_tokens": 3500 * step,
    }


def evaluation_metrics(step: int, moment: Moment, accuracy: float, rows: int = 200) -> dict[str, Any]:
    """A record of one evaluation, with the 95 % Wilson interval of its accuracy."""
    z = 1.959964
    middle = (accuracy + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(accuracy * (1 - accuracy) / rows + z * z / (4 * rows * rows))
    return {
        "step": step,
        "stage": Stage.EVALUATION,
        "moment": moment,
        "held_out_accuracy": accuracy,
        "held_out_low": middle - half,
        "held_out_high": middle + half,
        "held_out_reward_mean": accuracy,
        "held_out_length_mean": 52.0,
        "held_out_truncated_share": 0.02,
        "held_out_pass_at_1": accuracy,
        "held_out_rows": rows,
        "evaluation_seconds": 9.0,
    }


def warm_start_metrics(step: int) -> dict[str, Any]:
    """A record of one warm-start step."""
    return {
        "step": step,
        "stage": Stage.WARM_START,
        "loss": 0.4 + 1.6 * math.exp(-step / 3),
        "tokens_trained": 900,
        "gradient_norm": 2.0 + 3 * math.exp(-step / 2),
        "learning_rate": 2e-5,
        "step_seconds": 1.9,
    }


def write_run(
    path: Path,
    *,
    steps: int = 20,
    planned_steps: int | None = None,
    warm_start_steps: int = 10,
    prompts_per_step: int = 2,
    group_size: int = 4,
    evaluate: bool = True,
    finished: bool = True,
    completion: str | None = None,
    seed: int = 0,
) -> RunFolder:
    """Write the folder of a run that learns to add numbers.

    Args:
        path: must not exist yet.
        steps: training steps that were made.
        planned_steps: steps that the config asks for, if they are more.
        warm_start_steps: 0: the run has no warm start.
        prompts_per_step: trees of each step.
        group_size: samples of each tree.
        evaluate: whether held-out rows are measured.
        finished: whether the run came to its end; a killed run has neither a last evaluation nor a summary.
        completion: text of every sample, instead of made-up sums.
        seed: of all made-up numbers.
    """
    random_numbers = random.Random(seed)
    folder = RunFolder.create(path, CONFIG.format(steps=planned_steps or max(steps, 1)))
    with folder:
        if evaluate:
            _write_evaluation(folder, 0, Moment.BEFORE, 0.115, completion, random_numbers)
        for step in range(1, warm_start_steps + 1):
            folder.append_metrics(warm_start_metrics(step))
        if evaluate and warm_start_steps:
            _write_evaluation(folder, 0, Moment.AFTER_WARM_START, 0.335, completion, random_numbers)
        for step in range(1, steps + 1):
            folder.append_metrics(train_metrics(step, steps, random_numbers))
            for _ in range(prompts_per_step):
                _write_group(folder, step, steps, group_size, completion, random_numbers)
            if evaluate and steps >= 10 and step % (steps // 5) == 0 and step < steps:
                accuracy = 0.335 + 0.33 * (1 - math.exp(-3 * step / steps))
                folder.append_metrics(evaluation_metrics(step, Moment.DURING, round(accuracy, 2), 100))
        if evaluate and finished:
            _write_evaluation(folder, steps, Moment.AFTER, 0.66, completion, random_numbers)
        if finished:
            folder.write_summary(
                {
                    "status": "finished",
                    "started_at": "2025-03-02T14:03:20+00:00",
                    "finished_at": "2025-03-02T14:27:56+00:00",
                    "steps": steps,
                    "training_rows": 2000,
                    "held_out_rows": 200,
                    "parameters": 134_515_008,
                    "device": "cpu",
                    "dtype": "bf16",
                    "engine": "fast",
                    "threads": 8,
                    "version": "0.1.0",
                }
            )
    return folder


def _write_group(
    folder: RunFolder,
    step: int,
    steps: int,
    group_size: int,
    completion: str | None,
    random_numbers: random.Random,
) -> None:
    row = random_numbers.randrange(2000)
    chance = 0.3 + 0.5 * step / max(steps, 1)
    texts, scores, prompt = _attempts(row, group_size, chance, completion, random_numbers)
    tree = make_tree(prompt, texts)
    grades = {leaf: Grade(score) for leaf, score in zip(tree.leaves(), scores, strict=True)}
    if random_numbers.random() < 0.05:
        grades[tree.leaves()[-1]] = Grade(
            None, Outcome.TIMED_OUT, reason="no answer from the grader after 60 s"
        )
    folder.append_tree(tree_record(step, Stage.TRAIN, tree, grades, decode, make_credit(tree, scores)))


def _write_evaluation(
    folder: RunFolder,
    step: int,
    moment: Moment,
    accuracy: float,
    completion: str | None,
    random_numbers: random.Random,
) -> None:
    folder.append_metrics(evaluation_metrics(step, moment, accuracy))
    for row in range(12):
        texts, scores, prompt = _attempts(row, 1, accuracy, completion, random_numbers)
        tree = make_tree(prompt, texts)
        grades = {leaf: Grade(score) for leaf, score in zip(tree.leaves(), scores, strict=True)}
        folder.append_tree(tree_record(step, Stage.EVALUATION, tree, grades, decode, moment=moment))


def _attempts(
    row: int, count: int, chance: float, completion: str | None, random_numbers: random.Random
) -> tuple[list[str], list[float], Prompt]:
    numbers = random.Random(row)
    first, second, third = (numbers.randrange(11, 99) for _ in range(3))
    right = first + second - third
    texts, scores = [], []
    for _ in range(count):
        solved = random_numbers.random() < chance
        answer = right if solved else right + random_numbers.choice([-10, -1, 1, 10])
        texts.append(
            completion
            or f"First I add {first} + {second} = {first + second}.\n"
            f"Then I take away {third}: {first + second} - {third} = {answer}.\nThe answer is {answer}."
        )
        scores.append(float(solved))
    question = f"State the final answer to the following arithmetic problem: {first} + {second} - {third} ="
    return texts, scores, make_prompt(row, question, str(right))


@dataclass(frozen=True)
class MadeChain:
    """A completion cut into thoughts and, where it has one, an answer; with what led to its credit."""

    thoughts: Sequence[str]
    answer: str | None = None
    score: float = 1.0
    critique: Critique | None = None
    numbers: Sequence[Mapping[str, float]] = ()
    """One mapping for each segment; none: the method tells no numbers."""


def judged_chain(
    thoughts: Sequence[str],
    answer: str | None,
    *,
    score: float = 1.0,
    reasons: Sequence[str] = (),
    seed: int = 0,
) -> MadeChain:
    """A chain with a critique and all numbers, made up; an answer has R, V, Y and A alone."""
    random_numbers = random.Random(seed)
    scores = [random_numbers.choice([0.0, 5.0, 10.0]) for _ in thoughts]
    progress = [10.0 * (k + 1) / (len(thoughts) + 1) for k in range(len(thoughts))]
    numbers: list[dict[str, float]] = []
    for k in range(len(thoughts) + (answer is not None)):
        reward, value = random_numbers.uniform(-1, 3), random_numbers.uniform(0, 2)
        own = {"R": reward, "V": value, "Y": reward + value / 2, "A": reward - value / 2}
        if k < len(thoughts):
            drawn = {name: random_numbers.uniform(-1, 1.5) for name in "ŜEQ"}
            own = {
                "S": scores[k],
                "P": progress[k],
                **drawn,
                "C": 10 * score + drawn["Ŝ"] + drawn["Q"],
                **own,
            }
        numbers.append(own)
    critique = Critique(10.0 * score, tuple(scores), tuple(progress), tuple(reasons))
    return MadeChain(thoughts, answer, score, critique, numbers)


def chains_record(
    step: int, chains: Sequence[MadeChain], *, row: int = 0, question: str = "?"
) -> dict[str, Any]:
    """A line of `trees.jsonl` of completions cut into chains, as RFT writes it."""
    tree = make_tree(make_prompt(row, question), ["".join([*c.thoughts, c.answer or ""]) for c in chains])
    leaves = dict.fromkeys(tree.leaves())
    for leaf, chain in zip(list(leaves), chains, strict=True):
        pieces = [*chain.thoughts, *([] if chain.answer is None else [chain.answer])]
        edges = [sum(map(len, pieces[:k])) for k in range(1, len(pieces))]
        kinds = [Kind.THOUGHT] * len(chain.thoughts) + [Kind.ANSWER] * (chain.answer is not None)
        tree = tree.cut(leaf, edges, kinds)
    ends = {tree.path(leaf)[1]: leaf for leaf in tree.leaves()}
    advantages: dict[int, Any] = {}
    grades, critiques, details = {}, {}, {}
    for first, chain in zip(leaves, chains, strict=True):
        leaf = ends[first]
        grades[leaf] = Grade(chain.score)
        if chain.critique is not None:
            critiques[leaf] = chain.critique
        for node, numbers in zip(tree.path(leaf)[1:], chain.numbers, strict=False):
            details[node] = dict(numbers)
            advantages[node] = np.full(len(tree.nodes[node]), numbers["A"], np.float32)
    return tree_record(
        step, Stage.TRAIN, tree, grades, decode, Credit(advantages, {}), critiques=critiques, details=details
    )


def grown_record(
    step: int,
    branching: Sequence[int],
    *,
    shape: str = "tree",
    row: int = 0,
    question: str = "?",
    seed: int = 0,
) -> dict[str, Any]:
    """A line of `trees.jsonl` of a tree with a group at each prefix.

    Args:
        step: training step.
        branching: size of the groups of each depth; the last are answers.
        shape: `tree`: every span is gone on from; `chain`: one of each group, and the others are leaves.
        row: of the prompt.
        question: the prompt's text.
        seed: of the numbers.
    """
    random_numbers = random.Random(seed)
    tree = Tree(make_prompt(row, question))
    grown, survivors, advantages, details = [ROOT], [], {}, {}
    for depth, size in enumerate(branching, start=1):
        kind = Kind.ANSWER if depth == len(branching) else Kind.THOUGHT
        following = []
        for parent in grown:
            group = tree.new_group()
            for member in range(size):
                first, second = random_numbers.randrange(99), random_numbers.randrange(99)
                ids = encode(f"Step {depth}.{member + 1}: {first} + {second} = ?\n")
                stop = StopReason.EOS if kind is Kind.ANSWER else StopReason.CUT
                node = tree.add(parent, ids, [-0.5] * len(ids), group=group, kind=kind, stop=stop)
                advantage = random_numbers.gauss(0, 1)
                advantages[node] = np.full(len(ids), advantage, np.float32)
                details[node] = {"value": random_numbers.random(), "A": advantage}
                if kind is Kind.THOUGHT:
                    details[node] |= {"S": random_numbers.uniform(0, 10), "P": 10.0 * depth / len(branching)}
                following.append(node)
        grown = following if shape == "tree" else [random_numbers.choice(following)]
        survivors += grown if shape == "chain" else []
    grades = {
        leaf: Grade(float(random_numbers.random() < 0.5))
        for leaf in tree.leaves()
        if tree.nodes[leaf].kind is Kind.ANSWER
    }
    return tree_record(
        step,
        Stage.TRAIN,
        tree,
        grades,
        decode,
        Credit(advantages, {}),
        details=details,
        survivors=survivors,
    )


def write_trees(path: Path, *steps: Sequence[Mapping[str, Any]], algorithm: str = "rft") -> RunFolder:
    """Write the folder of a run with the given lines of `trees.jsonl`, those of step 1, of step 2, ..."""
    config = CONFIG.format(steps=max(len(steps), 1)).replace('"grpo"', f'"{algorithm}"')
    folder = RunFolder.create(path, config)
    with folder:
        for step, records in enumerate(steps, start=1):
            folder.append_metrics({"step": step, "stage": Stage.TRAIN, "reward_mean": 0.5, **THOUGHT_METRICS})
            for record in records:
                folder.append_tree({**record, "step": step})
    return folder
