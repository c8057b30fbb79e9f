"""The exact KL on packed trees: values and gradients against whole distributions, path by path, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graft.algorithm_settings import GRPO, KL
from graft.losses import loss_clipped
from graft.objective.kl import exact_kl
from graft.types import Appraisal
from graft.update.head import AnchorHead
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision
from graft.update.step import policy_loss
from tests.trees import random_credit, random_deep_tree, truncated
from tests.update.test_exactness import load, relative

TEMPERATURE = 0.7
CPU = torch.device("cpu")


def moved(model, seed):
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def slow(policy, anchor, tree, node):
    """KL at each token of a node from the models' own forward passes, over the kept tokens alone."""
    path = torch.tensor([t for i in tree.path(node) for t in tree.nodes[i].tokens.tolist()])
    own = tree.nodes[node]
    distributions = []
    for model in (policy, anchor):
        model.set_attn_implementation("eager")
        logits = model(input_ids=path[None], use_cache=False).logits[0, len(path) - len(own) - 1 : -1]
        distributions.append(logits / TEMPERATURE)
    if own.kept is None:
        return exact_kl(*(z.log_softmax(-1) for z in distributions))
    rows = []
    for place, (z, y) in enumerate(zip(*distributions, strict=True)):
        vocabulary = np.arange(own.kept.vocabulary, dtype=np.int32)
        one = own.kept.part(place, place + 1)
        keep = torch.tensor([bool(one.contain(vocabulary[i : i + 1])[0]) for i in vocabulary])
        rows.append(exact_kl(z[keep].log_softmax(-1)[None], y[keep].log_softmax(-1)[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("budget", [10_000, 20])
def test_against_whole_distributions(tiny_model_folder, budget, cut_off):
    rng = np.random.default_rng(0)
    # three different tokens: equal beginnings are merged; made-up kept sets would differ there
    tree = random_deep_tree(rng, nodes=7, vocabulary=300 if cut_off else 6)
    credit = random_credit(tree, rng)
    if cut_off:
        policy = load(tiny_model_folder, torch.float64)
        tree = truncated(tree, rng, vocabulary=policy.config.vocab_size)
    policy, anchor = (moved(load(tiny_model_folder, torch.float64), seed) for seed in (1, 2))
    parts = [
        (slow(policy, anchor, tree, node) * torch.from_numpy(weights)).sum()
        for node, weights in credit.weights.items()
    ]
    expected = torch.stack(parts).sum()
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    forward, fixed = (PolicyForward(model, Precision("exact", CPU)) for model in (policy, anchor))
    own = Appraisal(anchor_states={})
    batches = pack([tree], [credit], token_budget=budget)
    with torch.no_grad():
        for batch in batches:
            states = fixed.states(batch).index_select(0, batch.predictions)
            for each in batch.slices:
                own.anchor_states[each.node] = states[each.start : each.end].numpy()  # pyright: ignore
    total, gradients = 0.0, [torch.zeros_like(p) for p in policy.parameters()]
    for batch in pack([tree], [credit], token_budget=budget, appraisals=[own]):
        assert batch.anchor_states is not None
        beside = AnchorHead(batch.anchor_states, fixed.head_weight)
        kl = forward(batch, temperature=TEMPERATURE, anchor=beside).kl
        assert kl is not None
        share = (kl * batch.weights).sum()
        total += float(share.detach())
        for mine, more in zip(gradients, torch.autograd.grad(share, list(policy.parameters())), strict=True):
            mine += more
    assert total == pytest.approx(float(expected.detach()), rel=1e-6)  # the anchor's states are fp32
    flat = [torch.cat([g.flatten() for g in each]) for each in (gradients, wanted)]
    assert relative(*flat) <= 1e-6


def test_in_the_loss_it_is_added_with_its_weight(tiny_model_folder):
    rng = np.random.default_rng(0)
    tree = random_deep_tree(rng, nodes=5, vocabulary=6)
    credit = random_credit(tree, rng)
    policy, anchor = (moved(load(tiny_model_folder, torch.float64), seed) for seed in (1, 2))
    forward, fixed = (PolicyForward(model, Precision("exact", CPU)) for model in (policy, anchor))
    [batch] = pack([tree], [credit], token_budget=10_000)
    with torch.no_grad():
        batch = replace(batch, anchor_states=fixed.states(batch))
    shares = {}
    for coefficient in (0.0, 0.3):
        settings = GRPO(kl=KL(coefficient=coefficient, estimator="exact"))
        loss = policy_loss(
            forward,
            lambda tokens, settings=settings: loss_clipped(tokens, settings),
            temperature=TEMPERATURE,
            anchor_head=fixed.head_weight if coefficient else None,
        )
        shares[coefficient] = float(loss(batch).share.detach())
    expected = sum(
        float((slow(policy, anchor, tree, node).detach() * torch.from_numpy(weights)).sum())
        for node, weights in credit.weights.items()
    )
    assert shares[0.3] - shares[0.0] == pytest.approx(0.3 * expected, rel=1e-6)
