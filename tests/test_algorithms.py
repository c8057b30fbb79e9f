"""Credit and losses of the table by hand, and what leaving out a group without signal must not change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from graft.algorithm_parts import KL, Entropy, TokenClip
from graft.algorithm_settings import ALGORITHM_NAMES, GRPO, RFT, SFT, PolicyKL
from graft.algorithms import ALGORITHMS
from graft.crediting import Evidence, StepCredit, credit_relative, credit_worked
from graft.losses import TokenBatch, loss_clipped, loss_cross_entropy, loss_segments
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Grade, Outcome, Prompt, StopReason
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision
from graft.update.step import POLICY, optimise, policy_loss
from tests.update.test_exactness import load

FAILED = Grade(None, Outcome.TIMED_OUT)


def group(*lengths: int, row: int = 0, seed: int = 0) -> Tree:
    rng = np.random.default_rng([seed, row])
    prompt = Prompt(
        row=row, messages=(), item={}, tokens=rng.integers(3, 300, 4).astype(np.int32), question=str(row)
    )
    tree = Tree(prompt)
    own = tree.new_group()
    for length in lengths:
        tree.add(
            ROOT,
            rng.integers(3, 300, length).astype(np.int32),
            -rng.random(length).astype(np.float32),
            group=own,
            kind=Kind.COMPLETION,
            stop=StopReason.EOS,
        )
    return tree


def graded(*scores: float | None) -> dict[int, Grade]:
    return {leaf: FAILED if score is None else Grade(score) for leaf, score in enumerate(scores, start=1)}


def credit_group(trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]], settings: GRPO) -> StepCredit:
    return credit_relative(Evidence(trees, grades), settings)


def flat(credit: Credit) -> dict[int, tuple[list[float], list[float]]]:
    assert set(credit.advantages) == set(credit.weights)
    return {
        node: (credit.advantages[node].tolist(), credit.weights[node].tolist()) for node in credit.advantages
    }


def approx(expected: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> dict[int, tuple]:
    return {n: (pytest.approx(list(a), rel=1e-6), pytest.approx(list(w))) for n, (a, w) in expected.items()}


def test_two_groups_by_hand():
    # group 0: mean 1/2, standard deviation (N - 1) sqrt(1/2); group 1: mean 1, sqrt((1 + 0 + 1) / 2) = 1.
    # Five samples: a token of a sample of length n weighs 1 / (5 n).
    credit = credit_group(
        [group(2, 1), group(1, 4, 2, row=1)], [graded(1.0, 0.0), graded(0.0, 1.0, 2.0)], GRPO()
    )
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    b = 1 / (1 + 1e-4)
    assert flat(credit.trees[0]) == approx({1: ([a, a], [0.1, 0.1]), 2: ([-a], [0.2])})
    assert flat(credit.trees[1]) == approx(
        {1: ([-b], [0.2]), 2: ([0.0] * 4, [0.05] * 4), 3: ([b, b], [0.1, 0.1])}
    )
    assert (credit.groups, credit.groups_with_signal) == (2, 2)
    for own in credit.trees:
        assert all(x.dtype == np.float32 for x in own.advantages.values())
        assert all(x.dtype == np.float64 for x in own.weights.values())


def test_without_scaling():
    [own] = credit_group([group(1, 1)], [graded(3.0, 0.0)], GRPO(scale="none")).trees
    assert flat(own) == approx({1: ([1.5], [0.5]), 2: ([-1.5], [0.5])})


def test_a_sample_without_a_score_leaves_its_group_and_the_denominator():
    # left: scores 1 and 0; mean 1/2 as if the third did not exist
    [own] = credit_group([group(2, 3, 1)], [graded(1.0, None, 0.0)], GRPO(scale="none")).trees
    assert flat(own) == approx({1: ([0.5, 0.5], [0.25, 0.25]), 3: ([-0.5], [0.5])})


def test_a_group_that_is_left_with_one_score_has_no_signal_but_counts():
    credit = credit_group(
        [group(1, 1), group(1, 1, row=1)], [graded(1.0, None), graded(1.0, 0.0)], GRPO(scale="none")
    )
    assert flat(credit.trees[0]) == {}
    assert flat(credit.trees[1]) == approx({1: ([0.5], [1 / 3]), 2: ([-0.5], [1 / 3])})
    assert (credit.groups, credit.groups_with_signal) == (2, 1)


def test_all_failed():
    credit = credit_group([group(1, 2), group(1, row=1)], [graded(None, None), graded(None)], GRPO())
    assert [flat(own) for own in credit.trees] == [{}, {}]
    assert (credit.groups, credit.groups_with_signal) == (0, 0)


def test_one_group_failed_entirely():
    credit = credit_group(
        [group(1, 2), group(1, 1, row=1)], [graded(None, None), graded(1.0, 0.0)], GRPO(scale="none")
    )
    assert flat(credit.trees[0]) == {}
    assert flat(credit.trees[1]) == approx({1: ([0.5], [0.5]), 2: ([-0.5], [0.5])})
    assert (credit.groups, credit.groups_with_signal) == (1, 1)


TREES = [group(1, 2), group(2, 1, row=1)]
GRADES = [graded(0.1, 0.1), graded(1.0, 0.0)]  # the first group has no signal


def test_a_group_without_signal_is_left_out_but_counts_in_the_denominator():
    credit = credit_group(TREES, GRADES, GRPO(scale="none"))
    assert flat(credit.trees[0]) == {}
    assert flat(credit.trees[1]) == approx({1: ([0.5, 0.5], [1 / 8, 1 / 8]), 2: ([-0.5], [1 / 4])})
    assert (credit.groups, credit.groups_with_signal) == (2, 1)


@pytest.mark.parametrize("needs", [{"kl": KL(coefficient=0.1)}, {"entropy": Entropy(coefficient=-0.1)}])
def test_a_group_without_signal_stays_when_the_loss_needs_it(needs):
    credit = credit_group(TREES, GRADES, GRPO(scale="none", **needs))
    assert flat(credit.trees[0]) == approx({1: ([0.0], [1 / 4]), 2: ([0.0] * 2, [1 / 8] * 2)})
    assert flat(credit.trees[1]) == approx({1: ([0.5, 0.5], [1 / 8, 1 / 8]), 2: ([-0.5], [1 / 4])})
    assert credit.groups_with_signal == 1


def test_worked_completions():
    trees = [group(2), group(1, row=1), group(5, row=2)]
    credit = credit_worked(Evidence(trees), SFT(worked="key:worked"))
    assert [flat(own) for own in credit.trees] == [
        approx({1: ([1.0] * 2, [1 / 8] * 2)}),
        approx({1: ([1.0], [1 / 8])}),
        approx({1: ([1.0] * 5, [1 / 8] * 5)}),
    ]
    credit = credit_worked(Evidence(trees), SFT(worked="key:worked", reduction="sample_mean"))
    assert [flat(own) for own in credit.trees] == [
        approx({1: ([1.0] * 2, [1 / 6] * 2)}),
        approx({1: ([1.0], [1 / 3])}),
        approx({1: ([1.0] * 5, [1 / 15] * 5)}),
    ]


def token_batch(
    *, anchor: Sequence[float] | None = None, engine: Sequence[float] | None = None
) -> TokenBatch:
    """Three tokens whose ratios are 1, 1.5 and 0.5."""
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    ratio = torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)
    return TokenBatch(
        logprobs=(old + ratio.log()).requires_grad_(),
        entropies=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        old_logprobs=old,
        engine_logprobs=old if engine is None else torch.tensor(engine, dtype=torch.float64),
        anchor_logprobs=None if anchor is None else torch.tensor(anchor, dtype=torch.float64),
        advantages=torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64),
        nodes=torch.tensor([0, 0, 1]),
    )


CLIP = TokenClip(low=0.2, high=0.3)
# -A max(...): token 1 on policy; token 2 stopped at 1.3; token 3 fallen though good, full push back up
LOSS = [-1.0, -1.3, -1.0]
LOSS_GRADIENT = [-1.0, 0.0, -1.0]


def test_the_clipped_loss_alone():
    tokens = token_batch()
    result = loss_clipped(tokens, GRPO(clip=CLIP))
    result.per_token.sum().backward()
    assert result.per_token.tolist() == pytest.approx(LOSS)
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad.tolist() == pytest.approx(LOSS_GRADIENT)
    assert {name: fact.tolist() for name, fact in result.facts.items()} == {"clipped_share": [0.0, 1.0, 0.0]}


@pytest.mark.parametrize(
    ("estimator", "penalty", "slope"),
    [
        # d = log π - log π_anchor = log 2 for every token, r = 1/2
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 1 - 0.5),
    ],
)
def test_with_kl(estimator, penalty, slope):
    anchor = [-1 - math.log(2), -2 + math.log(1.5 / 2), -3 + math.log(0.5 / 2)]
    tokens = token_batch(anchor=anchor)
    result = loss_clipped(tokens, GRPO(clip=CLIP, kl=KL(coefficient=0.1, estimator=estimator)))
    result.per_token.sum().backward()
    assert result.per_token.tolist() == pytest.approx([loss + 0.1 * penalty for loss in LOSS])
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad.tolist() == pytest.approx([g + 0.1 * slope for g in LOSS_GRADIENT])
    off = loss_clipped(token_batch(anchor=anchor), GRPO(clip=CLIP))
    assert off.per_token.tolist() == pytest.approx(LOSS)


def test_with_an_entropy_bonus():
    result = loss_clipped(token_batch(), GRPO(clip=CLIP, entropy=Entropy(coefficient=0.5)))
    assert result.per_token.tolist() == pytest.approx([-1.05, -1.4, -1.15])


def test_the_engine_weight_multiplies_the_policy_loss_alone():
    # old - engine = log 4, log 1, -log 2: weights min(4, 2), 1, 1/2
    engine = [-1 - math.log(4), -2.0, -3 + math.log(2)]
    anchor = [-1.0, -2 + math.log(1.5), -3 + math.log(0.5)]  # equal to the policy: k3 = 0
    tokens = token_batch(engine=engine, anchor=anchor)
    settings = GRPO(
        clip=CLIP, engine_weight_cap=2.0, kl=KL(coefficient=0.1), entropy=Entropy(coefficient=0.5)
    )
    result = loss_clipped(tokens, settings)
    result.per_token.sum().backward()
    assert result.per_token.tolist() == pytest.approx([-2 - 0.05, -1.3 - 0.1, -0.5 - 0.15])
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad.tolist() == pytest.approx([-2.0, 0.0, -0.5])


def test_the_penalty_of_a_segment_is_a_sum_over_its_tokens():
    """Tokens 1 and 2 are a segment of two, the third one alone; a token's weight is 1/N_k."""
    anchor = [-1 - math.log(2), -2 + math.log(1.5 / 2), -3 + math.log(0.5 / 2)]
    with_kl = RFT(kl=PolicyKL(coefficient=0.1, estimator="k2"), gae_lambda=1.0)
    without = RFT(kl=PolicyKL(coefficient=0.0), gae_lambda=1.0)
    both = [loss_segments(token_batch(anchor=anchor), own).per_token for own in (with_kl, without)]
    penalty = 0.1 * math.log(2) ** 2 / 2
    assert (both[0] - both[1]).tolist() == pytest.approx([2 * penalty, 2 * penalty, penalty])
    reported = RFT(kl=PolicyKL(coefficient=0.1, of="rollout"), gae_lambda=1.0)
    assert loss_segments(token_batch(anchor=anchor), reported).per_token.tolist() == both[1].tolist()


