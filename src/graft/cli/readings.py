"""How to read the metrics of training, method by method: what is healthy, and what a rise means.

What a metric is stands in `report/metrics.py`. Here stands which method records it, and what it says there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from graft.algorithm_settings import ALGORITHM_NAMES, Grouped, Reused, Sampled
from graft.config_file import section_at
from graft.report.metrics import METRICS, Metric, Stage


def _those(kind: type, field: str = "name") -> frozenset[str]:
    """Algorithms whose settings are of a kind and have a field."""
    settings = {name: section_at(("algorithm",), {"algorithm": {"name": name}}) for name in ALGORITHM_NAMES}
    return frozenset(
        name for name, own in settings.items() if own and issubclass(own, kind) and field in own.model_fields
    )


SAMPLED = _those(Sampled)
GROUPED = _those(Grouped)
REUSED = _those(Reused)
VALUED = _those(Sampled, "value")
CLIPPED = _those(Reused, "clip")
SUPERVISED = frozenset(ALGORITHM_NAMES) - SAMPLED
REINFORCE, PPO, RFT, CISPO = (frozenset({name}) for name in ("reinforce", "ppo", "rft", "cispo"))
PROCESS_GRPO, GRFT = frozenset({"process_grpo"}), frozenset({"grft"})
ROLLOUTS, SPO_TREE = frozenset({"vineppo", "spo_chain", "spo_tree"}), frozenset({"spo_tree"})
CRITICISED = _those(Sampled, "critic")
BY_TOKENS = frozenset({"dr_grpo", "dapo"})
"""Grouped, and every token has the same weight."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a metric says in some methods."""

    metric: str
    text: str
    methods: Collection[str] = SAMPLED
    when: str = ""
    """What it takes to be recorded, where not every run of the method does."""


