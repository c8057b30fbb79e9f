"""Credit of the table's rows by hand: who is compared with whom, what trains, with which weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graft.algorithm_settings import (
    DAPO,
    GRPO,
    KL,
    PPO,
    RLOO,
    AdaptiveKL,
    DrGRPO,
    Overlong,
    Reinforce,
)
from graft.crediting import (
    Evidence,
    credit_centred,
    credit_leave_one_out,
    credit_needs_appraisal,
    credit_relative,
    credit_running_mean,
    credit_values,
)
from graft.tree import ROOT, Kind, Tree
from graft.types import Appraisal, StopReason
from tests.test_algorithms import approx, flat, graded, group


def ending(*stops: StopReason) -> Tree:
    """Completions of 2 tokens each."""
    tree = Tree(group(1).prompt)
    own = tree.new_group()
    for stop in stops:
        tree.add(ROOT, [5, 6], [-1.0, -1.0], group=own, kind=Kind.COMPLETION, stop=stop)
    return tree


def test_leave_one_out():
    # scores 3, 0, 0: 3 - 0; 0 - 3/2; sample mean over 3 samples
    evidence = Evidence([group(1, 2, 1)], [graded(3.0, 0.0, 0.0)])
    [own] = credit_leave_one_out(evidence, RLOO()).trees
    assert flat(own) == approx({1: ([3.0], [1 / 3]), 2: ([-1.5] * 2, [1 / 6] * 2), 3: ([-1.5], [1 / 3])})


def test_centred_with_a_constant_denominator():
    # 10 tokens at most, two samples: every token weighs 1/20 whatever its completion's length
    evidence = Evidence([group(1, 4)], [graded(1.0, 0.0)], longest=10)
    [own] = credit_centred(evidence, DrGRPO()).trees
    assert flat(own) == approx({1: ([0.5], [1 / 20]), 2: ([-0.5] * 4, [1 / 20] * 4)})


def test_token_mean_counts_the_tokens_of_groups_without_signal():
    evidence = Evidence([group(1, 3), group(2, 2, row=1)], [graded(1.0, 0.0), graded(1.0, 1.0)], longest=100)
    credit = credit_relative(evidence, DAPO(scale="none"))
    assert flat(credit.trees[0]) == approx({1: ([0.5], [1 / 8]), 2: ([-0.5] * 3, [1 / 8] * 3)})
    assert flat(credit.trees[1]) == {}
    assert credit.denominators == [4, 4]


def test_the_overlong_penalty_enters_the_reward():
    # 10 tokens at most, the last 4 cost: 8 tokens -1/2, 10 tokens -1; equal scores, so length alone makes signal
    evidence = Evidence([group(6, 8, 10)], [graded(1.0, 1.0, 1.0)], longest=10)
    credit = credit_relative(evidence, GRPO(scale="none", overlong=Overlong(buffer_share=0.4)))
    assert [own[0] for own, _ in flat(credit.trees[0]).values()] == pytest.approx([0.5, 0.0, -0.5])
    assert credit.groups_with_signal == 1


def test_masked_completions_count_in_the_baseline_but_not_in_the_denominator():
    tree = ending(StopReason.EOS, StopReason.LENGTH, StopReason.EOS)
    evidence = Evidence([tree], [graded(1.0, 0.0, 0.5)], longest=2)
    credit = credit_relative(evidence, GRPO(scale="none", overlong=Overlong(mask=True)))
    assert flat(credit.trees[0]) == approx({1: ([0.5] * 2, [1 / 4] * 2), 3: ([0.0] * 2, [1 / 4] * 2)})
    assert credit.denominators == [2]


def test_all_masked_and_none_scored():
    evidence = Evidence([ending(StopReason.LENGTH)], [graded(1.0)], longest=2)
    masked = Overlong(mask=True)
    for give, settings in [
        (credit_relative, GRPO(overlong=masked)),
        (credit_running_mean, Reinforce(overlong=masked)),
    ]:
        credit = give(evidence, settings)
        assert flat(credit.trees[0]) == {}
        assert credit.denominators == [0]
    appraised = Appraisal(old_values={1: np.zeros(2, np.float32)})
    credit = credit_values(
        Evidence([ending(StopReason.LENGTH)], [graded(1.0)], appraisals=[appraised], longest=2),
        PPO(overlong=masked),
    )
    assert flat(credit.trees[0]) == {}
    for give, settings in [(credit_leave_one_out, RLOO()), (credit_values, PPO())]:
        nothing = give(Evidence([group(2)], [graded(None)], appraisals=[Appraisal()], longest=2), settings)
        assert (nothing.groups, [flat(own) for own in nothing.trees]) == (0, [{}])


def test_the_running_mean_goes_from_step_to_step():
    settings = Reinforce(baseline_decay=0.5)
    first = credit_running_mean(Evidence([group(1, 1)], [graded(1.0, 0.0)]), settings)
    # no past: each against the other
    assert flat(first.trees[0]) == approx({1: ([1.0], [0.5]), 2: ([-1.0], [0.5])})
    assert first.carried == {"baseline_mean": 0.5, "baseline_weight": 2.0}
    second = credit_running_mean(
        Evidence([group(1), group(2, row=1)], [graded(1.0), graded(1.0)], carried=first.carried), settings
    )
    assert flat(second.trees[0]) == approx({1: ([0.5], [0.5])})
    assert flat(second.trees[1]) == approx({1: ([0.5] * 2, [0.25] * 2)})
    # (0.5 · 2 · 0.5 + 2) / 3
    assert second.carried == pytest.approx({"baseline_mean": 2.5 / 3, "baseline_weight": 3.0})
    assert second.facts == {"reward_baseline": 0.5}


def appraised(values: dict[int, list[float]], kl: dict[int, list[float]] | None = None) -> Appraisal:
    """Values, and log-probabilities whose k1 to the anchor is `kl`."""
    gaps = kl or {}
    return Appraisal(
        old_logprobs={n: np.full(len(own), -2.0, np.float32) for n, own in gaps.items()},
        anchor_logprobs={n: (-2.0 - np.array(own)).astype(np.float32) for n, own in gaps.items()},
        old_values={n: np.array(own, np.float32) for n, own in values.items()},
    )


@pytest.mark.parametrize(
    ("gae_lambda", "advantages", "targets"),
    [
        # score 1 at the third token, values 0.5, 0.25, 0.75, γ = 1/2
        # λ = 1: returns 1/4, 1/2, 1
        (1.0, [-0.25, 0.25, 0.25], [0.25, 0.5, 1.0]),
        # λ = 0: Y = γ V(next): 1/8, 3/8, and 1
        (0.0, [-0.375, 0.125, 0.25], [0.125, 0.375, 1.0]),
    ],
)
def test_ppo_by_hand_at_both_ends_of_lambda(gae_lambda, advantages, targets):
    evidence = Evidence([group(3)], [graded(1.0)], appraisals=[appraised({1: [0.5, 0.25, 0.75]})])
    credit = credit_values(evidence, PPO(gamma=0.5, gae_lambda=gae_lambda, whiten=False))
    [own] = credit.trees
    assert flat(own) == approx({1: (advantages, [1 / 3] * 3)})
    assert own.value_targets[1].tolist() == pytest.approx(targets)
    assert own.value_weights[1].tolist() == pytest.approx([1 / 3] * 3)


def test_ppo_whitens_over_the_tokens_of_the_batch():
    evidence = Evidence(
        [group(1, 2), group(1, row=1)],
        [graded(1.0, 0.0), graded(3.0)],
        appraisals=[appraised({1: [0.0], 2: [0.0, 0.0]}), appraised({1: [0.0]})],
    )
    credit = credit_values(evidence, PPO(gae_lambda=1.0))
    raw = torch.tensor([1.0, 0.0, 0.0, 3.0])
    expected = ((raw - raw.mean()) / raw.std()).tolist()
    found = [x for own in credit.trees for advantages, _ in flat(own).values() for x in advantages]
    assert found == pytest.approx(expected, rel=1e-6)
    assert [x for own in credit.trees for t in own.value_targets.values() for x in t] == [1, 0, 0, 3]
    assert credit.facts["value_explained_variance"] == 0.0  # a constant explains nothing


def test_ppo_pays_for_kl_token_by_token_and_steers_its_weight():
    # β = 0.1, k1 = 2 and 3: rewards -0.2 and 1 - 0.3; returns (γ = 1) 0.5 and 0.7
    evidence = Evidence([group(2)], [graded(1.0)], appraisals=[appraised({1: [0.0, 0.0]}, {1: [2.0, 3.0]})])
    kl = AdaptiveKL(coefficient=0.1, target=4.0, horizon=10)
    credit = credit_values(evidence, PPO(gae_lambda=1.0, whiten=False, kl=kl))
    assert flat(credit.trees[0])[1][0] == pytest.approx([0.5, 0.7])
    assert credit.facts == pytest.approx(
        {"kl_per_completion": 5.0, "kl_coefficient": 0.1, "value_explained_variance": 0.0}
    )
    # 5 / 4 - 1 = 0.25, at most 0.2, for 1 of 10 completions
    assert credit.carried == pytest.approx({"kl_coefficient": 0.1 * 1.02})
    again = credit_values(
        Evidence(
            evidence.trees, evidence.grades, appraisals=evidence.appraisals, carried={"kl_coefficient": 0.2}
        ),
        PPO(gae_lambda=1.0, whiten=False, kl=kl),
    )
    assert flat(again.trees[0])[1][0] == pytest.approx([0.0, 0.4])


def test_ppo_with_kl_in_the_loss_leaves_the_reward_alone():
    evidence = Evidence([group(2)], [graded(1.0)], appraisals=[appraised({1: [0.0, 0.0]}, {1: [2.0, 3.0]})])
    kl = AdaptiveKL(coefficient=0.1, place="loss", estimator="k3")
    credit = credit_values(evidence, PPO(gae_lambda=1.0, whiten=False, kl=kl))
    assert flat(credit.trees[0])[1][0] == pytest.approx([1.0, 1.0])
    assert credit.carried == {}


@pytest.mark.parametrize(("estimator", "penalty"), [("k1", math.log(2)), ("k3", 0.5 - 1 + math.log(2))])
def test_kl_in_the_reward_of_a_group(estimator, penalty):
    # the first completion left the anchor by k1 = log 2 at its one token; the second did not
    kl = KL(coefficient=0.5, place="reward", estimator=estimator)
    evidence = Evidence(
        [group(1, 1)], [graded(1.0, 1.0)], appraisals=[appraised({}, {1: [math.log(2)], 2: [0.0]})]
    )
    credit = credit_relative(evidence, GRPO(scale="none", kl=kl))
    assert flat(credit.trees[0]) == approx({1: ([-0.25 * penalty], [0.5]), 2: ([0.25 * penalty], [0.5])})


def test_who_asks_the_networks_before_credit():
    in_reward = KL(coefficient=0.1, place="reward", estimator="k1")
    assert not credit_needs_appraisal(GRPO())
    assert not credit_needs_appraisal(GRPO(kl=KL(coefficient=0.1)))
    assert not credit_needs_appraisal(GRPO(kl=KL(coefficient=0.0, place="reward")))
    assert credit_needs_appraisal(GRPO(kl=in_reward))
    assert credit_needs_appraisal(PPO())
