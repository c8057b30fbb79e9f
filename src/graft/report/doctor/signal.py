"""Whether grading, update, engine and chat template give the samples a signal that can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from graft.report.doctor.check import (
    NO_SCORES,
    NO_TREES,
    Check,
    Measured,
    NotMeasured,
    why_no_pairs,
    why_not_compared,
)
from graft.report.doctor.evidence import COMPARE_PARTS, Evidence, Group, late_count
from graft.types import StopReason

CAUSES = {
    "all right": "Harder rows (`data.source`, `data.options`): these are solved already.",
    "all wrong": "Easier rows (`data.source`, `data.options`), a `warm_start`, more samples (`algorithm.group_size`).",
    "all cut off": "Raise `sampling.max_new_tokens`, or teach shorter answers with a `warm_start`.",
    "all equal": "A grader with finer scores (`grader`): all samples get the same one between right and wrong.",
}
"""Why a group has no signal -> what to change."""

PARTS_ALIKE = (
    "Raise `sampling.temperature`; a critic with finer scores, where there is one (`algorithm.critic`); other rows "
    "(`data.source`, `data.options`)."
)
"""The same where parts of samples are compared."""


def zero_signal(run: Evidence) -> Measured | NotMeasured:
    """Share of late groups in which nothing differs of what the algorithm compares."""
    if run.setting("algorithm.name") in COMPARE_PARTS:
        nothing = NotMeasured("no step recorded `groups_with_signal`: nothing had a score")
        return _recorded(run, "as recorded: parts of samples are compared", PARTS_ALIKE) or nothing
    if not run.compares_samples:
        return NotMeasured(why_not_compared(run))
    groups = [group for group in run.late if len(group.scores) > 1]
    if groups:
        return _by_cause(groups)
    return _recorded(run, f"{why_no_pairs(run)}, so nothing says why") or NotMeasured(why_no_pairs(run))


def _recorded(run: Evidence, how: str, change: str = "") -> Measured | None:
    """By the metric; None where no step recorded it."""
    shares = run.column("groups_with_signal")
    if not shares:
        return None
    idle = 1 - fmean(shares[-late_count(len(shares)) :])
    return Measured(idle, f"{100 * idle:.0f} % of the last steps' groups; {how}", change)


def _by_cause(groups: Sequence[Group]) -> Measured:
    """By the scores in the trees, with the reason why they are equal."""
    causes = Counter(_cause(group) for group in groups if not group.has_signal)
    share = causes.total() / len(groups)
    listed = ", ".join(
        f"{cause} {100 * causes[cause] / len(groups):.0f} %" for cause in CAUSES if causes[cause]
    )
    change = CAUSES[max(causes, key=lambda cause: causes[cause])] if causes else ""
    return Measured(
        share,
        f"{100 * share:.0f} % of {len(groups)} late groups" + (f": {listed}" if listed else ""),
        change,
        details={"causes": {cause: causes[cause] for cause in CAUSES}},
    )


def _cause(group: Group) -> str:
    if all(sample.truncated for sample in group.samples):
        return "all cut off"
    if all(sample.solved for sample in group.samples if sample.score is not None):
        return "all right"
    return "all wrong" if max(group.scores) <= 0 else "all equal"


def ungraded(run: Evidence) -> Measured | NotMeasured:
    """Share of training samples that could not be graded."""
    graded = [sample for sample in run.samples if sample.outcome]
    if not graded:
        return NotMeasured(NO_SCORES if run.groups else NO_TREES)
    outcomes = Counter(sample.outcome for sample in graded if sample.score is None)
    share = outcomes.total() / len(graded)
    listed = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
    return Measured(share, f"{outcomes.total()} of {len(graded)} samples" + (f": {listed}" if listed else ""))


def ratio(run: Evidence) -> Measured | NotMeasured:
    """Largest ratio of new to old probability, median over the late steps."""
    values = run.column("ratio_max")
    if not values:
        return NotMeasured("no step recorded `ratio_max`: this algorithm has no ratio, or nothing trained")
    late = sorted(values[-late_count(len(values)) :])
    middle = late[len(late) // 2]
    reuse = ("updates_per_batch", "minibatches", "refresh_every")
    once = all(run.setting(f"algorithm.{name}") == 1 for name in reuse)
    one = "; one update a batch: the policy that trains is the one that sampled" if once else ""
    return Measured(middle, f"largest ratio {middle:.3g} in a late step, {max(values):.3g} in the run{one}")


def clipped(run: Evidence) -> Measured | NotMeasured:
    """Share of trained tokens whose gradient the clip stopped, late steps."""
    values = run.column("clipped_share")
    if not values:
        return NotMeasured(
            "no step recorded `clipped_share`: this algorithm clips nothing, or nothing trained"
        )
    late = fmean(values[-late_count(len(values)) :])
    return Measured(late, f"{100 * late:.2g} % of the last steps' tokens, {100 * max(values):.2g} % at most")


def value_model(run: Evidence) -> Measured | NotMeasured:
    """How much of the returns the value model foresees, late steps."""
    values = run.column("value_explained_variance")
    if not values:
        return NotMeasured("no step recorded `value_explained_variance`: this algorithm has no value model")
    late = fmean(values[-late_count(len(values)) :])
    return Measured(
        late,
        f"{100 * late:.0f} % of the returns' variance in the last steps, {100 * max(values):.0f} % at most",
    )


def kl(run: Evidence) -> Measured | NotMeasured:
    """KL divergence from the model that training started with, last measurement."""
    values = run.column("kl_to_initial")
    if not values:
        return NotMeasured("no step recorded `kl_to_initial`: set `report.kl_every`")
    drift = ", ".join(
        f"{value:.3g}"
        for value in (values if len(values) < 4 else [values[0], values[len(values) // 2], values[-1]])
    )
    return Measured(values[-1], f"{drift} nats a token")


def engine_gap(run: Evidence) -> Measured | NotMeasured:
    """Mean |old - engine| log-probability, late steps."""
    values, largest = run.column("engine_gap_mean"), run.column("engine_gap_max")
    if not values:
        return NotMeasured("no step recorded `engine_gap_mean`: nothing was sampled and trained")
    late = fmean(values[-late_count(len(values)) :])
    text = f"{late:.3g} nats a token on average"
    return Measured(late, text + (f", {max(largest):.2g} at most" if largest else ""))


def ends(run: Evidence) -> Measured | NotMeasured:
    """Share of training samples that the model ended itself, by one of its end-of-sequence tokens."""
    if not run.samples:
        return NotMeasured(NO_TREES)
    ended = sum(sample.stop == StopReason.EOS for sample in run.samples) / len(run.samples)
    return Measured(ended, f"{100 * ended:.1f} % of {len(run.samples)} completions end by themselves")


def leaks(run: Evidence) -> Measured | NotMeasured:
    """Share of training samples whose text holds marks of a chat template."""
    if not run.samples:
        return NotMeasured(NO_TREES)
    share = sum(sample.leaks for sample in run.samples) / len(run.samples)
    return Measured(share, f"{100 * share:.1f} % of {len(run.samples)} completions")


def doubled_start(run: Evidence) -> Measured | NotMeasured:
    """Share of prompts that begin with the same token twice."""
    if not run.groups:
        return NotMeasured(NO_TREES)
    share = sum(group.doubled_start for group in run.groups) / len(run.groups)
    return Measured(share, f"{100 * share:.0f} % of {len(run.groups)} prompts")


SIGNAL = (
    Check(
        name="zero_signal",
        title="Groups without signal",
        failure_point="",
        measures="Share of the last fifth of steps' groups whose scores are all equal, by cause. Where parts of "
        "samples are compared (process GRPO, GRFT, SPO-tree), as recorded in `groups_with_signal`, without causes; not "
        "measured where nothing is compared within a group (REINFORCE, PPO, RFT, VinePPO, SPO-chain).",
        unit="share",
        look=0.5,
        bad=0.8,
        reason="Such a group has no gradient. At half, a step learns from half its prompts and each costs "
        "twice its tokens; at four fifths, five times.",
        change="Rows nearer to what the model can half do (`data.source`, `data.options`); "
        "`algorithm.group_size`.",
        measure=zero_signal,
    ),
    Check(
        name="ungraded",
        title="Samples without a grade",
        failure_point="",
        measures="Share of training samples that could not be graded for a reason that is not the model's.",
        unit="share",
        look=0.01,
        bad=0.05,
        reason="They leave their group, or count as 0 with `grading.failures`; from one in twenty a third of "
        "the groups of eight are judged on part of their samples.",
        change="The grader's own time limit (`grader`), `grading.judge.timeout_s`, `grading.judge.retries`, "
        "`grading.concurrency`.",
        measure=ungraded,
    ),
    Check(
        name="ratio",
        title="Ratio drift",
        failure_point="",
        measures="Largest probability ratio of a step, new policy to old, median over the last fifth of "
        "steps.",
        unit="",
        look=2.0,
        bad=10.0,
        reason="The surrogate is true near a ratio of 1. At 2 a token has left any usual clip range; at 10 "
        "the estimate of the step hangs on single tokens.",
        change="Lower `optimizer.learning_rate` or `algorithm.updates_per_batch`.",
        measure=ratio,
    ),
    Check(
        name="clipped",
        title="Clipped share",
        failure_point="",
        measures="Share of trained tokens whose gradient the clip stopped, mean over the last fifth of steps.",
        unit="share",
        look=0.2,
        bad=0.5,
        reason="A clipped token teaches nothing: at half, every second token was sampled, graded and computed "
        "in vain. The ratio of a long segment is a product and leaves the range at once.",
        change="Lower `optimizer.learning_rate` or `algorithm.updates_per_batch`, or widen "
        "`algorithm.clip.high` and `algorithm.clip.low`.",
        measure=clipped,
    ),
    Check(
        name="value_model",
        title="Value model foresees returns",
        failure_point="",
        measures="Share of the variance of the returns that the value model explains at sampling, mean over the last "
        "fifth of steps.",
        unit="share",
        look=0.3,
        bad=0.0,
        reason="What it does not explain stands in the advantages. At 0 it is no better than a constant: an advantage "
        "then says how hard its row is before it says what was done on it. With 30 % that is still most of it.",
        change="More updates of the value model from the same samples (`algorithm.updates_per_batch`, "
        "`algorithm.minibatches`), `algorithm.value.learning_rate`, `algorithm.value.trunk`; more steps; or methods "
        "that compare samples instead of foreseeing them, such as GRPO and GRFT (`algorithm`).",
        measure=value_model,
    ),
    Check(
        name="kl",
        title="Drift from the first model",
        failure_point="",
        measures="KL divergence of the policy from the model that training started with, last measurement.",
        unit="nats/token",
        look=0.1,
        bad=0.7,
        reason="From 0.7 = ln 2 on a token is on average twice as likely as under the first model: that is "
        "another model. Gains of reinforcement usually need less than 0.1.",
        change="Raise `algorithm.kl.coefficient`, lower `optimizer.learning_rate`, train shorter.",
        measure=kl,
    ),
    Check(
        name="engine_gap",
        title="Engine gap",
        failure_point="",
        measures="Mean |old - engine| of the tokens' log-probabilities, trainer against engine, last fifth of "
        "steps.",
        unit="nats/token",
        look=0.05,
        bad=0.2,
        reason="bf16 explains 0.03 to 0.05. At 0.2 the samples are off-policy by as much as the clip range "
        "allows the policy to move: template, weights or kernels differ between the two.",
        change='Set `model.precision` to "exact" or `rollout.engine` to "generic" to find the part that '
        "differs; `algorithm.engine_weight_cap` corrects for what remains.",
        measure=engine_gap,
    ),
    Check(
        name="ends",
        title="Completions end by themselves",
        failure_point="",
        measures="Share of training samples that ended with an end-of-sequence token.",
        unit="share",
        look=0.5,
        bad=0.05,
        reason="A model that knows its template ends most answers. At one in twenty it does not know the "
        "template, or its end token is not among those that stop the engine.",
        change="A model with a chat template (`model.name`), `model.chat_template_kwargs`, a `warm_start`, "
        "`sampling.max_new_tokens`.",
        measure=ends,
    ),
    Check(
        name="leaks",
        title="Template marks in completions",
        failure_point="",
        measures="Share of training samples whose text holds marks of a chat template, such as "
        "`<|im_start|>`, `[INST]` or a line that only says `user`.",
        unit="share",
        look=0.01,
        bad=0.1,
        reason="The model goes on as somebody else after its own turn, and the grader reads that too. One in "
        "a hundred can be chance; one in ten is a template or end token that does not fit.",
        change="`model.name` (an instruct model), `model.chat_template_kwargs`, a `warm_start` that ends its "
        "turns.",
        measure=leaks,
    ),
    Check(
        name="doubled_start",
        title="First token twice",
        failure_point="",
        measures="Share of prompts whose first two tokens are the same.",
        unit="share",
        look=0.5,
        bad=0.9,
        reason="A start token that stands twice was added by the template and by the tokenizer: the model has "
        "not seen that. Single prompts may begin so by themselves, nine in ten do not.",
        change="Mend the model's chat template (`model.name`), or `model.chat_template_kwargs`.",
        measure=doubled_start,
    ),
)