def test_advantages_of_segments_are_taken_anew_unless_they_were_whitened():
    """On policy the loss is -A: Y - V of the segment's first token with the value in training, or A at sampling."""
    values = {"values": torch.tensor([1.0, 9.0, 3.0]), "value_targets": torch.tensor([5.0, 9.0, 4.0])}
    tokens = token_batch()
    tokens = replace(tokens, old_logprobs=tokens.logprobs.detach(), **values)
    anew = RFT(kl=PolicyKL(coefficient=0.0))
    assert loss_segments(tokens, anew).per_token.tolist() == pytest.approx([-4.0, -4.0, -1.0])
    whitened = anew.model_copy(update={"whiten": True})
    assert loss_segments(tokens, whitened).per_token.tolist() == pytest.approx([-1.0, -1.0, -2.0])


def test_cross_entropy():
    result = loss_cross_entropy(token_batch(), SFT(worked="key:worked"))
    assert result.per_token.tolist() == pytest.approx([1.0, 2 - math.log(1.5), 3 - math.log(0.5)])
    assert result.facts == {}


def test_the_table():
    assert set(ALGORITHMS) == set(ALGORITHM_NAMES)
    assert [name for name, row in ALGORITHMS.items() if not row.samples] == ["sft"]


def adam(
    gradient: torch.Tensor, weight: torch.Tensor, moments: list[torch.Tensor], step: int
) -> torch.Tensor:
    """One step of Adam as Kingma and Ba write it, lr 0.01."""
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
    return weight - 0.01 * first / (second.sqrt() + 1e-8)


