"""What moves when: minibatches by hand, the value model's warm-up, its update after the policy's, its own trunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.algorithms import ALGORITHMS
from graft.assemble import Parts, assemble
from graft.config_file import check_config
from graft.crediting import Evidence, StepCredit, scored_samples, shaped_rewards
from graft.errors import CheckpointError
from graft.objective.kl import exact_kl
from graft.phases import phases_of
from graft.state.checkpoint import Checkpoint, Checkpoints, optimizer_tensors
from graft.step_records import mean_kl
from graft.trainer import Trainer, everything, minibatches, penalised
from graft.types import Appraisal, Credit, Grade
from graft.update.step import StepResult
from tests.tasks import task_settings, write_task
from tests.trees import random_group


def weights_of(credits: Sequence[Credit]) -> list[dict[int, list[float]]]:
    return [{node: own.tolist() for node, own in credit.weights.items()} for credit in credits]


def test_minibatches_by_hand():
    # sample mean over 4 + 2 + 2 samples; the trees are dealt out in turn: 6 samples in one step, 2 in the other
    one = {1: np.array([1 / 8])}
    credit = StepCredit([Credit(one, one), Credit(one, one, one, one), Credit(one, one)], 3, 3, [4, 2, 2])
    assert minibatches(credit, 1) == [list(credit.trees)]
    first, second = minibatches(credit, 2)
    assert weights_of(first) == [{1: [pytest.approx(1 / 6)]}, {}, {1: [pytest.approx(1 / 6)]}]
    assert weights_of(second) == [{}, {1: [pytest.approx(1 / 2)]}, {}]
    assert second[1].value_weights[1].tolist() == pytest.approx([1 / 2])
    empty = minibatches(StepCredit([Credit({}, {}), Credit(one, one)], 2, 1, [0, 4]), 2)
    assert [weights_of(part) for part in empty] == [[{}, {}], [{}, {1: [1 / 8]}]]


@pytest.fixture
def open_trainer(tiny_model_folder, tmp_path):
    def made(algorithm: dict[str, Any], **sections: Any) -> tuple[Trainer, Parts]:
        write_task(tmp_path, tiny_model_folder)
        sections = {"algorithm": algorithm, "model": {"precision": "exact"}, **sections}
        settings = task_settings(tmp_path, tiny_model_folder, **sections)
        config = check_config(settings, where="test")
        parts = assemble(config)
        [phase] = phases_of(config, training_rows=1)
        checkpoints = Checkpoints(Path(config.run) / "checkpoints", keep_last=1, keep_best=0)
        return Trainer(parts, phase, checkpoints, done=0, restored=None), parts

    return made


def one_step(trainer: Trainer, number: int = 1) -> StepResult:
    rng = np.random.default_rng(0)
    trees = [random_group(rng, row=i) for i in range(3)]
    whole = [everything(tree) for tree in trees]
    appraisals = trainer.appraise(trees, whole, old=True, anchor=penalised(trainer.phase))
    grades = [{leaf: Grade(float(rng.integers(0, 3))) for leaf in tree.leaves()} for tree in trees]
    settings = trainer.phase.settings
    credit = ALGORITHMS[settings.name].credit(
        Evidence(trees, grades, appraisals=appraisals, longest=16), settings
    )
    return trainer.update(
        number, trainer.learning_rates(number, 0), trees, credit, appraisals, progress=None, where="here"
    )


def moved(trainer: Trainer, number: int = 1) -> tuple[set[str], StepResult]:
    """Which of the policy, the value head and the value trunk a step moves."""
    before = {name: p.detach().clone() for name, p in trainer.parameters().items()}
    result = one_step(trainer, number)
    changed = {name for name, p in trainer.parameters().items() if not torch.equal(p, before[name])}
    kinds = {("value.head", "head"), ("value.trunk", "trunk")}
    return {next((k for start, k in kinds if name.startswith(start)), "policy") for name in changed}, result


def test_joint_on_a_shared_trunk(open_trainer):
    trainer, _ = open_trainer({"name": "ppo"})
    who, result = moved(trainer)
    assert who == {"policy", "head"}
    assert result.facts["ratio_max"] == 1.0
    assert result.facts["value_loss"] > 0


def test_the_head_starts_at_zero(open_trainer):
    trainer, _ = open_trainer({"name": "ppo", "value": {"trunk": "separate"}})
    tree = random_group(np.random.default_rng(0))
    [appraisal] = trainer.appraise([tree], [everything(tree)], old=True)
    assert set(appraisal.old_values) == {1, 2, 3, 4}
    assert not any(values.any() for values in appraisal.old_values.values())
    assert appraisal.anchor_logprobs == {}


@pytest.mark.parametrize(("trunk", "own"), [("shared", {"head"}), ("separate", {"head"})])
def test_warm_up_moves_the_value_model_alone(open_trainer, trunk, own):
    value = {"trunk": trunk, "warmup_steps": 2, "coefficient": 1.0}
    trainer, _ = open_trainer({"name": "ppo", "value": value})
    assert moved(trainer, 1)[0] == own  # the head is zero at first: no gradient reaches a trunk
    assert moved(trainer, 2)[0] == (own if trunk == "shared" else {"head", "trunk"})
    assert "policy" in moved(trainer, 3)[0]


def test_after_policy(open_trainer):
    value = {"trunk": "separate", "update": "after_policy"}
    trainer, _ = open_trainer({"name": "ppo", "value": value, "updates_per_batch": 2})
    one_step(trainer)
    who, result = moved(trainer, 2)
    assert who == {"policy", "head", "trunk"}
    assert result.facts["value_loss"] > 0
    assert result.facts["ratio_max"] > 1.0


def test_the_value_model_learns_its_targets(open_trainer):
    value = {"learning_rate": 0.1, "warmup_steps": 50, "clip": 0.0, "coefficient": 1.0}
    trainer, _ = open_trainer({"name": "ppo", "value": value, "gae_lambda": 1.0, "updates_per_batch": 20})
    losses = [one_step(trainer, number).facts["value_loss"] for number in range(1, 5)]
    assert losses[-1] < losses[0] / 2


def test_the_old_values_belong_to_the_states_before_the_tokens(open_trainer):
    """A head that reads one number of the hidden state, against transformers' own forward pass."""
    trainer, parts = open_trainer({"name": "ppo"})
    assert trainer.value is not None
    torch.nn.init.normal_(trainer.value.head.weight, generator=torch.Generator().manual_seed(0))
    tree = random_group(np.random.default_rng(0))
    [appraisal] = trainer.appraise([tree], [everything(tree)], old=True)
    model = parts.policy.plain
    model.set_attn_implementation("sdpa")
    for leaf in tree.leaves():
        path = torch.tensor([t for i in tree.path(leaf) for t in tree.nodes[i].tokens.tolist()])
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=path[None]).last_hidden_state[0]
            values = hidden @ trainer.value.head.weight[0]
        own = len(tree.nodes[leaf])
        np.testing.assert_allclose(
            appraisal.old_values[leaf], values[-own - 1 : -1].numpy(), rtol=1e-4, atol=1e-5
        )


