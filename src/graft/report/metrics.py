"""Every number that a run records, declared once: name, unit, meaning. Imports no torch.

A name that is not declared here cannot be recorded. Charts, tooltips, TensorBoard tags and
`docs/reference/metrics.md` come from this table, so one thing has one name everywhere.
A metric that nobody measured is left out of the record; it is never 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal


class Stage(StrEnum):
    """What a record of `metrics.jsonl` or `trees.jsonl` belongs to."""

    WARM_START = "warm_start"
    TRAIN = "train"
    EVALUATION = "evaluation"


class Moment(StrEnum):
    """When in the run an evaluation was made."""

    BEFORE = "before"  # the model as it was given
    AFTER_WARM_START = "after_warm_start"  # only where the run has a warm start
    DURING = "during"  # between training steps
    AFTER = "after"  # when training had ended


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared name."""

    name: str
    """As it stands in `metrics.jsonl`. `<k>` stands for a positive number, `<name>` for any text."""

    unit: str
    """Empty for numbers without a unit and for text."""

    meaning: str
    """One sentence for people, Markdown."""

    chart: str | None = None
    """Title of the chart that draws it; three metrics at most share one, or a `<name>` has it. None: not drawn."""

    higher_is: Literal["better", "worse"] | None = None
    """None where neither direction is good by itself."""

    stages: tuple[Stage, ...] = (Stage.TRAIN,)
    """The stages that record it."""

    special: bool = False
    """Whether only some algorithms have it, so that nobody misses it elsewhere."""

    wall_clock: bool = False
    """Whether it is measured on the machine, time or memory, so that repeating the run does not repeat it."""

    text: bool = False
    """Whether its value is a word instead of a number."""

    label: str = ""
    """What it is called beside the others of its chart."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """What a recorded name has to match in full."""
        escaped = re.escape(self.name).replace("<k>", "[1-9][0-9]*").replace("<name>", ".+")
        return re.compile(escaped)


EVERY_STAGE = (Stage.WARM_START, Stage.TRAIN, Stage.EVALUATION)
OPTIMISING = (Stage.WARM_START, Stage.TRAIN)
MEASURING = (Stage.EVALUATION,)

_DECLARED = (
    # Which record this is
    Metric(
        "step",
        "",
        "Number of the step in its stage, from 1. For an evaluation: training steps made before it.",
        stages=EVERY_STAGE,
    ),
    Metric("stage", "", "`warm_start`, `train` or `evaluation`.", stages=EVERY_STAGE, text=True),
    Metric(
        "moment",
        "",
        "When an evaluation was made: `before`, `after_warm_start`, `during` or `after`.",
        stages=MEASURING,
        text=True,
    ),
    # What was sampled and how it was graded
    Metric("reward_mean", "score", "Mean score of the step's graded samples.", "Reward", "better"),
    Metric("reward_std", "score", "Standard deviation of the step's scores over all samples."),
    Metric(
        "solved_share",
        "share",
        "Share of graded samples with a score of at least `evaluation.threshold`.",
        higher_is="better",
    ),
    Metric(
        "part_<name>_mean",
        "score",
        "Mean of the grader's part `<name>`; one metric for each part that it names.",
        "Parts of the score",
        special=True,
    ),
    Metric(
        "groups_with_signal",
        "share",
        "Share of the batch's groups whose rewards are not all equal. The others have no gradient.",
        "Groups with signal",
        "better",
    ),
    Metric(
        "sampling_rounds", "rounds", "Rounds of sampling until the batch was full (`max_sampling_rounds`)."
    ),
    Metric(
        "groups_discarded",
        "groups",
        "Groups that dynamic sampling drew and left out of the batch: without signal, or more than were needed.",
        higher_is="worse",
    ),
    Metric(
        "groups_redrawn",
        "groups",
        "Draws of sibling groups that were thrown away because all candidates had the same score.",
        higher_is="worse",
    ),
    Metric("tokens_discarded", "tokens", "Tokens drawn for these two.", higher_is="worse"),
    Metric(
        "reward_baseline",
        "score",
        "REINFORCE's running mean of earlier rewards, which this step's are compared to.",
    ),
    Metric(
        "completion_length_mean",
        "tokens",
        "Mean length of the step's completions, the end-of-sequence token counted.",
        "Completion length",
    ),
    Metric(
        "truncated_share",
        "share",
        "Share of completions that reached `sampling.max_new_tokens` before they ended.",
        higher_is="worse",
    ),
    Metric(
        "grades_failed",
        "samples",
        "Samples that could not be graded, for no fault of the model: timeout, crash, score not finite.",
        higher_is="worse",
    ),
    Metric(
        "grading_<name>_count",
        "samples",
        "Samples with the flag `<name>` of OpenAI's run response, e.g. `sample_parse_error`.",
        higher_is="worse",
    ),
    Metric(
        "judge_prompt_tokens", "tokens", "Tokens that judge models read; answers from the cache took none."
    ),
    Metric("judge_completion_tokens", "tokens", "Tokens that judge models wrote."),
    # Thoughts and their critic
    Metric(
        "segments_per_completion",
        "segments",
        "Mean number of segments (thoughts and answer) of a completion. With the overall score in every segment, more "
        "segments earn more.",
        "Segments a completion",
        special=True,
    ),
    Metric(
        "nodes_per_tree",
        "nodes",
        "Mean number of nodes of a tree below its prompt: candidates of all depths.",
    ),
    Metric(
        "critic_thought_mean",
        "score",
        "Mean of the critic's score of a thought, S.",
        "Critic scores",
        special=True,
        label="S",
    ),
    Metric(
        "critic_progress_mean",
        "score",
        "Mean of the critic's progress score, P.",
        "Critic scores",
        special=True,
        label="P",
    ),
    Metric(
        "critic_overall_mean",
        "score",
        "Mean over completions of the score of the whole, G.",
        "Critic scores",
        special=True,
        label="G",
    ),
    Metric(
        "standardised_thought_mean", "", "Mean of Ŝ, boosted or dampened: the thought's part of a reward."
    ),
    Metric(
        "standardised_thought_absolute_mean",
        "",
        "Mean of |Ŝ|: the size of the thought's part of a reward.",
        "Reward parts",
        special=True,
        label="|Ŝ|",
    ),
    Metric(
        "progress_effect_mean",
        "",
        "Mean of Q, the progress's part of a reward.",
        "Reward parts",
        special=True,
        label="Q",
    ),
    Metric(
        "critic_agreement",
        "",
        "Correlation, over the step's completions, of the mean thought score with the grader's score. A critic that is "
        "being gamed drifts away from the grader.",
        "Critic and grader",
        "better",
        special=True,
    ),
    Metric(
        "segments_clipped_share",
        "share",
        "Share of segments whose gradient the clip stopped, where each segment has one ratio.",
        "Segments clipped",
        special=True,
    ),
    Metric(
        "critic_failed",
        "completions",
        "Completions that the critic could not score.",
        "Failed critiques",
        "worse",
        special=True,
    ),
    Metric(
        "critic_calls",
        "calls",
        "Requests that the critic made, those about candidates while trees grow included.",
    ),
    Metric(
        "critic_tokens_sampled",
        "tokens",
        "Tokens that the policy drew for the critic; they count as generated.",
    ),
    Metric("critic_prompt_tokens", "tokens", "Tokens that the critic's judge models read."),
    Metric("critic_completion_tokens", "tokens", "Tokens that the critic's judge models wrote."),
    Metric(
        "critic_seconds",
        "s",
        "Time of the critic's calls, those side by side added up.",
        higher_is="worse",
        wall_clock=True,
    ),
    # The update
    Metric(
        "entropy",
        "nats/token",
        "Mean entropy of the sampling distribution (what top-k, top-p and min-p kept) over trained tokens. Near 0 "
        "nothing is explored.",
        "Entropy",
    ),
    Metric("loss", "", "What the optimiser step minimised.", "Loss", stages=OPTIMISING),
    Metric(
        "gradient_norm",
        "",
        "L2 norm over all gradients, before clipping.",
        "Gradient norm",
        stages=OPTIMISING,
    ),
    Metric("learning_rate", "", "Learning rate of the optimiser step.", stages=OPTIMISING),
    Metric("clipped_share", "share", "Share of trained tokens whose gradient the clip stopped."),
    Metric("ratio_max", "", "Largest probability ratio, new policy to old, over the trained tokens."),
    Metric(
        "kl_per_completion",
        "nats",
        "Mean over completions of the sum of their tokens' KL to the anchor: `k1`, or `exact` where that is the "
        "estimator.",
    ),
    Metric(
        "kl_coefficient", "", "β, the weight of the KL penalty in the reward, where it follows `kl.target`."
    ),
    Metric(
        "value_loss",
        "",
        "Mean over states of the value loss, not yet times `value.coefficient`.",
    ),
    Metric("value_clipped_share", "share", "Share of states whose value gradient the clip stopped."),
    Metric(
        "value_explained_variance",
        "share",
        "1 − Var(target − value) / Var(target) at sampling: 1 is a perfect value model, 0 no better than a constant.",
        "Value model",
        "better",
        special=True,
    ),
    Metric(
        "kl_to_initial",
        "nats/token",
        "Mean KL divergence of the policy from the model that training started with, over sampled tokens.",
        "KL to initial",
    ),
    Metric(
        "engine_gap_mean",
        "nats/token",
        "Mean |old − engine|: log-probabilities of the trainer against those of the engine that sampled.",
        "Engine gap",
        "worse",
        label="mean",
    ),
    Metric(
        "engine_gap_max",
        "nats/token",
        "Largest |old − engine| of the step's tokens.",
        "Engine gap",
        "worse",
        label="max",
    ),
    # Amounts
    Metric("tokens_sampled", "tokens", "Tokens that the engine drew for the step."),
    Metric("tokens_trained", "tokens", "Tokens with a weight in the step's loss.", stages=OPTIMISING),
    Metric(
        "tokens_computed",
        "tokens",
        "Tokens that went through the network in the update, prompts included, shared spans once.",
        stages=OPTIMISING,
    ),
    Metric(
        "generated_tokens",
        "tokens",
        "Tokens drawn for training since the run began, this step included.",
        stages=(Stage.TRAIN, Stage.EVALUATION),
    ),
    # Time and memory
    Metric("tokens_per_s", "tokens/s", "Speed of sampling.", "Sampling speed", "better", wall_clock=True),
    Metric(
        "sample_seconds", "s", "Time to sample the step's completions.", higher_is="worse", wall_clock=True
    ),
    Metric(
        "grade_seconds",
        "s",
        "Time that the step waited for grades when sampling had ended.",
        higher_is="worse",
        wall_clock=True,
    ),
    Metric(
        "update_seconds",
        "s",
        "Time of forward, backward and optimiser.",
        higher_is="worse",
        stages=OPTIMISING,
        wall_clock=True,
    ),
    Metric(
        "load_seconds", "s", "Time to hand the new weights to the engine.", higher_is="worse", wall_clock=True
    ),
    Metric(
        "step_seconds", "s", "Time of the whole step.", higher_is="worse", stages=OPTIMISING, wall_clock=True
    ),
    Metric(
        "peak_memory_gb",
        "GB",
        "Most memory held so far by the process, or on the device where there is one (10⁹ bytes).",
        higher_is="worse",
        stages=OPTIMISING,
        wall_clock=True,
    ),
    # Held-out rows
    Metric(
        "validation_loss",
        "nats/token",
        "Cross-entropy of the worked completions of held-out rows, reduced as `loss`: of the first `evaluation.rows` "
        "rows, or of all.",
        "Validation loss",
        "worse",
        (Stage.WARM_START, Stage.EVALUATION),
        special=True,
    ),
    Metric("validation_rows", "rows", "Held-out rows with a worked completion.", stages=MEASURING),
    Metric(
        "held_out_accuracy",
        "share",
        "Share of held-out samples with a score of at least `evaluation.threshold`.",
        "Held-out accuracy",
        "better",
        MEASURING,
    ),
    Metric("held_out_low", "share", "Lower end of its 95 % Wilson interval.", stages=MEASURING),
    Metric("held_out_high", "share", "Upper end of its 95 % Wilson interval.", stages=MEASURING),
    Metric(
        "held_out_pass_at_<k>",
        "share",
        "Estimated chance that at least one of `<k>` completions of a held-out row is solved.",
        higher_is="better",
        stages=MEASURING,
    ),
    Metric(
        "held_out_reward_mean", "score", "Mean score on held-out rows.", higher_is="better", stages=MEASURING
    ),
    Metric(
        "held_out_part_<name>_mean",
        "score",
        "Mean of the grader's part `<name>` on held-out rows.",
        stages=MEASURING,
    ),
    Metric("held_out_length_mean", "tokens", "Mean length of held-out completions.", stages=MEASURING),
    Metric(
        "held_out_truncated_share",
        "share",
        "Share of held-out completions that reached the token limit.",
        higher_is="worse",
        stages=MEASURING,
    ),
    Metric("held_out_rows", "rows", "Held-out rows measured.", stages=MEASURING),
    Metric("evaluation_seconds", "s", "Time of the evaluation.", stages=MEASURING, wall_clock=True),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _DECLARED}
"""All declared metrics by name, in the order in which people should read them."""

_PATTERNS = [(metric.pattern, metric) for metric in _DECLARED if "<" in metric.name]


def find_metric(name: str) -> Metric:
    """The declaration of a recorded name.

    Raises:
        ValueError: nothing of this name is declared.
    """
    if name in METRICS and "<" not in name:
        return METRICS[name]
    for pattern, metric in _PATTERNS:
        if pattern.fullmatch(name):
            return metric
    nearest = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(f"metric '{name}' is not declared in graft.report.metrics.METRICS.{hint}")


def check_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record ready for `metrics.jsonl`: every name declared, plain numbers, what is None left out.

    Args:
        record: metric name to value; numpy numbers are welcome.

    Raises:
        ValueError: a name is not declared, a value is neither a number nor the word that it should be, or the
            record does not say its `step` and `stage` (and `moment`, if it is an evaluation).
    """
    checked = {
        name: _plain(find_metric(name), name, value) for name, value in record.items() if value is not None
    }
    if "step" not in checked or "stage" not in checked:
        raise ValueError(f"a record needs 'step' and 'stage', got {sorted(checked)}")
    if (Stage(checked["stage"]) is Stage.EVALUATION) != ("moment" in checked):
        raise ValueError("an evaluation says its 'moment', and nothing else does")
    if "moment" in checked:
        Moment(checked["moment"])
    return checked


def without_wall_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is equal to the bit when the same run is made again."""
    return {name: value for name, value in record.items() if not find_metric(name).wall_clock}


def _plain(metric: Metric, name: str, value: Any) -> str | int | float:
    value = value.item() if hasattr(value, "item") else value
    if metric.text and isinstance(value, str):
        return str(value)
    if not metric.text and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    wanted = "a word" if metric.text else "a number"
    raise ValueError(f"metric '{name}' wants {wanted}, got {value!r}")
