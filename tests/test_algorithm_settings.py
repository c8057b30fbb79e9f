"""What `[algorithm]` refuses, and what its sections say of themselves. More of GRFT's shapes is in `test_config.py`."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from graft.algorithm_parts import AdaptiveKL
from graft.algorithm_settings import (
    ALGORITHM_NAMES,
    GRFT,
    GRPO,
    PPO,
    AlgorithmSettings,
    OfThoughts,
    Sampled,
    SPOTree,
)
from graft.critics.settings import MonteCarlo

ANY: TypeAdapter[Any] = TypeAdapter(AlgorithmSettings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ppo", "kl": {"target": 1.0}}, "kl.target needs kl.coefficient above 0"),
        (
            {"name": "ppo", "kl": {"coefficient": 0.1, "horizon": 500}},
            "kl.horizon: means nothing without kl.target",
        ),
        (
            {"name": "ppo", "kl": {"anchor": "rollout"}},
            'kl.anchor = "rollout": a reward is of the policy that sampled',
        ),
        (
            {"name": "grpo", "kl": {"anchor": "rollout", "place": "reward"}},
            'kl.anchor = "rollout": a reward is of the policy that sampled',
        ),
        (
            {"name": "rft", "kl": {"anchor": "rollout", "of": "rollout"}},
            "the KL of the policy that sampled to itself is 0",
        ),
        ({"name": "rft", "kl": {"of": "rollout", "coefficient": 0}}, "nothing would be reported"),
        ({"name": "rft", "kl": {"of": "rollout", "estimator": "k2"}}, 'reported as "k3" or "exact"'),
        (
            {"name": "grft", "critic": {"type": "judge", "model": "m", "form": "earliest_error"}},
            "scores a thought by its share of the whole chain",
        ),
        ({"name": "spo_tree", "group_size": 8}, "group_size = 8: means nothing here"),
        ({"name": "ppo", "value": {"update": "after_policy"}}, 'needs value.trunk = "separate"'),
        ({"name": "grft", "score": "outcome"}, 'score = "outcome" needs leaves under every candidate'),
        ({"name": "grft", "score": "mixed"}, 'score = "mixed" needs leaves under every candidate'),
        (
            {"name": "grft", "survivor": "best", "critic": {"type": "monte_carlo"}},
            "which cannot draw while trees grow",
        ),
        ({"name": "grft", "kl": {"coefficient": 0.1, "place": "reward"}}, "compared by scores alone"),
        (
            {"name": "process_grpo", "kl": {"coefficient": 0.1, "place": "reward"}},
            "the rewards are those of steps",
        ),
        (
            {"name": "vineppo", "kl": {"coefficient": 0.1, "place": "reward"}},
            "values are shares of solved rollouts",
        ),
        ({"name": "rft", "kl": {"place": "reward"}}, "kl.place"),
        ({"name": "grpo", "gae_lambda": 0.9}, "gae_lambda"),
        ({"name": "reinforce", "updates_per_batch": 2}, "updates_per_batch"),
        ({"name": "rloo", "group_size": 1}, "group_size"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError) as caught:
        ANY.validate_python(settings)
    assert words in str(caught.value)


WITH_KL = [
    own.model_fields["name"].default
    for own in get_args(get_args(AlgorithmSettings)[0])
    if issubclass(own, Sampled)
]


@pytest.mark.parametrize("name", WITH_KL)
def test_every_row_with_a_kl_takes_its_anchor(name):
    kl = {"coefficient": 0.1, "place": "loss", "estimator": "k3", "anchor": "rollout"}
    assert ANY.validate_python({"name": name, "kl": kl}).kl.anchor == "rollout"
    with pytest.raises(ValidationError, match="place"):
        ANY.validate_python({"name": name, "kl": {**kl, "place": "reward"}})


def test_the_horizon_of_a_target():
    steered = {"coefficient": 0.1, "target": 4.0, "horizon": 500}
    assert ANY.validate_python({"name": "ppo", "kl": steered}).kl.horizon == 500
    assert PPO(kl=AdaptiveKL(horizon=10_000)).kl.target is None  # as its default


def test_which_scores_of_grft_ask_a_critic():
    sampled: dict[str, Any] = {"critic": MonteCarlo()}
    asks = [
        GRFT(),
        GRFT(score="outcome", **sampled),
        GRFT(score="mixed", **sampled),
        GRFT(shape="tree"),
        GRFT(shape="tree", score="mixed"),
    ]
    assert all(own.asks_critic for own in asks)
    assert not GRFT(shape="tree", score="outcome").asks_critic


@pytest.mark.parametrize("survivor", ["sample", "best", "softmax"])
def test_a_critic_that_judges_while_trees_grow_may_choose(survivor):
    assert ANY.validate_python({"name": "grft", "survivor": survivor}).survivor == survivor


def test_the_shapes_of_trees():
    """A chain of at most 3 groups of 2 candidates, and a tree of 2 x 3 x 4."""
    chain, tree = GRFT(group_size=2, max_depth=3), GRFT(shape="tree", branching=(2, 3, 4))
    assert (chain.levels, chain.open_paths) == ((2, 2, 2), 2)
    assert (tree.levels, tree.open_paths) == ((2, 3, 4), 24)
    assert SPOTree(branching=(2, 3, 4)).open_paths == 24


def test_the_optimiser_steps_of_a_batch():
    assert GRPO(updates_per_batch=2, minibatches=3).updates == 6
    assert PPO().updates == 1
    assert Sampled().updates == 1


def test_every_class_of_the_union_is_a_name_of_its_own():
    assert len(set(ALGORITHM_NAMES)) == len(get_args(get_args(AlgorithmSettings)[0]))
    of_thoughts = {own.model_fields["name"].default for own in get_args(OfThoughts)}
    with_segments = {
        own.model_fields["name"].default
        for own in get_args(get_args(AlgorithmSettings)[0])
        if "segments" in own.model_fields
    }
    assert of_thoughts == with_segments