def test_the_policy_that_sampled_as_anchor(open_trainer):
    trainer, _ = open_trainer({"name": "rft", "kl": {"anchor": "rollout"}})
    assert trainer.anchor is None
    tree = random_group(np.random.default_rng(0))
    [own] = trainer.appraise([tree], [everything(tree)], anchor=True)
    assert set(own.anchor_logprobs) == {1, 2, 3, 4}
    for node, anchor in own.anchor_logprobs.items():
        np.testing.assert_array_equal(anchor, own.old_logprobs[node])


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "sft"])
def test_a_penalty_to_the_policy_that_sampled_begins_with_the_first_move(open_trainer, name):
    """Advantages are 0, so that loss and gradient are the penalty's: none as long as the weights are those that
    sampled; then β times the mean of k3, which a row whose loss is a sum over segments takes N_k-fold."""
    kl = {"coefficient": 10.0, "place": "loss", "estimator": "k3", "anchor": "rollout"}
    with_values = {"value": {"coefficient": 0.0}} if name in ("ppo", "rft") else {}
    whole_returns = {"gae_lambda": 1.0} if name == "rft" else {}
    groups = {"group_size": None} if name == "spo_tree" else {}  # which has its branching
    trainer, parts = open_trainer({"name": name, "kl": kl, **with_values, **whole_returns, **groups})
    assert trainer.anchor is None
    tree = random_group(np.random.default_rng(0))
    ones = everything(tree)
    [own] = trainer.appraise([tree], [ones], old=True, anchor=True)
    nothing = {node: 0 * each for node, each in ones.advantages.items()}
    tokens = sum(map(len, nothing.values()))
    weights = {node: each / tokens for node, each in ones.weights.items()}
    no_values = {node: 0 * each for node, each in weights.items()}
    credit = StepCredit([Credit(nothing, weights, nothing, no_values)], 1, 1, [1.0])
    still = dict.fromkeys(trainer.learning_rates(1, 0), 0.0)

    def update() -> StepResult:
        return trainer.update(1, still, [tree], credit, [own], progress=None, where="")

    first = update()
    assert (first.loss, first.gradient_norm) == (0.0, 0.0)
    with torch.no_grad():
        for parameter in parts.policy.plain.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    [moved] = trainer.appraise([tree], [ones], old=True)
    by_hand = 0.0
    for node, old in own.old_logprobs.items():
        ratio = old.astype(np.float64) - moved.old_logprobs[node]
        by_hand += (len(old) if name == "rft" else 1) * (np.exp(ratio) - 1 - ratio).sum() / tokens
    second = update()
    assert second.loss == pytest.approx(10 * by_hand, rel=1e-3)
    assert second.loss > 0.01
    assert second.gradient_norm > 0.01


