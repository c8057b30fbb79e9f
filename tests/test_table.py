"""Every row of the table of algorithms: no packing and no micro-batching changes its loss or gradient.

A new row cannot escape: the test runs over `ALGORITHMS`, and fails where a row has no case here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from graft.algorithm_settings import SFT, Sampled
from graft.algorithms import ALGORITHMS
from graft.config import RunConfig
from graft.config_file import check_config
from graft.crediting import Evidence
from graft.tree import Kind, Tree
from graft.types import Appraisal, Credit, Critique, Grade, StopReason
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision
from graft.update.step import POLICY, VALUE, StepResult, ValueTerm, optimise, policy_loss
from graft.update.value import ValueModel
from tests.trees import random_deep_tree, random_group
from tests.update.test_exactness import load, relative

IN_LOSS = {"kl": {"coefficient": 0.1, "estimator": "k3"}, "entropy": {"coefficient": 0.01}}
CAPPED = {"engine_weight_cap": 2.0, "overlong": {"buffer_share": 0.5}}

CAPPED_ONLY = {"engine_weight_cap": 2.0}
EXACT = {"kl": {"coefficient": 0.1, "estimator": "exact"}}
CLIPPED = {"clip": {"low": 0.05, "high": 0.05, "dual": 3.0}, "value": {"clip": 0.1}}

EXACTLY = Precision("exact", torch.device("cpu"))

CASES: dict[str, list[dict[str, Any]]] = {
    "reinforce": [{}, IN_LOSS | CAPPED],
    "rloo": [{}, IN_LOSS | {"clip": {"dual": 1.5}}],
    "grpo": [{}, IN_LOSS | CAPPED | {"scale": "batch_std"}, EXACT],
    "dr_grpo": [{}, IN_LOSS],
    "dapo": [{}, IN_LOSS | CAPPED],
    "gspo": [{}, IN_LOSS | CAPPED],
    "cispo": [{"weight_cap": 1.05}, IN_LOSS],
    "ppo": [
        {},
        CAPPED | {"kl": {"coefficient": 0.2}, "whiten": False, "value": {"coefficient": 0.5}},
        {"kl": {"coefficient": 0.2, "estimator": "exact"}},
        {"kl": {"coefficient": 0.2, "estimator": "exact", "place": "loss"}},
        {"value": {"trunk": "separate", "coefficient": 0.5}, "clip": {"low": 0.05, "high": 0.05}},
    ],
    "rft": [
        {},
        CLIPPED
        | {"ratio": "segment_mean", "gae_lambda": 0.9, "rewards": {"overall": "shared", "whiten": "full"}},
        {
            "ratio": "token",
            "kl": {"coefficient": 0.1},
            "entropy": {"coefficient": 0.01},
            "engine_weight_cap": 2.0,
        },
        EXACT,
    ],
    "process_grpo": [{}, IN_LOSS | CAPPED_ONLY | {"reduction": "token_mean", "scale": "none"}],
    "grft": [
        {},
        {"shape": "tree", "score": "outcome", "ratio": "segment_mean", "clip": {"low": 0.05, "high": 0.05}},
        IN_LOSS | {"shape": "tree", "score": "mixed", "ratio": "segment", "scale": "batch_std"},
        EXACT | {"shape": "tree", "score": "mixed"},
    ],
    "vineppo": [{}, IN_LOSS | CAPPED_ONLY | {"whiten": False, "clip": {"dual": 1.5}}],
    "spo_chain": [{}, IN_LOSS | {"train_below": 0.6, "whiten": False}],
    "spo_tree": [{"train_below": 0.6}, IN_LOSS | {"scale": "group_std", "whiten": False}],
    "sft": [{"worked": "key:worked"}, {"worked": "key:worked", "reduction": "sample_mean"}],
}


def settings_of(name: str, changes: dict[str, Any]) -> Any:
    config: RunConfig = check_config(
        {
            "run": "x",
            "model": {"name": "x"},
            "data": {"source": "x"},
            "training": {"steps": 1},
            "algorithm": {"name": name, **changes},
        },
        where="test",
    )
    return config.algorithm


def evidence_of(trees: Sequence[Tree], rng: np.random.Generator) -> Evidence:
    """Scores, log-probabilities and values made up; random weights give log-probabilities of about -5.7."""

    def noise(tree: Tree, centre: float, spread: float) -> dict[int, np.ndarray]:
        return {
            n: (centre + spread * rng.normal(size=len(tree.nodes[n]))).astype(np.float32)
            for n in range(1, len(tree))
        }

    def critique(tree: Tree, leaf: int) -> Critique:
        thoughts = len(tree.path(leaf)) - 2
        scores = rng.integers(0, 11, size=(2, thoughts)).astype(float).tolist()
        return Critique(float(rng.integers(0, 11)), tuple(scores[0]), tuple(scores[1]), initial_progress=4.0)

    return Evidence(
        trees,
        [{leaf: Grade(float(rng.integers(0, 3))) for leaf in tree.leaves()} for tree in trees],
        [{leaf: critique(tree, leaf) for leaf in tree.leaves()} for tree in trees],
        appraisals=[
            Appraisal(
                noise(t, -5.7, 0.2),
                noise(t, -5.7, 0.3),
                kl=noise(t, 0.5, 0.1),
                anchor_states=states_of(t),
                old_values=noise(t, 0.0, 0.5),
            )
            for t in trees
        ],
        longest=12,
    )


def states_of(tree: Tree) -> dict[int, np.ndarray]:
    """As of another model: a vector made up from all tokens that stand before each."""

    def vector(before: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([len(before), *before]).normal(size=32)

    states = {}
    for node in range(1, len(tree)):
        path = [t for i in tree.path(node) for t in tree.nodes[i].tokens.tolist()]
        first = len(path) - len(tree.nodes[node])
        states[node] = np.array([vector(path[:i]) for i in range(first, len(path))], dtype=np.float32)
    return states


def chains(tree: Tree) -> Tree:
    """Each completion cut into thoughts of two tokens and an answer; a completion of one token is an answer."""
    cut = Tree(tree.prompt)
    for _ in tree.groups():
        cut.new_group()
    for node in tree.nodes[1:]:
        parent = 0
        for a in range(0, len(node), 2):
            last = a + 2 >= len(node)
            parent = cut.add(
                parent,
                node.tokens[a : a + 2],
                node.engine_logprobs[a : a + 2],
                group=0 if node.group < 0 else node.group,
                kind=Kind.ANSWER if last else Kind.THOUGHT,
                stop=StopReason.EOS if last else StopReason.CUT,
            )
    return cut


def answered(tree: Tree) -> Tree:
    """Leaves are answers, what stands before them thoughts."""
    again = Tree(tree.prompt)
    for _ in range(max(tree.groups()) + 1):
        again.new_group()
    for index, node in enumerate(tree.nodes[1:], start=1):
        leaf = not tree.children(index)
        again.add(
            node.parent,
            node.tokens,
            node.engine_logprobs,
            group=node.group,
            kind=Kind.ANSWER if leaf else Kind.THOUGHT,
            stop=StopReason.EOS if leaf else StopReason.CUT,
        )
    return again


def value_model(folder: str, trunk: str) -> ValueModel:
    """With a head made up, and a trunk of its own that is not the policy's any more."""
    numbers, own = torch.Generator().manual_seed(0), None
    if trunk == "separate":
        own = PolicyForward(load(folder, torch.float64), EXACTLY).model.get_decoder()
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=numbers))
    value = ValueModel(32, trunk=own, dtype=torch.float64, device=torch.device("cpu"))
    torch.nn.init.normal_(value.head.weight, generator=numbers)
    return value


