"""Who takes part and with which settings."""

from __future__ import annotations

from typing import Any

import pytest

from graft.comparison.entrants import Entrant, entry_of, fitting, read_entrants
from graft.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "run": "runs/x",
    "model": {"name": "m"},
    "data": {"source": "rows.jsonl", "held_out": 4},
    "grader": {"type": "number"},
    "algorithm": {"name": "grpo", "group_size": 4, "clip": {"high": 0.3}},
    "training": {"steps": 30, "prompts_per_step": 2},
    "warm_start": {"worked": "key:w", "steps": 3},
}
SFT = Entrant("sft", ("algorithm.name=sft", "algorithm.worked=key:w"))


def entry(entrant: Entrant, settings: dict[str, Any] = SETTINGS, tokens: int | None = 1000):
    return entry_of(settings, entrant, tokens=tokens, seed=7, run="out/run", where="config.toml")


def test_names_and_variants():
    assert read_entrants("grpo, sft", ["big:algorithm.group_size=16,optimizer.betas=[0.9, 0.95]"]) == [
        Entrant("grpo", ("algorithm.name=grpo",)),
        Entrant("sft", ("algorithm.name=sft",)),
        Entrant("big", ("algorithm.group_size=16", "optimizer.betas=[0.9, 0.95]")),
    ]
    assert read_entrants(None, ["plain:"]) == [Entrant("plain", ())]


@pytest.mark.parametrize(
    ("algorithms", "variants", "message"),
    [
        (None, [], "nobody to compare"),
        (" , ", [], "nobody to compare"),
        ("grpo,grpo", [], "'grpo' stands twice"),
        ("grpo", ["grpo:algorithm.group_size=4"], "'grpo' stands twice"),
        (None, ["algorithm.group_size=4"], "want LABEL:algorithm.key=value"),
        (None, ["../x:algorithm.group_size=4"], "cannot name a line"),
        (None, ["x:seed=4"], "'seed' is the same for all"),
        (None, ["x:data.rows=4"], "For all: --set data.rows=4"),
        (None, ["x:warm_start.steps=4"], "'warm_start.steps' is the same for all"),
        (None, ["x:training.generated_tokens=4"], "is the same for all"),
    ],
)
def test_what_is_refused(algorithms, variants, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("[", r"\[")):
        read_entrants(algorithms, variants)


def test_the_budget_takes_the_place_of_the_length_and_the_rest_stays():
    made = entry(Entrant("wide", ("algorithm.clip.high=0.5", "training.prompts_per_step=3")))
    config = made.config
    assert (config.training.steps, config.training.generated_tokens) == (None, 1000)
    assert (config.training.prompts_per_step, config.seed, config.run) == (3, 7, "out/run")
    assert config.evaluation.every_generated_tokens == 100
    assert config.algorithm.model_dump()["clip"] == {"low": 0.2, "high": 0.5, "dual": None}
    assert config.algorithm.model_dump()["group_size"] == 4
    assert made.left_out == ()
    assert SETTINGS["training"] == {"steps": 30, "prompts_per_step": 2}  # not touched


def test_what_means_nothing_to_another_algorithm_is_left_out_by_name():
    made = entry(SFT)
    assert made.left_out == ("algorithm.group_size", "algorithm.clip")
    assert (made.config.algorithm.name, made.config.training.steps) == ("sft", 30)
    assert made.config.evaluation.every_generated_tokens is None


def test_fitting_goes_into_tables():
    kept, left_out = fitting(
        {"clip": {"high": 0.3, "hight": 1}, "kl": {"coefficient": 0.1}, "odd": {"a": 1}}, {"name": "grpo"}
    )
    assert kept == {"clip": {"high": 0.3}, "kl": {"coefficient": 0.1}}
    assert left_out == ["algorithm.clip.hight", "algorithm.odd"]


def test_the_groups_of_spo_tree_are_those_of_its_branching():
    own = {"name": "spo_tree", "branching": [2, 3]}
    assert fitting({"group_size": 8, "whiten": False}, own) == ({"whiten": False}, ["algorithm.group_size"])