@pytest.mark.parametrize("through_the_network", [False, True])
def test_a_group_without_signal_moves_nothing_but_the_step_is_taken(tiny_model_folder, through_the_network):
    """Two steps: with signal, then without any. Weights move in the second by momentum alone, and by the same
    amount whether its groups go through the network (with advantage 0) or are left out."""
    model = load(tiny_model_folder, torch.float64)
    forward = PolicyForward(model, Precision("exact", torch.device("cpu")))
    head = model.get_output_embeddings()
    assert head is not None
    watched: torch.nn.Parameter = head.weight  # pyright: ignore
    parameters = [{"name": POLICY, "params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    settings = GRPO(scale="none")
    moments = [torch.zeros_like(watched), torch.zeros_like(watched)]

    def step(trees: list[Tree], credits: Sequence[Credit], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = pack(trees, credits, token_budget=1000)
        model.zero_grad()
        for batch in batches:  # the gradient by plain autograd of -A log π, the same at ratio 1
            scores = forward(batch, temperature=1.0)
            (-batch.advantages * scores.logprobs * batch.weights).sum().backward()
        gradient = torch.zeros_like(watched) if watched.grad is None else watched.grad.clone()
        expected = adam(gradient, watched.detach().clone(), moments, number)
        model.zero_grad()
        optimise(
            policy_loss(forward, lambda tokens: loss_clipped(tokens, settings), temperature=1.0),
            optimizer,
            batches,
            max_gradient_norm=0.0,
            learning_rates={POLICY: 0.01},
        )
        return watched.detach().clone(), expected

    first = [group(3, 2), group(2, 4, row=1)]
    credit = credit_group(first, [graded(1.0, 0.0), graded(0.0, 1.0)], settings)
    before = watched.detach().clone()
    after, expected = step(first, credit.trees, 1)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)
    assert (after - before).abs().max() > 0.005

    second = [group(3, 3, row=2)]
    idle = graded(1.0, 1.0)
    if through_the_network:
        [own] = credit_group(second, [idle], GRPO(scale="none", kl=KL(coefficient=1.0))).trees
        assert set(own.weights) == {1, 2}
    else:
        [own] = credit_group(second, [idle], settings).trees
        assert not own.weights
    moved, expected = step(second, [own], 2)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
    assert (moved - after).abs().max() > 0.003