def step(
    folder: str,
    name: str,
    settings: Any,
    evidence: Evidence,
    credits: Sequence[Credit],
    budget: int,
    *,
    valued: bool = True,
) -> tuple[StepResult, torch.Tensor]:
    """The result and the gradient, as the distance that plain gradient descent goes: of the policy, then of the value
    model, without which an algorithm that has one trains if not `valued`."""
    model = load(folder, torch.float64)
    value = term = None
    if valued and hasattr(settings, "value"):
        term = ValueTerm(settings.value.coefficient, settings.value.clip)
        value = value_model(folder, settings.value.trunk)
    forward = PolicyForward(model, EXACTLY, value)
    parameters = {POLICY: list(model.parameters()), VALUE: [] if value is None else list(value.parameters())}
    groups = [{"name": key, "params": own} for key, own in parameters.items() if own]
    exact = isinstance(settings, Sampled) and settings.kl.in_loss and settings.kl.estimator == "exact"
    output = model.get_output_embeddings()
    assert output is not None
    head = output.weight.detach().flip(0) if exact else None
    before = [p.detach().clone() for own in parameters.values() for p in own]
    result = optimise(
        policy_loss(
            forward,
            lambda tokens: ALGORITHMS[name].loss(tokens, settings),
            temperature=0.8,
            entropy_gradient=isinstance(settings, Sampled) and settings.entropy.coefficient != 0,
            value=term,
            anchor_head=head,
        ),
        torch.optim.SGD(groups, lr=1.0),
        pack(evidence.trees, credits, token_budget=budget, appraisals=evidence.appraisals),
        max_gradient_norm=0.0,
        learning_rates={POLICY: 1.0, VALUE: 1.0},
    )
    after = [p.detach() for own in parameters.values() for p in own]
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)])
    return result, moved


