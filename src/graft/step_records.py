"""What a step made on its way, and the lines of `metrics.jsonl` that come of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from graft.collect import Drawn
from graft.crediting import StepCredit
from graft.evaluation import Evaluation
from graft.objective.kl import k3
from graft.report.metrics import Moment, Stage
from graft.thoughts import Asked, LeafCritiques, critique_metrics
from graft.tree import Grown, Tree
from graft.types import Appraisal, Grade, StopReason, reaches
from graft.update.step import StepResult


@dataclass(frozen=True, slots=True)
class Validation:
    """The loss on worked completions of held-out rows."""

    loss: float
    """Nats a token."""

    rows: int


@dataclass(slots=True)
class Step:
    """One step in progress; filled stage by stage."""

    number: int
    """The first is 1."""

    trees: Sequence[Tree] = ()
    grades: Sequence[Mapping[int, Grade]] = ()
    grown: Sequence[Grown] = ()
    """How each of the trees grew, where groups stand at every prefix."""

    asked: Asked = field(default_factory=Asked)
    """What was asked about candidates meanwhile."""

    discarded: Drawn = field(default_factory=Drawn)
    """What was sampled and does not train."""

    rounds: int = 1
    """Rounds of sampling."""

    critiques: Sequence[LeafCritiques] = ()
    appraisals: Sequence[Appraisal] = ()
    credit: StepCredit | None = None
    learning_rate: float = 0.0
    """Of the policy."""

    result: StepResult | None = None
    kl_to_initial: float | None = None
    validation: Validation | None = None
    """Of a warm start, whose other measurements are not between its steps."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Part of the step -> wall-clock time."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure a part of the step; several times add up."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    @property
    def drawn_tokens(self) -> int:
        """Tokens of trees, also of those and of groups that were discarded."""
        return sum(tree.sampled_tokens for tree in self.trees) + self.tokens_discarded

    @property
    def tokens_discarded(self) -> int:
        """Of these, tokens of trees and groups that do not train."""
        return self.discarded.sampled_tokens + sum(own.tokens_redrawn for own in self.grown)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the engine drew: trees, and what the critic drew."""
        made = [critique for own in self.critiques for critique in own.values()]
        return self.drawn_tokens + sum(critique.sampled_tokens for critique in (*made, *self.asked.critiques))


@contextmanager
def step_clock(number: int) -> Iterator[Step]:
    """A step with its whole duration measured."""
    step = Step(number)
    with step.timed("step"):
        yield step


def step_record(
    step: Step,
    *,
    stage: Stage,
    learning_rate: float,
    threshold: float,
    generated_tokens: int,
    peak_memory_gb: float,
) -> dict[str, object]:
    """The metrics of a warm-start or training step. What was not measured is left out."""
    assert step.result is not None
    record: dict[str, object] = {
        "step": step.number,
        "stage": str(stage),
        "loss": step.result.loss,
        "gradient_norm": step.result.gradient_norm,
        "learning_rate": learning_rate,
        "tokens_trained": step.result.tokens_trained,
        "tokens_computed": step.result.tokens_computed,
        "step_seconds": step.seconds["step"],
        "update_seconds": step.seconds["update"],
        "peak_memory_gb": peak_memory_gb,
        "validation_loss": None if step.validation is None else step.validation.loss,
    }
    if not step.grades:
        return record
    facts = {} if step.credit is None else step.credit.facts
    return (
        record
        | step.result.facts
        | dict(facts)
        | _sampling_metrics(step, threshold)
        | {
            "kl_to_initial": step.kl_to_initial,
            "generated_tokens": generated_tokens,
            "load_seconds": step.seconds["load"],
            "sample_seconds": step.seconds["sample"],
            "grade_seconds": step.seconds["grade"],
        }
    )


def _sampling_metrics(step: Step, threshold: float) -> dict[str, object]:
    grades = [grade for own in (*step.grades, *step.discarded.grades) for grade in own.values()]
    scores = [grade.score for grade in grades if grade.score is not None]
    leaves = [(tree, leaf) for tree in (*step.trees, *step.discarded.trees) for leaf in tree.endings()]
    truncated = sum(tree.nodes[leaf].stop is StopReason.LENGTH for tree, leaf in leaves)
    metrics: dict[str, object] = {
        "grades_failed": sum(grade.failed for grade in grades),
        "completion_length_mean": sum(tree.completion_length(leaf) for tree, leaf in leaves) / len(leaves),
        "truncated_share": truncated / len(leaves),
        "tokens_sampled": step.sampled_tokens,
        "tokens_per_s": step.drawn_tokens / step.seconds["sample"],
    }
    if scores:
        mean = sum(scores) / len(scores)
        metrics["reward_mean"] = mean
        metrics["reward_std"] = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
        metrics["solved_share"] = sum(reaches(s, threshold) for s in scores) / len(scores)
    if step.credit is not None and step.credit.groups:
        metrics["groups_with_signal"] = step.credit.groups_with_signal / step.credit.groups
    if step.discarded.trees or step.rounds > 1:
        metrics["sampling_rounds"] = step.rounds
        metrics["groups_discarded"] = len(step.discarded.trees)
        metrics["tokens_discarded"] = step.tokens_discarded
    if redrawn := sum(own.groups_redrawn for own in step.grown):
        metrics["groups_redrawn"] = redrawn
        metrics["tokens_discarded"] = step.tokens_discarded
    metrics |= critique_metrics(step.critiques, step.asked)
    metrics |= {f"part_{name}_mean": mean for name, mean in _part_means(grades).items()}
    faults = Counter(str(fault) for grade in grades for fault in grade.faults)
    metrics |= {f"grading_{fault}_count": count for fault, count in sorted(faults.items())}
    usage = [tokens for grade in (*grades, *step.asked.grades) for tokens in grade.usage.values()]
    if usage:
        metrics["judge_prompt_tokens"] = sum(tokens.prompt for tokens in usage)
        metrics["judge_completion_tokens"] = sum(tokens.completion for tokens in usage)
    return metrics


def mean_kl(appraisals: Sequence[Appraisal]) -> float | None:
    """KL of the policy that sampled to its anchor: the exact one where it was asked for, else k3, over the appraised
    tokens; None where there are none."""
    exact = [kl for own in appraisals for kl in own.kl.values()]
    if exact:
        return float(np.concatenate(exact).mean(dtype=np.float64))
    pairs = [
        (own.old_logprobs[node], anchor) for own in appraisals for node, anchor in own.anchor_logprobs.items()
    ]
    if not pairs:
        return None
    old, anchor = (torch.from_numpy(np.concatenate(each)).double() for each in zip(*pairs, strict=True))
    return float(k3(old, anchor).mean())


def _part_means(grades: Sequence[Grade]) -> dict[str, float]:
    """Part -> mean over the grades that have it."""
    values: dict[str, list[float]] = {}
    for grade in grades:
        for name, value in grade.parts.items():
            values.setdefault(name, []).append(value)
    return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}


def evaluation_record(
    evaluation: Evaluation | None,
    validation: Validation | None = None,
    *,
    moment: Moment,
    step: int,
    generated_tokens: int,
    seconds: float,
) -> dict[str, object]:
    """The metrics of a measurement on held-out rows. What was not measured is left out."""
    record: dict[str, object] = {
        "step": step,
        "stage": str(Stage.EVALUATION),
        "moment": str(moment),
        "generated_tokens": generated_tokens,
        "evaluation_seconds": seconds,
    }
    if validation is not None:
        record |= {"validation_loss": validation.loss, "validation_rows": validation.rows}
    return record if evaluation is None else record | _sampled_metrics(evaluation)


def _sampled_metrics(evaluation: Evaluation) -> dict[str, object]:
    record: dict[str, object] = {
        "held_out_accuracy": evaluation.accuracy.mean,
        "held_out_low": evaluation.accuracy.low,
        "held_out_high": evaluation.accuracy.high,
        "held_out_reward_mean": evaluation.reward_mean,
        "held_out_length_mean": evaluation.length_mean,
        "held_out_truncated_share": evaluation.truncated_share,
        "held_out_rows": evaluation.rows,
    }
    parts = _part_means([grade for own in evaluation.grades for grade in own.values()])
    return (
        record
        | {f"held_out_pass_at_{k}": pass_at.mean for k, pass_at in evaluation.pass_at.items()}
        | {f"held_out_part_{name}_mean": mean for name, mean in parts.items()}
    )
