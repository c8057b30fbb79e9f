"""The arithmetic of an estimate, by hand; the measuring is tried in `cli/test_train.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graft.config_file import check_config
from graft.estimate import (
    EvaluationWork,
    Facts,
    Memory,
    PhaseWork,
    Sampling,
    Speeds,
    Workload,
    decode_costs,
    decode_steps,
    estimate,
    sampling_seconds,
    share_with_signal,
    update_seconds,
)
from graft.phases import phases_of
from graft.workload import largest_microbatch, plan_work, trained_share

SPEEDS = Speeds(
    start=5.0,
    prefill_token=0.001,
    decode_step=0.1,
    decode_row=0.01,
    hand_over=0.5,
    grade=0.002,
    train_token={"warm start": 0.02, "training": 0.01},
    score_token=0.003,
    optimizer=1.0,
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
    assert sampling_seconds(call, SPEEDS, slots=2) == pytest.approx(100 * 0.001 + 8 * 0.1 + 12 * 0.01)
    assert call.tokens == 16


def test_update_seconds():
    batch = Sampling(prompts=4, samples=2, prompt_tokens=50, lengths=[10])
    phase = PhaseWork("training", 7, batch, drawn=True, updates=2, scorings=1.5, trained_share=0.5)
    assert phase.update_tokens == 0.5 * (200 + 80)
    assert update_seconds(phase, SPEEDS) == pytest.approx(2 * (140 * 0.01 + 1.0) + 1.5 * 140 * 0.003)


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
                PhaseWork("training", 10, batch, drawn=True, trained_share=0.5),
            ],
            evaluations=[EvaluationWork("measuring before", 1, held_out)],
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
            "measuring before": 0.5 + 1.0 + 3.0 + 2.0 + 0.04,
            "warm start: update": 3 * (120 * 0.02 + 1.0),
            # weights, 200 prompt tokens, 9 steps, 72 row steps, 8 grades
            "training: sampling": 10 * (0.5 + 0.2 + 0.9 + 0.72 + 0.016),
            "training: update": 10 * (140 * 0.01 + 1.0),
            "writing checkpoints": 2.0,
        }
    )
    assert found.seconds == pytest.approx(sum(seconds.values()))
    assert found.tokens_sampled_training == 10 * 80
    assert found.tokens_sampled_measuring == 220
    assert found.tokens_trained == 3 * 120 + 10 * 140
    # the measurement holds 20 prompts of 50 tokens and their logits, and 8 slots of 16 tokens
    assert found.memory_bytes == 2_000 + 1_600 + 800 + (1_128 * 2 + 200 - 300)

    said = found.to_json()
    assert said["rows_train"] == 100
    assert said["steps"] == {"warm start": 3, "training": 10}
    assert said["peak_memory_gb"] == found.memory_bytes / 1e9
    text = found.to_text()
    assert "100 to train on, 20 held out; they share no question" in text
    assert "50 tokens on average, 61 the longest" in text
    assert "Assumed:\n- completions have 10 tokens" in text


def plan(**settings):
    config = check_config(
        {"run": "x", "model": {"name": "m"}, "data": {}, "training": {"steps": 10}, **settings}, where="test"
    )
    phases = phases_of(config, training_rows=100)
    return phases, plan_work(
        config,
        phases,
        trained_share=0.25,
        prompt_tokens=50,
        held_out=40,
        held_out_prompt_tokens=52,
        sampled=[30],
        worked=[20],
        trained_bytes=100,
    )


def test_the_plan_of_a_plain_run():
    _, work = plan()
    [phase] = work.phases
    assert (phase.name, phase.steps, phase.drawn, phase.scorings) == ("training", 10, True, 0.0)
    assert phase.batch == Sampling(prompts=8, samples=8, prompt_tokens=50, lengths=[30])
    assert phase.trained_share == 0.25
    assert [(e.name, e.times) for e in work.evaluations] == [("measuring before", 1), ("measuring after", 1)]
    assert work.written_bytes == 300


def test_a_warm_start_changes_the_lengths_that_follow():
    _, work = plan(
        warm_start={"worked": "key:w", "steps": 4, "rows_per_step": 6},
        evaluation={"every": 5, "rows": 10, "samples": 2},
        checkpoints={"every": 3},
    )
    warm, training = work.phases
    assert (warm.steps, warm.drawn, warm.trained_share) == (4, False, 1.0)
    assert warm.batch == Sampling(prompts=6, samples=1, prompt_tokens=50, lengths=[20])
    assert training.batch.lengths == [20]
    assert [(e.name, e.times, e.call.prompts, e.call.samples, e.call.lengths) for e in work.evaluations] == [
        ("measuring before", 1, 40, 2, [30]),
        ("measuring after warm start", 1, 40, 2, [20]),
        ("measuring during training", 1, 10, 2, [20]),  # step 5; step 10 is the last
        ("measuring after", 1, 40, 2, [20]),
    ]
    assert work.written_bytes == 300 * ((1 + 1) + (1 + 3))  # at steps 3 of 4; 3, 6, 9 of 10; at both ends


def test_a_budget_of_tokens_becomes_steps():
    _, work = plan(
        training={"generated_tokens": 4000, "prompts_per_step": 4},
        algorithm={"group_size": 5},
        evaluation={"every_generated_tokens": 1000},
    )
    [phase] = work.phases
    assert phase.steps == 7  # 4 x 5 x 30 = 600 tokens a step
    during = [e.times for e in work.evaluations if e.name == "measuring during training"]
    assert during == [4]  # 4,200 tokens in all, passing 1,000, 2,000, 3,000 and 4,000


@pytest.mark.parametrize(
    ("own", "samples"),
    [
        ({"group_size": 6}, 6),
        ({"shape": "tree", "branching": [3, 2, 2]}, 12),
    ],  # leaves, at most whole completions
)
def test_the_tokens_of_trees(own, samples):
    _, work = plan(algorithm={"name": "grft", **own})
    assert work.phases[-1].batch.samples == samples


@pytest.mark.parametrize(
    ("settings", "scorings"),
    [
        ({"algorithm": {"kl": {"coefficient": 0.1}}}, 1.0),  # the anchor, each step
        ({"algorithm": {"updates_per_batch": 2}}, 1.0),  # the old policy, each step
        ({"algorithm": {"refresh_every": 4}}, 0.75),  # where its weights are older
        ({"algorithm": {"name": "ppo"}}, 1.0),  # values are asked for with it
        ({"report": {"kl_every": 5}}, 0.4),  # both, at 2 of 10 steps
        ({"algorithm": {"kl": {"coefficient": 0.1}, "updates_per_batch": 2}, "report": {"kl_every": 5}}, 2.0),
    ],
)
def test_scorings(settings, scorings):
    _, work = plan(**settings)
    assert work.phases[-1].scorings == pytest.approx(scorings)


@pytest.mark.parametrize(("budget", "tokens"), [(400, 400), (5_000, 580)])
def test_largest_microbatch(budget, tokens):
    _, work = plan()
    assert largest_microbatch(work, budget) == tokens  # a step: a quarter of 8 x 50 + 64 x 30


def test_share_of_groups_that_train():
    plain, _ = plan()
    assert trained_share(plain, groups=8, with_signal=8) == pytest.approx(0.9)
    warm, _ = plan(warm_start={"worked": "key:w", "steps": 4})
    assert trained_share(warm, groups=8, with_signal=8) == 0.5  # what was sampled was another model
    penalised, _ = plan(algorithm={"kl": {"coefficient": 0.1}})
    assert trained_share(penalised, groups=8, with_signal=0) == 1.0