def test_every_row_has_its_cases():
    assert set(CASES) == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, own in CASES.items() for changes in own]
)
def test_no_packing_changes_the_gradient(tiny_model_folder, name, changes):
    rng = np.random.default_rng(3)
    settings = settings_of(name, changes)
    # three different tokens: many beginnings are equal, and merged where they stand in one micro-batch
    trees = [random_group(rng, row=i, vocabulary=6) for i in range(3)]
    if isinstance(settings, SFT):
        trees = [random_group(rng, row=i, samples=1, vocabulary=6) for i in range(6)]
    if name in ("rft", "process_grpo", "vineppo", "spo_chain"):
        trees = [chains(tree) for tree in trees]
    if name in ("grft", "spo_tree"):
        trees = [answered(random_deep_tree(rng, row=i, vocabulary=6)) for i in range(3)]
    evidence = evidence_of(trees, rng)
    credit = ALGORITHMS[name].credit(evidence, settings)
    whole, gradient = step(tiny_model_folder, name, settings, evidence, credit.trees, 10_000)
    assert gradient.norm() > 1e-3
    for budget in (40, 12):
        result, other = step(tiny_model_folder, name, settings, evidence, credit.trees, budget)
        assert result.tokens_computed >= whole.tokens_computed
        assert result.loss == pytest.approx(whole.loss, rel=1e-10)
        assert relative(other, gradient) <= 1e-10
        assert result.facts == pytest.approx(whole.facts, rel=1e-6)
    if name in ("grft", "spo_tree"):
        return  # whose nodes lie on several paths: see test_grft_flattened
    alone = sum_over_samples(tiny_model_folder, name, settings, evidence, credit.trees)
    assert relative(alone, gradient) <= 1e-10


def test_the_trunk_of_the_values_has_a_gradient_of_its_own(tiny_model_folder):
    """The case above holds for policy and value model together: neither part of the gradient is nothing beside the
    other, and the policy's is the same without the value model."""
    rng = np.random.default_rng(3)
    settings = settings_of("ppo", {"value": {"trunk": "separate", "coefficient": 0.5}})
    evidence = evidence_of([random_group(rng, row=i, vocabulary=6) for i in range(3)], rng)
    credits = ALGORITHMS["ppo"].credit(evidence, settings).trees
    _, both = step(tiny_model_folder, "ppo", settings, evidence, credits, 40)
    _, alone = step(tiny_model_folder, "ppo", settings, evidence, credits, 40, valued=False)
    policy, value = both.split([len(alone), len(both) - len(alone)])
    assert relative(policy, alone) <= 1e-10
    trunk, head = value.split([len(value) - 33, 33])
    assert min(policy.norm(), trunk.norm(), head.norm()) > 0.01 * both.norm()


def sum_over_samples(
    folder: str, name: str, settings: Any, evidence: Evidence, credits: Sequence[Credit]
) -> torch.Tensor:
    """The gradient with each sample in a step of its own, nothing shared and nothing merged."""
    total = torch.zeros(())
    for index, tree in enumerate(evidence.trees):
        for leaf in tree.leaves():
            path = tree.path(leaf)[1:]
            if not any(node in credits[index].weights for node in path):
                continue
            alone, parent = Tree(tree.prompt), 0
            group = alone.new_group()
            for node in map(tree.nodes.__getitem__, path):
                parent = alone.add(
                    parent, node.tokens, node.engine_logprobs, group=group, kind=node.kind, stop=node.stop
                )
            own = Evidence([alone], appraisals=[_moved(evidence.appraisals[index], path)])
            total = total + step(folder, name, settings, own, [_moved(credits[index], path)], 10_000)[1]
    return total


def _moved(record: Any, path: Sequence[int]) -> Any:
    """What a record says of the nodes of a path, as if these were nodes 1, 2, ..."""
    maps = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return type(record)(
        **{
            name: {i: own[node] for i, node in enumerate(path, start=1) if node in own}
            for name, own in maps.items()
        }
    )