READINGS = (
    # Reward
    Reading(
        "reward_mean",
        "Should rise; it is noisy, since each step has other rows. A rise without one of `held_out_accuracy` "
        "means rows learned by heart, or a grader that is being gamed.",
    ),
    Reading(
        "reward_std",
        "Spread over all samples, between rows too. What trains is the spread inside the groups.",
        GROUPED,
    ),
    Reading(
        "reward_std", "At 0 all samples of the step scored alike: too easy, too hard.", SAMPLED - GROUPED
    ),
    Reading(
        "solved_share",
        "As `reward_mean`. Near 0 or 1 there is little left to compare: other rows.",
    ),
    Reading(
        "groups_with_signal",
        "The share of prompts that train. A fall: rows have become too easy or too hard, or completions of a "
        "group are all alike. `graft doctor` tells which.",
        GROUPED,
    ),
    Reading(
        "groups_with_signal",
        "The share of groups that train: of prompts whose steps do not all have the same reward.",
        PROCESS_GRPO,
    ),
    Reading(
        "groups_with_signal",
        "The share of sibling groups that train. A fall: candidates are all alike, or the critic cannot tell them"
        " apart.",
        GRFT,
    ),
    Reading(
        "groups_with_signal",
        "The share of sibling groups that train. A fall: the leaves below are all right, or all wrong.",
        SPO_TREE,
    ),
    Reading(
        "sampling_rounds",
        "1 is free. At `max_sampling_rounds` step after step, the batch is not filled any more: other rows.",
        GROUPED,
        "Only with `max_sampling_rounds` above 1, in steps that drew anything in vain.",
    ),
    Reading(
        "groups_discarded",
        "A rise is the price of dynamic sampling going up as rows are solved, or given up.",
        GROUPED,
        "Only beside `sampling_rounds`.",
    ),
    Reading(
        "groups_redrawn",
        "The price of `max_draws`. A rise: candidates are more and more alike, or the critic tells them less apart.",
        GRFT,
        "Only with `max_draws` above 1, in steps that drew anything in vain.",
    ),
    Reading(
        "tokens_discarded",
        "They count in `generated_tokens`: compare methods at equal `generated_tokens`, not at equal steps.",
        GROUPED | GRFT,
        "Only in steps that drew anything in vain.",
    ),
    Reading(
        "reward_baseline",
        "Follows `reward_mean` with a delay of about 1 / (1 - `baseline_decay`) steps. While it lags behind a "
        "rising reward, most samples are pushed up.",
        REINFORCE,
        "Not at the first step, which compares samples with each other.",
    ),
    Reading(
        "completion_length_mean",
        "A rise together with the reward is what more reasoning costs. A rise without it is padding, or wrong "
        "answers that grow because length makes them cheaper.",
    ),
    Reading(
        "truncated_share",
        "Healthy near 0. A completion that was cut off is graded for its length: raise `sampling.max_new_tokens`.",
    ),
    Reading("grades_failed", "Healthy at 0. They have no part in the step; the grader needs mending."),
    # Thoughts and critic
    Reading(
        "segments_per_completion",
        "A rise while `held_out_accuracy` stands still is step-count gaming: see the hazards below.",
        RFT | GRFT | PROCESS_GRPO,
    ),
    Reading(
        "critic_thought_mean",
        "Should rise with the reward; alone, the critic is being gamed.",
        RFT | GRFT | PROCESS_GRPO,
    ),
    Reading("critic_progress_mean", "The same of progress.", RFT | GRFT),
    Reading(
        "critic_overall_mean",
        "`critic.scale` times `reward_mean`, unless a judge gives G (`critic.overall`): then compare the two.",
        RFT | GRFT | PROCESS_GRPO,
    ),
    Reading(
        "standardised_thought_mean",
        "0 where `rewards.boost` equals `rewards.dampen`; with the defaults 0 or above, since what is below the "
        "mean counts half.",
        RFT | GRFT,
    ),
    Reading(
        "standardised_thought_absolute_mean",
        "A size, not a goal: how much S moves rewards, beside `progress_effect_mean` and G. Near 0 thoughts that are "
        "compared have equal scores, or stand alone.",
        RFT | GRFT,
    ),
    Reading(
        "progress_effect_mean",
        "Below 0 completions go back more than they get on, weighed by their thought scores. Compare with G, "
        "which is of the size of `critic.scale`: this is how much progress counts.",
        RFT | GRFT,
    ),
    Reading(
        "critic_agreement",
        "Healthy well above 0. A fall says that what the critic likes is less and less what is right: a share of "
        "verifiable reward, another critic.",
        RFT | GRFT | PROCESS_GRPO,
        "Only where both scores vary in the step.",
    ),
    Reading(
        "segments_clipped_share",
        '0 on policy. With several updates and `ratio = "segment"` it is soon large: long segments leave '
        "the clip range.",
        RFT | GRFT,
        'Not with `ratio = "token"`.',
    ),
    Reading(
        "nodes_per_tree",
        'What a tree costs. With `shape = "chain"` a rise is longer chains.',
        GRFT,
    ),
    Reading("critic_failed", "Healthy at 0. Such completions do not train.", CRITICISED),
    Reading("critic_calls", "Cost; `equations` makes none.", CRITICISED),
    Reading(
        "critic_tokens_sampled",
        "Cost: about (M + 1) n completions for each chain of M thoughts.",
        CRITICISED,
        'Only with `critic.type = "monte_carlo"`.',
    ),
    Reading("critic_prompt_tokens", "Cost.", CRITICISED, "Only with a critic that asks a judge."),
    Reading("critic_completion_tokens", "Cost.", CRITICISED, "Only with a critic that asks a judge."),
    Reading("critic_seconds", "Cost; of calls side by side more than the step waited.", CRITICISED),
    # The update
    Reading(
        "entropy",
        "Falls as the policy becomes sure. Near 0 too early: groups of equal completions, nothing left to choose "
        "from. A rise while the reward falls: the policy is coming apart.",
    ),
    Reading(
        "loss",
        'On policy, without a penalty and with `reduction = "sample_mean"` it is 0 but for rounding, since the '
        "advantages of a group add up to 0. Says nothing; `gradient_norm` does.",
        GROUPED - BY_TOKENS - CISPO,
    ),
    Reading(
        "loss",
        "On policy and without a penalty its sign tells about lengths: above 0, samples worse than their "
        "group are the longer ones. No measure of progress.",
        BY_TOKENS,
    ),
    Reading(
        "loss",
        "On policy and without a penalty it is 0 but for rounding, since the advantages of siblings add up"
        " to 0. Says nothing; `gradient_norm` does.",
        GRFT,
    ),
    Reading("loss", "Neither sign nor size measures progress.", PROCESS_GRPO | ROLLOUTS),
    Reading(
        "loss",
        "Of weight x advantage x log-probability: neither sign nor size measures progress.",
        CISPO | REINFORCE,
    ),
    Reading(
        "loss",
        'With `value.update = "joint"` the policy loss plus `value.coefficient` times `value_loss`: no measure of'
        " progress.",
        VALUED,
    ),
    Reading(
        "loss",
        "Cross-entropy in nats a token. Should fall. Where it goes on falling and `held_out_accuracy` does not "
        "rise, rows are learned by heart.",
        SUPERVISED,
    ),
    Reading(
        "validation_loss",
        "Should fall with `loss`. Where it rises while `loss` goes on falling, rows are learned by heart: stop there "
        "(`early_stopping`), or bring more rows.",
        SUPERVISED,
        "Only on held-out rows with a worked completion, at every evaluation; in a warm start with "
        "`warm_start.validate_every`.",
    ),
    Reading(
        "gradient_norm",
        "Steady is healthy. Peaks: a few samples with a large advantage or ratio. 0: nothing had signal.",
        SAMPLED - VALUED,
    ),
    Reading(
        "gradient_norm",
        "Of the policy's parameters, with the value loss's part in a shared trunk; in the value model's warm-up "
        "of the value model's own. Above `optimizer.max_gradient_norm` in every step: the value loss may drown "
        "the policy's.",
        VALUED,
    ),
    Reading("gradient_norm", "Steady or falling is healthy.", SUPERVISED),
    Reading("learning_rate", "As `optimizer.schedule` says.", SAMPLED - VALUED | SUPERVISED),
    Reading(
        "learning_rate",
        "Of the policy, 0 in the value model's warm-up; that of the value model's own parameters is "
        "`value.learning_rate` on the same schedule.",
        VALUED,
    ),
    Reading(
        "clipped_share",
        "0 on policy. With several updates or older samples, some is normal; `graft doctor` asks to look from 20 %, "
        "where samples were drawn in vain.",
        CLIPPED - {"gspo"},
    ),
    Reading(
        "clipped_share",
        "0 on policy. Whole completions are clipped at once and the range is narrow, so that the "
        "share is larger than under a ratio of tokens.",
        frozenset({"gspo"}),
    ),
    Reading(
        "clipped_share",
        "Tokens whose weight reached `weight_cap`; these train, too. 0 on policy.",
        CISPO,
    ),
    Reading(
        "ratio_max",
        "1 on policy. A rise: the updates on a batch go further than its samples can tell. `graft "
        "doctor` asks to look from 2.",
        REUSED - RFT,
    ),
    Reading(
        "ratio_max",
        "1 on policy. Of single tokens: that of a segment, their product, is not recorded.",
        RFT,
    ),
    Reading("ratio_max", "1, unless `refresh_every` is above 1.", REINFORCE),
    Reading(
        "kl_to_initial",
        "Grows with training. Fast growth without reward is drift: a lower `optimizer.learning_rate`, or a penalty.",
        SAMPLED,
        'Only with `report.kl_every`, or `kl.of = "rollout"`.',
    ),
    Reading(
        "kl_per_completion",
        "Grows with training, up to `kl.target` where there is one.",
        PPO,
        "Only with a KL penalty in the reward (`kl.place`).",
    ),
    Reading(
        "kl_coefficient",
        "Rises while the policy is further away than `kl.target`, else falls.",
        PPO,
        "Only with `kl.target`.",
    ),
    Reading(
        "value_loss",
        "Should fall and then stay low. A rise: returns change faster than the value model follows.",
        VALUED,
    ),
    Reading(
        "value_clipped_share",
        "0 on policy. A large share: `value.clip` is too small for the size of the returns.",
        VALUED,
    ),
    Reading(
        "value_explained_variance",
        "0 at first, since the head starts at 0; should rise. Below 0 the baseline does harm: see "
        "`value.warmup_steps`.",
        PPO,
        "Only where returns differ.",
    ),
    Reading(
        "value_explained_variance",
        "0 at first, since the head starts at 0; should rise. With `gae_lambda = 0` the targets contain the value"
        " of the next state, so a high number says that the values agree with each other, not that they are "
        "right.",
        RFT,
        "Only where targets differ.",
    ),
    Reading(
        "engine_gap_mean",
        "Depends on precision and engine and should stay where it began: `graft doctor` asks to look from 0.05. A"
        " rise: samples are less and less of the policy that is trained.",
    ),
    Reading("engine_gap_max", "Single tokens; a jump in one step says little."),
)


def reading_of(metric: str, method: str) -> Reading | None:
    """What a metric says in a method; None where there is nothing to say, or the method does not record it."""
    found = [reading for reading in READINGS if reading.metric == metric and method in reading.methods]
    return found[0] if found else None


def metrics_of(method: str) -> list[Metric]:
    """What a method's steps may record, in the order of the declaration."""
    stage = Stage.TRAIN if method in SAMPLED else Stage.WARM_START  # worked completions have no samples
    of_some = {reading.metric for reading in READINGS}
    return [
        metric
        for name, metric in METRICS.items()
        if stage in metric.stages and (name not in of_some or reading_of(name, method))
    ]