def test_supervised_training_has_no_kl_to_report():
    made = entry(SFT, {**SETTINGS, "report": {"kl_every": 5}})
    assert made.config.report.kl_every is None


@pytest.mark.parametrize(("given", "expected"), [({"every": 5}, 100), ({"every_generated_tokens": 300}, 300)])
def test_measurements_come_by_tokens_since_steps_differ_in_cost(given, expected):
    made = entry(Entrant("grpo", ()), {**SETTINGS, "evaluation": given})
    assert (made.config.evaluation.every, made.config.evaluation.every_generated_tokens) == (None, expected)


CRITICISED: dict[str, Any] = {
    **SETTINGS,
    "algorithm": {
        "name": "rft",
        "group_size": 8,
        "critic": {"type": "equations", "unknown_operand_factor": 0.4},
        "rewards": {"boost": 2.0, "whiten": "full"},
    },
}


def test_forms_of_rft_and_grft_beside_each_other():
    variants = [
        "every:algorithm.rewards.overall=every_segment",
        "shared:algorithm.rewards.overall=shared",
        "chain:algorithm.name=grft,algorithm.max_depth=5",
        "tree:algorithm.name=grft,algorithm.shape=tree,algorithm.branching=[3, 2, 2]",
        "leaves:algorithm.name=grft,algorithm.shape=tree,algorithm.score=outcome",
    ]
    made = {entrant.label: entry(entrant, CRITICISED) for entrant in read_entrants("grpo,ppo", variants)}
    own: dict[str, Any] = {label: each.config.algorithm for label, each in made.items()}
    assert (own["every"].rewards.overall, own["shared"].rewards.overall) == ("every_segment", "shared")
    assert own["shared"].rewards.boost == own["chain"].rewards.boost == own["tree"].rewards.boost == 2.0
    assert own["chain"].levels == (8,) * 5
    assert own["tree"].levels == (3, 2, 2)
    assert {label: each.left_out for label, each in made.items()} == {
        "grpo": ("algorithm.critic", "algorithm.rewards"),
        "ppo": ("algorithm.critic", "algorithm.rewards"),
        "every": (),
        "shared": (),
        "chain": ("algorithm.rewards.whiten",),
        "tree": ("algorithm.rewards.whiten", "algorithm.group_size"),
        "leaves": (
            *("algorithm.rewards.whiten", "algorithm.group_size"),
            *("algorithm.critic", "algorithm.rewards"),
        ),
    }


def test_an_entrants_own_setting_without_meaning_is_refused():
    with pytest.raises(
        ConfigError, match=r"'x': algorithm.*: group_size: means nothing without shape = \"chain\""
    ):
        entry(
            Entrant("x", ("algorithm.name=grft", "algorithm.shape=tree", "algorithm.group_size=6")),
            CRITICISED,
        )


@pytest.mark.parametrize(
    ("entrant", "settings", "tokens", "message"),
    [
        (Entrant("x", ()), {}, None, "how long? Give --tokens N"),
        (Entrant("x", ("training.steps=3",)), {}, 10, "the budget of generated tokens ends 'grpo'"),
        (SFT, {"training": {"generated_tokens": 5}}, None, "'sft' draws no tokens"),
        (Entrant("x", ("algorithm.group_siz=4",)), {}, 10, "Did you mean 'group_size'?"),
        (
            Entrant("grpoo", ("algorithm.name=grpoo",)),
            {},
            10,
            "no algorithm is called 'grpoo'. Did you mean 'grpo'?",
        ),
        (Entrant("x", ()), {"data": {"source": "rows.jsonl"}}, 10, "data.held_out = 0"),
        (Entrant("x", ()), {"grader": None}, 10, r"needs a [grader] section"),
        (Entrant("x", ()), {"algorithm": "grpo"}, 10, "algorithm: want a section, got 'grpo'"),
    ],
)
def test_settings_that_are_refused(entrant, settings, tokens, message):
    with pytest.raises(ConfigError) as refused:
        entry(entrant, {**SETTINGS, **settings}, tokens)
    assert message in str(refused.value)
    assert entrant.label in str(refused.value)