def test_grft_flattened(tiny_model_folder):
    """Each node in a tree of its own, its whole prefix untrained before it: the same loss and gradient."""
    rng = np.random.default_rng(4)
    settings = settings_of("grft", {"shape": "tree", "score": "outcome"} | IN_LOSS)
    trees = [answered(random_deep_tree(rng, row=i, vocabulary=6)) for i in range(3)]
    evidence = evidence_of(trees, rng)
    credit = ALGORITHMS["grft"].credit(evidence, settings)
    whole, gradient = step(tiny_model_folder, "grft", settings, evidence, credit.trees, 10_000)
    flat_trees, flat_credits, flat_appraisals = [], [], []
    for index, tree in enumerate(trees):
        for node in credit.trees[index].weights:
            path = tree.path(node)[1:]
            alone, parent = Tree(tree.prompt), 0
            group = alone.new_group()
            for own in map(tree.nodes.__getitem__, path):
                parent = alone.add(
                    parent, own.tokens, own.engine_logprobs, group=group, kind=own.kind, stop=own.stop
                )
            flat_trees.append(alone)
            flat_credits.append(only_last(_moved(credit.trees[index], path), len(path)))
            flat_appraisals.append(_moved(evidence.appraisals[index], path))
    flat = Evidence(flat_trees, appraisals=flat_appraisals)
    result, other = step(tiny_model_folder, "grft", settings, flat, flat_credits, 10_000)
    assert result.loss == pytest.approx(whole.loss, rel=1e-10)
    assert relative(other, gradient) <= 1e-10
    assert whole.tokens_computed < result.tokens_computed


@pytest.mark.parametrize("ratio", ["token", "segment_mean", "segment"])
def test_a_chain_of_grft_trains_as_a_path_of_rft(tiny_model_folder, ratio):
    """Given the same advantages of nodes, and without value loss and penalties: same weights, loss and gradient."""
    rng = np.random.default_rng(5)
    same = {"ratio": ratio, "clip": {"low": 0.1, "high": 0.1}}
    rft = settings_of("rft", same | {"kl": {"coefficient": 0.0}})
    grft = settings_of("grft", same | {"shape": "tree", "score": "outcome"})
    # a node without siblings has nothing to compare with; only a penalty keeps it in the batch
    penalised = settings_of("grft", {"shape": "tree", "score": "outcome", "kl": {"coefficient": 0.1}})
    trees = [lone_chain(random_group(rng, row=i)) for i in range(4)]
    evidence = evidence_of(trees, rng)
    drawn = [{n: rng.normal() for n in range(1, len(tree))} for tree in trees]
    of_rft = with_advantages(ALGORITHMS["rft"].credit(evidence, rft).trees, drawn)
    of_grft = with_advantages(ALGORITHMS["grft"].credit(evidence, penalised).trees, drawn)
    for own, others in zip(of_rft, of_grft, strict=True):
        assert {n: w.tolist() for n, w in own.weights.items()} == {
            n: w.tolist() for n, w in others.weights.items()
        }
    one, first = step(tiny_model_folder, "rft", rft, evidence, of_rft, 40, valued=False)
    other, second = step(tiny_model_folder, "grft", grft, evidence, of_grft, 40)
    assert 0 < one.facts["clipped_share"] < 1
    for name in ("clipped_share", *(() if ratio == "token" else ("segments_clipped_share",))):
        assert one.facts[name] == other.facts[name]
    assert ("segments_clipped_share" in one.facts) == (ratio != "token")
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert first.norm() > 1e-3
    assert relative(second, first) <= 1e-12


def lone_chain(tree: Tree) -> Tree:
    """The longest completion alone: thoughts of two tokens and an answer, each in a group of its own."""
    node, chain, parent = max(tree.nodes[1:], key=len), Tree(tree.prompt), 0
    for a in range(0, len(node), 2):
        last = a + 2 >= len(node)
        parent = chain.add(
            parent,
            node.tokens[a : a + 2],
            node.engine_logprobs[a : a + 2],
            group=chain.new_group(),
            kind=Kind.ANSWER if last else Kind.THOUGHT,
            stop=StopReason.EOS if last else StopReason.CUT,
        )
    return chain


def with_advantages(credits: Sequence[Credit], advantages: Sequence[dict[int, float]]) -> list[Credit]:
    """Each node's tokens with the node's advantage, weights as they are; no values."""
    return [
        Credit(
            {n: np.full(len(w), own[n], dtype=np.float32) for n, w in credit.weights.items()}, credit.weights
        )
        for credit, own in zip(credits, advantages, strict=True)
    ]


def only_last(credit: Credit, node: int) -> Credit:
    """What the last node of a path trains on."""
    return Credit({node: credit.advantages[node]}, {node: credit.weights[node]})
