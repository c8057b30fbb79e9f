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
from graft.tree import Tree
from graft.types import Appraisal, Credit, Grade
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision
from graft.update.step import POLICY, VALUE, StepResult, ValueTerm, optimise, policy_loss
from graft.update.value import ValueModel
from tests.trees import random_group
from tests.update.test_exactness import load, relative

IN_LOSS = {"kl": {"coefficient": 0.1, "estimator": "k3"}, "entropy": {"coefficient": 0.01}}
CAPPED = {"engine_weight_cap": 2.0, "overlong": {"buffer_share": 0.5}}

CASES: dict[str, list[dict[str, Any]]] = {
    "reinforce": [{}, IN_LOSS | CAPPED],
    "rloo": [{}, IN_LOSS | {"clip": {"dual": 1.5}}],
    "grpo": [{}, IN_LOSS | CAPPED | {"scale": "batch_std"}],
    "dr_grpo": [{}, IN_LOSS],
    "dapo": [{}, IN_LOSS | CAPPED],
    "gspo": [{}, IN_LOSS | CAPPED],
    "cispo": [{"weight_cap": 1.05}, IN_LOSS],
    "ppo": [{}, CAPPED | {"kl": {"coefficient": 0.2}, "whiten": False, "value": {"coefficient": 0.5}}],
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

    return Evidence(
        trees,
        [{leaf: Grade(float(rng.integers(0, 3))) for leaf in tree.leaves()} for tree in trees],
        [Appraisal(noise(t, -5.7, 0.2), noise(t, -5.7, 0.3), noise(t, 0.0, 0.5)) for t in trees],
        longest=12,
    )


def step(
    folder: str, name: str, settings: Any, evidence: Evidence, credits: Sequence[Credit], budget: int
) -> tuple[StepResult, torch.Tensor]:
    """The result and the gradient, as the distance that plain gradient descent goes."""
    model = load(folder, torch.float64)
    value = None
    if hasattr(settings, "value"):
        value = ValueModel(32, trunk=None, dtype=torch.float64, device=torch.device("cpu"))
        torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    forward = PolicyForward(model, Precision("exact", torch.device("cpu")), value)
    parameters = {POLICY: list(model.parameters()), VALUE: [] if value is None else list(value.parameters())}
    groups = [{"name": key, "params": own} for key, own in parameters.items() if own]
    before = [p.detach().clone() for own in parameters.values() for p in own]
    result = optimise(
        policy_loss(
            forward,
            lambda tokens: ALGORITHMS[name].loss(tokens, settings),
            temperature=0.8,
            entropy_gradient=isinstance(settings, Sampled) and settings.entropy.coefficient != 0,
            value=None if value is None else ValueTerm(settings.value.coefficient, settings.value.clip),
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
    trees = [random_group(rng, row=i, vocabulary=6) for i in range(4)]
    if isinstance(settings, SFT):
        trees = [random_group(rng, row=i, samples=1, vocabulary=6) for i in range(6)]
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
    alone = sum_over_samples(tiny_model_folder, name, settings, evidence, credit.trees)
    assert relative(alone, gradient) <= 1e-10


def sum_over_samples(
    folder: str, name: str, settings: Any, evidence: Evidence, credits: Sequence[Credit]
) -> torch.Tensor:
    """The gradient with each sample in a step of its own, nothing shared and nothing merged."""
    total = torch.zeros(())
    for index, tree in enumerate(evidence.trees):
        for leaf in credits[index].weights:
            alone = Tree(tree.prompt)
            node = tree.nodes[leaf]
            alone.add(
                0, node.tokens, node.engine_logprobs, group=alone.new_group(), kind=node.kind, stop=node.stop
            )
            own = Evidence([alone], [{}], [_moved(evidence.appraisals[index], leaf)])
            credit = _moved(credits[index], leaf)
            total = total + step(folder, name, settings, own, [credit], 10_000)[1]
    return total


def _moved(record: Any, leaf: int) -> Any:
    """What a record says of one node, as if that were node 1."""
    maps = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return type(record)(**{name: {1: own[leaf]} if leaf in own else {} for name, own in maps.items()})