@pytest.mark.parametrize("updates", [1, 2])
def test_the_weight_of_a_penalty_to_the_policy_that_sampled(open_trainer, updates):
    """It moves nothing in the first update of a batch, to the bit, and something in the second."""
    after = []
    for coefficient in (0.1, 10.0):
        kl = {"coefficient": coefficient, "anchor": "rollout"}
        trainer, _ = open_trainer({"name": "grpo", "updates_per_batch": updates, "kl": kl})
        one_step(trainer)
        after.append([parameter.detach().clone() for parameter in trainer.parameters().values()])
    same = [torch.equal(one, other) for one, other in zip(*after, strict=True)]
    assert all(same) == (updates == 1)


def exact(**changes: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.1, "estimator": "exact", **changes}}


def test_the_exact_kl_in_the_loss(open_trainer):
    """The anchor's states are held, and the penalty is 0 until the policy moves."""
    trainer, _ = open_trainer({"name": "grpo", "updates_per_batch": 2, **exact()})
    tree = random_group(np.random.default_rng(0))
    [own] = trainer.appraise([tree], [everything(tree)], anchor=True)
    assert {n: s.shape for n, s in own.anchor_states.items()} == {
        n: (len(tree.nodes[n]), 32) for n in range(1, 5)
    }
    assert own.kl == {}
    ones = everything(tree)
    idle = StepCredit([Credit({n: 0 * a for n, a in ones.advantages.items()}, ones.weights)], 1, 1, [4])
    first = trainer.update(1, {"policy": 1e-2}, [tree], idle, [own], progress=None, where="")
    assert first.loss == pytest.approx(0, abs=1e-5)
    one_step_away = trainer.appraise([tree], [everything(tree)], old=True, anchor=True)
    assert all((kl >= -1e-6).all() for kl in one_step_away[0].kl.values())
    assert first.gradient_norm < 1e-3


def test_the_exact_kl_to_a_policy_that_has_moved(open_trainer):
    """With the policy's weights moved by hand: against both models' whole distributions."""
    trainer, parts = open_trainer({"name": "grpo", **exact(place="reward")}, sampling={"temperature": 0.7})
    assert any("exact" in note for note in parts.notes)
    assert trainer.anchor is not None
    with torch.no_grad():
        for parameter in parts.policy.plain.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tree = random_group(np.random.default_rng(0))
    [own] = trainer.appraise([tree], [everything(tree)], old=True, anchor=True)
    assert own.anchor_states == {}  # the reward needs numbers alone
    models = [parts.policy.plain, trainer.anchor.model]
    for leaf in tree.leaves():
        path = torch.tensor([t for i in tree.path(leaf) for t in tree.nodes[i].tokens.tolist()])
        log_p = []
        for model in models:
            model.set_attn_implementation("sdpa")
            with torch.no_grad():
                logits = model(input_ids=path[None]).logits[0].double() / 0.7
            log_p.append(logits[-len(tree.nodes[leaf]) - 1 : -1].log_softmax(-1))
        slow = exact_kl(*log_p)
        assert slow.min() > 1e-3
        np.testing.assert_allclose(own.kl[leaf], slow.numpy(), rtol=1e-3, atol=1e-5)
        for each in (own.old_logprobs[leaf], own.anchor_logprobs[leaf]):
            assert each.shape == slow.shape
    evidence = Evidence([tree], [{leaf: Grade(1.0) for leaf in tree.leaves()}], appraisals=[own], longest=16)
    samples = scored_samples(evidence)
    rewards = shaped_rewards(evidence, samples, trainer.phase.settings)
    by_hand = [1 - 0.1 * own.kl[sample.leaf].sum() for sample in samples]
    assert rewards.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert mean_kl([own]) == pytest.approx(np.concatenate(list(own.kl.values())).mean(), rel=1e-6)


def test_the_exact_kl_to_the_policy_that_sampled(open_trainer):
    """Its head is that of before the update, also where the update moves it."""
    trainer, parts = open_trainer(
        {"name": "rft", "updates_per_batch": 3, **exact(anchor="rollout", coefficient=10.0)}
    )
    tree = random_group(np.random.default_rng(0))
    [own] = trainer.appraise([tree], [everything(tree)], old=True, anchor=True)
    assert not any(kl.any() for kl in own.kl.values())
    before = parts.forward.head_weight.detach().clone()
    ones = everything(tree)
    credit = Credit(ones.advantages, ones.weights, ones.advantages, ones.weights)
    results = [
        trainer.update(
            number,
            {"policy": 1e-2, "value": 0.0},
            [tree],
            StepCredit([credit], 1, 1, [4]),
            [own],
            progress=None,
            where="",
        )
        for number in (1, 2)
    ]
    assert not torch.equal(parts.forward.head_weight, before)
    assert trainer._rollout_head is not None
    torch.testing.assert_close(trainer._rollout_head, before, rtol=0, atol=0)
    assert all(np.isfinite(result.loss) for result in results)


