"""Older weights that stand in for the newer ones, and go again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graft.update.rollout_weights import RolloutWeights


@pytest.fixture
def layer() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def train(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1


def test_the_older_values_stand_in_and_go(layer):
    rollout = RolloutWeights(dict(layer.named_parameters()))
    assert rollout.tensors == {}
    older = layer.weight.detach().clone()
    rollout.refresh()
    train(layer)
    newer = layer.weight.detach().clone()
    for _ in range(2):
        with rollout.in_place():
            assert torch.equal(layer.weight, older)
        assert torch.equal(layer.weight, newer)
        assert torch.equal(rollout.tensors["weight"], older)
    rollout.refresh()
    assert torch.equal(rollout.tensors["weight"], newer)


def test_what_remembers_a_tensor_by_its_version_sees_the_change(layer):
    """Kernels keep packed weights as long as tensor and version are the same."""
    rollout = RolloutWeights(dict(layer.named_parameters()))
    rollout.refresh()
    versions = [layer.weight._version]
    storage = layer.weight.data_ptr()
    with rollout.in_place():
        versions.append(layer.weight._version)
    versions.append(layer.weight._version)
    assert len(set(versions)) == 3
    assert layer.weight.data_ptr() == storage


def test_gradients_and_the_graph_are_left_alone(layer):
    rollout = RolloutWeights(dict(layer.named_parameters()))
    rollout.refresh()
    layer(torch.ones(1, 3)).sum().backward()
    gradient = layer.weight.grad
    with rollout.in_place():
        assert layer.weight.requires_grad
    assert layer.weight.grad is gradient
    assert all(not tensor.requires_grad for tensor in rollout.tensors.values())


def test_copies_of_a_checkpoint(layer):
    rollout = RolloutWeights(dict(layer.named_parameters()))
    stored = {name: torch.zeros_like(own) for name, own in layer.named_parameters()}
    rollout.load(stored)
    with rollout.in_place():
        assert not layer.weight.any()
    with pytest.raises(KeyError, match="bias"):
        rollout.load({"weight": stored["weight"]})
