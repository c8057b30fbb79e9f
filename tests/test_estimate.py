"""The arithmetic of an estimate, by hand; the measuring is tried in `cli/test_train.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graft.algorithm_settings import SFT
from graft.config_file import check_config
from graft.estimate import (
    Critiques,
    EvaluationWork,
    GrownTree,
    Memory,
    PhaseWork,
    Sampling,
    SamplingSpeeds,
    Speeds,
    ValidationWork,
    Workload,
    decode_steps,
    drawing_seconds,
    estimate,
    sampling_seconds,
    scoring_seconds,
    update_seconds,
)
from graft.estimated import Facts
from graft.phases import phases_of
from graft.trial_sampling import decode_costs
from graft.workload import (
    HeldOut,
    Tried,
    largest_microbatch,
    plan_work,
    sampling_rounds,
    share_with_signal,
)

SAMPLING = SamplingSpeeds(prefill_token=0.001, decode_step=0.1, decode_row=0.01, grade=0.002)

SPEEDS = Speeds(
    start=5.0,
    measuring=SAMPLING.scaled(2.0),
    training=SAMPLING,
    hand_over=0.5,
    train_token={"warm start": 0.02, "training": 0.01},
    score_token={"warm start": 0.004, "training": 0.003},
    anchor_token=0.005,
    optimizer={"warm start": 1.0, "training": 1.0},
    write_byte=1e-9,
)

FACTS = Facts(
    run="runs/x",
    rows_train=100,
    rows_held_out=20,
    prompt_tokens_mean=50.4,
    prompt_tokens_longest=61,
    model="tiny",
    parameters=1_000_000,
    parameters_trained=1_000_000,
    device="cpu",
    precision="bf16",
    engine="fast",
    threads=2,
)

MEMORY = Memory(
    sampling_peak=2_000,
    update_peak=5_600,
    tried_tokens=100,
    microbatch_tokens=100,
    gradients=600,
    optimizer=1_600,
    copies=800,
    held_states=0,
    cached_token=2,
    prompt_logits=10,
    sampled=300,
)


@pytest.mark.parametrize(
    ("lengths", "slots", "steps"),
    [
        ([], 4, 0),
        ([1, 1, 1], 2, 0),  # first tokens come from the prompts
        ([5, 3], 2, 4),  # side by side: the longer one
        ([5, 3, 4], 2, 5),  # the third enters after 2 steps and makes 3
        ([5, 5, 5, 5], 2, 8),
        ([9, 2, 2, 2], 2, 8),  # three short ones pass beside the long one
    ],
)
def test_decode_steps(lengths, slots, steps):
    assert decode_steps(lengths, slots=slots) == steps


def test_decode_costs_split_a_step_into_its_fixed_part_and_its_rows():
    assert decode_costs((64, 0.74), (8, 0.18)) == pytest.approx((0.1, 0.01))


@pytest.mark.parametrize(
    ("wide", "narrow", "costs"),
    [
        ((8, 0.2), (8, 0.2), (0.2, 0.0)),  # one width only
        ((64, 0.1), (8, 0.2), (0.1, 0.0)),  # noise: a row never saves time
        ((10, 1.0), (2, 0.1), (0.0, 0.1)),  # and a step is never negative
    ],
)
def test_decode_costs_stay_sane(wide, narrow, costs):
    assert decode_costs(wide, narrow) == pytest.approx(costs)


def test_sampling_seconds():
    call = Sampling(prompts=2, samples=2, prompt_tokens=50, lengths=[3, 5])  # 3, 5, 3, 5 in 2 slots
    # 100 prompt tokens; steps: 2+2 beside 4, then 4 more -> 8; rows: 2+4+2+4
    assert sampling_seconds(call, SAMPLING, slots=2) == pytest.approx(100 * 0.001 + 8 * 0.1 + 12 * 0.01)
    assert call.tokens == 16


def test_update_seconds():
    batch = Sampling(prompts=4, samples=2, prompt_tokens=50, lengths=[10])
    phase = PhaseWork(
        "training", 7, batch, drawn=True, passes=2, optimizer_steps=6, trained_share=0.5, read_share=0.25
    )
    assert phase.batch_tokens == 4 * (50 + 2 * 10 / 4)
    assert phase.update_tokens == 0.5 * 220
    assert update_seconds(phase, SPEEDS) == pytest.approx(2 * 110 * 0.01 + 6 * 1.0)


def test_scoring_seconds():
    batch = Sampling(prompts=4, samples=2, prompt_tokens=50, lengths=[10])
    phase = PhaseWork("training", 7, batch, drawn=True, scorings=1.0, anchor_scorings=0.4, trained_share=0.5)
    once = 1.0 * 0.003 + 0.4 * 0.005
    assert scoring_seconds(phase, SPEEDS) == pytest.approx(140 * once)
    assert scoring_seconds(replace(phase, scores_all=True), SPEEDS) == pytest.approx(280 * once)


def test_drawing_seconds():
    batch = Sampling(prompts=2, samples=2, prompt_tokens=50, lengths=[5])
    phase = PhaseWork("training", 7, batch, drawn=True)
    # 100 prompt tokens, 4 steps of 4 rows, 4 grades
    assert drawing_seconds(phase, SAMPLING, slots=8) == pytest.approx(0.1 + 4 * 0.1 + 16 * 0.01 + 4 * 0.002)
    rounds = replace(phase, rounds=(2, 1))  # the second: 50 prompt tokens, 4 steps of 2 rows, 2 grades
    more = 0.05 + 4 * 0.1 + 8 * 0.01 + 2 * 0.002
    assert drawing_seconds(rounds, SAMPLING, slots=8) == pytest.approx(0.1 + 0.4 + 0.16 + 0.008 + more)
    assert rounds.sampled_tokens == 3 * 10
    trees = replace(phase, grown=GrownTree(tokens=30, seconds=2.0, paths=5), critiques=Critiques(0.5, 7))
    assert drawing_seconds(trees, SAMPLING, slots=8) == pytest.approx(2 * (2.0 + 5 * 0.002))
    assert trees.sampled_tokens == 2 * (30 + 7)
    assert trees.batch_tokens == 2 * (50 + 30)


@pytest.mark.parametrize(
    ("wanted", "share", "most", "rounds", "kept"),
    [
        (8, 1.0, 4, (8,), 8),
        (8, 0.5, 4, (8, 8), 8),  # 4 of 8, then 4 / 0.5
        (8, 0.5, 1, (8,), 4),
        (8, 0.1, 3, (8, 58, 12), 8),  # 0.8; no more than 8 times what is missing: 7.2 * 8; 6.6; 1.4 * 8
        (8, 0.05, 2, (8, 61), 3),
    ],
)
def test_rounds_of_dynamic_sampling(wanted, share, most, rounds, kept):
    assert sampling_rounds(wanted, share, most) == (rounds, kept)


@pytest.mark.parametrize(
    ("seen", "with_signal", "share"), [(0, 0, 0.5), (8, 8, 0.9), (8, 0, 0.1), (2, 1, 0.5)]
)
def test_share_with_signal(seen, with_signal, share):
    assert share_with_signal(seen, with_signal) == pytest.approx(share)


def test_memory_is_the_larger_of_update_and_sampling():
    assert MEMORY.peak(300) == 5_600  # sampling: 2000 + 1600 + 800
    assert MEMORY.peak(1_900) == 6_000  # and 1600 more than was tried


def test_a_larger_microbatch_needs_more_for_its_activations():
    # 5600 - 2000 - 1600 - 800 - 600 = 600 for 100 tokens
    assert replace(MEMORY, microbatch_tokens=150).peak(300) == 5_900
    assert replace(MEMORY, microbatch_tokens=50).peak(300) == 5_600  # what was measured is needed anyway


def test_the_whole_estimate():
    batch = Sampling(prompts=4, samples=2, prompt_tokens=50, lengths=[10])
    held_out = Sampling(prompts=20, samples=1, prompt_tokens=50, lengths=[11])
    found = estimate(
        FACTS,
        Workload(
            phases=[
                PhaseWork("warm start", 3, Sampling(2, 1, 50, [10]), drawn=False),
                PhaseWork(
                    "training", 10, batch, drawn=True, trained_share=0.5, scorings=0.5, optimizer_steps=2
                ),
            ],
            evaluations=[EvaluationWork("measuring before", 1, held_out)],
            validations=[ValidationWork("warm start", 4, 500)],
            written_bytes=2_000_000_000,
            slots=8,
            max_new_tokens=16,
        ),
        SPEEDS,
        MEMORY,
        assumptions=["completions have 10 tokens"],
    )
    seconds = {item.name: item.seconds for item in found.items}
    assert seconds == pytest.approx(
        {
            "start": 5.0,
            # weights, 1000 prompt tokens, 3 rounds of 10 steps, 200 row steps, 20 grades
            "measuring before": 0.5 + 2 * (1.0 + 3.0 + 2.0) + 0.04,
            "warm start: update": 3 * (120 * 0.02 + 1.0),
            # weights, 200 prompt tokens, 9 steps, 72 row steps, 8 grades
            "training: sampling": 10 * (0.5 + 0.2 + 0.9 + 0.72 + 0.016),
            "training: scoring": 10 * 0.5 * 140 * 0.003,
            "training: update": 10 * (140 * 0.01 + 2 * 1.0),
            "warm start: validation loss": 4 * 500 * 0.004,
            "writing checkpoints": 2.0,
        }
    )
    assert found.seconds == pytest.approx(sum(seconds.values()))
    # no group trains: of the updates the optimiser's steps are left
    dropped = 10 * 0.5 * 140 * 0.003 + 10 * 140 * 0.01
    assert found.seconds_without_signal == pytest.approx(found.seconds - dropped)
    assert found.tokens_sampled_training == 10 * 80
    assert found.tokens_sampled_measuring == 220
    assert found.tokens_trained == 3 * 120 + 10 * 140
    assert found.tokens_scored == 10 * 0.5 * 140
    # the measurement holds 20 prompts of 50 tokens and their logits, and 8 slots of 16 tokens
    assert found.memory_bytes == 2_000 + 1_600 + 800 + (1_128 * 2 + 200 - 300)


def plan(tried: Tried | None = None, **settings):
    config = check_config(
        {
            "run": "x",
            "model": {"name": "m"},
            "data": {"held_out": 40},
            "training": {"steps": 10},
            **settings,
        },
        where="test",
    )
    phases = phases_of(config, training_rows=100)
    return plan_work(
        config,
        phases,
        prompt_tokens=50,
        held_out=HeldOut(40, 52, worked_tokens=900, lengths=[35]),
        tried=[
            Tried([20], read_share=0.8)
            if isinstance(phase.settings, SFT)
            else tried or Tried([30], read_share=0.9, groups=2, groups_with_signal=0, trained_share=0.25)
            for phase in phases
        ],
        checkpoint_bytes=300,
    )


def test_the_plan_of_a_plain_run():
    work = plan()
    [phase] = work.phases
    assert (phase.name, phase.steps, phase.drawn) == ("training", 10, True)
    assert (phase.scorings, phase.anchor_scorings, phase.passes, phase.optimizer_steps) == (0, 0, 1, 1)
    assert phase.batch == Sampling(prompts=8, samples=8, prompt_tokens=50, lengths=[30])
    assert phase.trained_share == 0.25
    assert phase.read_share == 0.9
    assert [(e.name, e.times) for e in work.evaluations] == [("measuring before", 1), ("measuring after", 1)]
    assert work.validations == []
    assert work.written_bytes == 300


def test_each_phase_has_completions_of_its_own():
    work = plan(
        warm_start={"worked": "key:w", "steps": 4, "rows_per_step": 6, "validate_every": 3},
        evaluation={"every": 5, "rows": 10, "samples": 2},
        checkpoints={"every": 3},
    )
    warm, training = work.phases
    assert (warm.steps, warm.drawn, warm.trained_share, warm.read_share) == (4, False, 1.0, 0.8)
    assert warm.batch == Sampling(prompts=6, samples=1, prompt_tokens=50, lengths=[20])
    assert (training.batch.lengths, training.read_share, training.trained_share) == ([30], 0.9, 0.25)
    assert [(e.name, e.times, e.call.prompts, e.call.samples, e.call.lengths) for e in work.evaluations] == [
        ("measuring before", 1, 40, 2, [35]),
        ("measuring after warm start", 1, 40, 2, [30]),
        ("measuring during training", 1, 10, 2, [30]),  # step 5; step 10 is the last
        ("measuring after", 1, 40, 2, [30]),
    ]
    assert work.validations == [ValidationWork("warm start", 3, 900)]  # before, after step 3, after
    assert work.written_bytes == 300 * ((1 + 1) + (1 + 3))  # at steps 3 of 4; 3, 6, 9 of 10; at both ends


def test_supervised_training_is_validated_at_every_evaluation():
    work = plan(algorithm={"name": "sft", "worked": "key:w"}, evaluation={"every": 4})
    assert work.validations == [ValidationWork("training", 4, 900)]  # before, steps 4 and 8, after
    assert work.phases[0].sampled_tokens == 0


def test_a_budget_of_tokens_becomes_steps():
    work = plan(
        training={"generated_tokens": 4000, "prompts_per_step": 4},
        algorithm={"group_size": 5},
        evaluation={"every_generated_tokens": 1000},
    )
    [phase] = work.phases
    assert phase.steps == 7  # 4 x 5 x 30 = 600 tokens a step
    during = [e.times for e in work.evaluations if e.name == "measuring during training"]
    assert during == [4]  # 4,200 tokens in all, passing 1,000, 2,000, 3,000 and 4,000


def test_what_is_discarded_and_the_critics_tokens_count_in_a_budget():
    dynamic = plan(
        training={"generated_tokens": 4800, "prompts_per_step": 4},
        algorithm={"name": "dapo", "group_size": 2},
    ).phases[0]
    assert dynamic.rounds == (4, 12)  # 1 of 4 has signal: 3 / 0.25
    assert (dynamic.batch.prompts, dynamic.trained_share, dynamic.steps) == (4, 1.0, 5)  # 16 x 2 x 30
    tried = Tried([30], critiques=Critiques(tokens=15))
    criticised = plan(
        tried,
        training={"generated_tokens": 450, "prompts_per_step": 4},
        algorithm={"name": "rft", "group_size": 1},
    ).phases[0]
    assert criticised.steps == 3  # 4 x (30 + 15)


KL = {"coefficient": 0.1}


@pytest.mark.parametrize(
    ("settings", "policy", "anchor", "everything"),
    [
        ({"algorithm": {"kl": KL}}, 0.0, 1.0, False),  # the anchor, each step
        ({"algorithm": {"kl": {**KL, "anchor": "rollout"}}}, 1.0, 0.0, False),  # the policy is its own
        ({"algorithm": {"updates_per_batch": 2}}, 1.0, 0.0, False),  # the old policy, each step
        ({"algorithm": {"refresh_every": 4}}, 0.75, 0.0, False),  # where its weights are older
        # both, at 2 of 10 steps, and there of all groups, of which a quarter trains
        ({"report": {"kl_every": 5}}, 0.2 * 4, 0.2 * 4, False),
        ({"algorithm": {"kl": KL, "updates_per_batch": 2}, "report": {"kl_every": 5}}, 1.0, 1.0, False),
        ({"algorithm": {"kl": {**KL, "place": "reward"}}}, 1.0, 1.0, True),
        ({"algorithm": {"name": "ppo"}}, 1.0, 0.0, True),  # its values
        ({"algorithm": {"name": "ppo", "kl": KL}}, 1.0, 1.0, True),
        ({"algorithm": {"name": "rft"}}, 1.0, 1.0, True),
        ({"algorithm": {"name": "rft", "kl": {"anchor": "rollout"}}}, 1.0, 0.0, True),
        ({"algorithm": {"name": "sft", "worked": "key:w"}}, 0.0, 0.0, False),
    ],
)
def test_scorings(settings, policy, anchor, everything):
    work = plan(**settings).phases[-1]
    assert (work.scorings, work.anchor_scorings) == pytest.approx((policy, anchor))
    assert work.scores_all == everything


def test_passes_and_steps_of_the_optimiser():
    work = plan(algorithm={"name": "ppo", "updates_per_batch": 3, "minibatches": 2}).phases[0]
    assert (work.passes, work.optimizer_steps) == (3, 6)  # a minibatch is a part of a pass


@pytest.mark.parametrize(("budget", "tokens"), [(400, 400), (5_000, 532)])
def test_largest_microbatch(budget, tokens):
    assert largest_microbatch(plan(), budget) == tokens  # a step: a quarter of 8 x 50 + 0.9 x 64 x 30


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.25),  # none of two
        ({"algorithm": {"kl": KL}}, 1.0),  # the penalty needs every group
        ({"algorithm": {"entropy": {"coefficient": 0.1}}}, 1.0),
        ({"algorithm": {"kl": {**KL, "place": "reward"}}}, 1.0),  # no two rewards are equal
        ({"algorithm": {"name": "reinforce"}}, 1.0),  # nobody is compared within a group
        ({"algorithm": {"name": "ppo"}}, 1.0),
    ],
)
def test_share_of_groups_that_train(settings, share):
    assert plan(**settings).phases[-1].trained_share == share