def test_appraisals_of_a_policy_that_stands_still_are_its_own(open_trainer):
    trainer, _ = open_trainer({"name": "grpo", "kl": {"coefficient": 0.1}})
    tree = random_group(np.random.default_rng(0))
    [own] = trainer.appraise([tree], [everything(tree)], old=True, anchor=True)
    assert own.old_values == {}
    assert set(own.old_logprobs) == {1, 2, 3, 4}
    for node, old in own.old_logprobs.items():
        np.testing.assert_array_equal(old, own.anchor_logprobs[node])


def test_the_older_policy_and_its_values_come_back_to_the_bit(open_trainer):
    trainer, _ = open_trainer({"name": "ppo", "refresh_every": 3})
    tree = random_group(np.random.default_rng(0))

    def appraised(number: int) -> Appraisal:
        with trainer.as_sampled(number):
            return trainer.appraise([tree], [everything(tree)], old=True)[0]

    def equal(one: Appraisal, other: Appraisal) -> bool:
        return all(
            np.array_equal(one.old_logprobs[node], other.old_logprobs[node])
            and np.array_equal(one.old_values[node], other.old_values[node])
            for node in one.old_logprobs
        )

    first, seen = appraised(1), []
    for number in (1, 2, 3):
        assert equal(appraised(number), first)
        one_step(trainer, number)
        seen.append(appraised(1))  # the policy in training
    assert not any(equal(own, first) for own in seen)
    assert equal(appraised(4), seen[2])
    one_step(trainer, 4)
    assert equal(appraised(5), seen[2])
    assert [trainer.age(number) for number in range(1, 8)] == [0, 1, 2, 0, 1, 2, 0]


def test_an_error_while_the_older_policy_stands_in_leaves_the_newer_one(open_trainer):
    trainer, _ = open_trainer({"name": "ppo", "refresh_every": 2})
    one_step(trainer)
    before = {name: p.detach().clone() for name, p in trainer.parameters().items()}

    def interrupt(tokens: int) -> None:
        raise InterruptedError

    tree = random_group(np.random.default_rng(0))
    with pytest.raises(InterruptedError), trainer.as_sampled(2):
        trainer.appraise([tree], [everything(tree)], old=True, progress=interrupt)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters().items())


def test_a_checkpoint_without_the_weights_that_sample_is_refused(open_trainer):
    trainer, parts = open_trainer({"name": "grpo", "refresh_every": 2})
    own = {name: p.detach() for name, p in trainer.parameters().items()}
    restored = Checkpoint(1, own, optimizer_tensors(trainer.optimizer, own), {}, {}, {})
    with pytest.raises(CheckpointError, match=r"lacks the weights that sample .*refresh_every changed\?"):
        Trainer(
            parts, trainer.phase, Checkpoints(Path(), keep_last=1, keep_best=0), done=1, restored=restored
        )
    Trainer(parts, trainer.phase, Checkpoints(Path(), keep_last=1, keep_best=0), done=2, restored=restored)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_old_logprobs_come_from_the_same_packing(open_trainer, name):
    """While nothing moves, every ratio is 1 to the bit, in every minibatch."""
    trainer, _ = open_trainer(
        {"name": name, "updates_per_batch": 2, "minibatches": 3, "group_size": 4},
        training={"steps": 4, "prompts_per_step": 3, "microbatch_tokens": 40},
        optimizer={"learning_rate": 1e-30},
    )
    for rate in ("policy", "value"):
        assert trainer.learning_rates(1, 0).get(rate, 0.0) < 1e-3
    rng = np.random.default_rng(0)
    trees = [random_group(rng, row=i) for i in range(7)]
    grades = [{leaf: Grade(float(leaf)) for leaf in tree.leaves()} for tree in trees]
    appraisals = trainer.appraise(trees, [everything(tree) for tree in trees], old=True)
    settings = trainer.phase.settings
    credit = ALGORITHMS[name].credit(Evidence(trees, grades, appraisals=appraisals, longest=16), settings)
    still = dict.fromkeys(trainer.learning_rates(1, 0), 0.0)
    result = trainer.update(1, still, trees, credit, appraisals, progress=None, where="")
    assert result.facts["ratio_max"] == 1.0
    assert result.facts["clipped_share"] == 0.0
