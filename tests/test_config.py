"""What the settings accept, refuse, and say about it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import typing
from typing import Any

import pytest
from pydantic import BaseModel

from graft.algorithm_settings import ALGORITHM_NAMES, GRPO, SFT
from graft.config import Checkpoints, Optimizer, RunConfig
from graft.config_file import check_config, dump_config, section_at
from graft.errors import ConfigError
from graft.section import Section, tag_of

LEAST: dict[str, Any] = {
    "run": "out",
    "model": {"name": "smollm2-135m-instruct"},
    "data": {"source": "rows.jsonl"},
    "training": {"steps": 10},
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merge(base[key], value) if nested else value
    return result


def at(path: str, value: Any) -> dict[str, Any]:
    """`at("a.b", 1)` -> `{"a": {"b": 1}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def check(*changes: dict[str, Any]) -> RunConfig:
    data = LEAST
    for change in changes:
        data = merge(data, change)
    return check_config(data, where="here.toml")


def refusal(*changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*changes)
    return str(caught.value)


def test_the_least_that_is_needed():
    config = check()
    assert config.algorithm == GRPO()
    assert config.seed == 0
    assert config.grader is None
    assert config.warm_start is None


ADAPTER = {"model": {"adapter": {}}}
WARM = {"warm_start": {"worked": "key:worked", "steps": 3}}


@pytest.mark.parametrize(
    ("present", "path", "hint"),
    [
        ({}, "sed", "'seed'"),
        ({}, "optimiser", "'optimizer'"),
        ({}, "model.nam", "'name'"),
        ({}, "data.held-out", "'held_out'"),
        ({}, "sampling.temperatur", "'temperature'"),
        ({}, "training.step", "'steps'"),
        (ADAPTER, "model.adapter.rnk", "'rank'"),
        (WARM, "warm_start.rows_per_steps", "'rows_per_step'"),
        (WARM, "warm_start.optimizer.learning_rat", "'learning_rate'"),
        ({}, "algorithm.groupsize", "'group_size'"),
        ({}, "algorithm.clip.hihg", "'high'"),
        ({}, "algorithm.kl.coeficient", "'coefficient'"),
        ({}, "grading.judge.basurl", "'base_url'"),
        ({}, "grading.max_failure", "'max_failure_rate'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(present, path, hint):
    said = refusal(present, at(path, 1))
    assert said.splitlines()[0].startswith(f"here.toml: {path}: unknown setting")
    assert f"Did you mean {hint}?" in said


def test_a_key_like_no_other_is_answered_with_those_there_are():
    said = refusal(at("report.zzz", 1))
    assert said == "here.toml: report.zzz: unknown setting. Known here: kl_every, tensorboard, trees."


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("grpo", "worked", "key:worked"),
        ("rft", "reduction", "token_mean"),
        ("reinforce", "clip", {"low": 0.1}),
        ("reinforce", "updates_per_batch", 2),
        ("dr_grpo", "scale", "none"),
        ("sft", "group_size", 8),
        ("sft", "kl", {"coefficient": 0.1}),
        ("sft", "clip", {"low": 0.1}),
        ("grpo", "gae_lambda", 0.9),
    ],
)
def test_a_key_that_means_nothing_to_the_algorithm_is_unknown_there(name, key, value):
    own = {"name": name, **({"worked": "key:worked"} if name == "sft" else {}), key: value}
    assert f"algorithm.{key}: unknown setting for algorithm '{name}'" in refusal({"algorithm": own})


def test_a_section_inside_an_algorithm_is_chosen_by_type():
    critic = {"algorithm": {"name": "rft", "critic": {"type": "judge"}}}
    assert refusal(critic).startswith("here.toml: algorithm.critic.model: missing. The judge")
    critic["algorithm"]["critic"]["type"] = "juge"
    assert "algorithm.critic.type: no critic is called 'juge'. Did you mean 'judge'?" in refusal(critic)
    del critic["algorithm"]["critic"]["type"]
    assert "algorithm.critic.type: missing" in refusal(critic)


def test_the_algorithm_is_chosen_by_name_and_is_grpo_without_one():
    assert check({"algorithm": {"group_size": 4}}).algorithm == GRPO(group_size=4)
    sft = check({"algorithm": {"name": "sft", "worked": "key:w"}}).algorithm
    assert sft == SFT(worked="key:w")
    assert "no algorithm is called 'gropo'. Did you mean 'grpo'?" in refusal({"algorithm": {"name": "gropo"}})
    assert (
        "Known: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce, ppo, process_grpo, rft, grft, "
        "vineppo, spo_chain, spo_tree, sft." in refusal({"algorithm": {"name": "xyz"}})
    )
    assert ALGORITHM_NAMES[0] == "grpo"
    assert "algorithm" in refusal({"algorithm": "grpo"})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 1.5, "valid integer"),
        ("seed", "one", "valid integer"),
        ("run", 3, "valid string"),
        ("model.name", None, "valid string"),
        ("model", "smollm2", "valid dictionary"),
        ("model.precision", "fp16", "'auto', 'bf16' or 'exact'"),
        ("model.adapter.rank", 0, "greater than or equal to 1"),
        ("model.adapter.target_modules", "q_proj", "valid tuple"),
        ("data.long_prompts", "keep", "'refuse' or 'drop'"),
        ("data.held_out", -3, "greater than or equal to 0"),
        ("training.prompts_per_step", 0, "greater than or equal to 1"),
        ("sampling.temperature", 0, "greater than 0"),
        ("sampling.top_p", 1.2, "less than or equal to 1"),
        ("sampling.top_k", 0, "greater than or equal to 1"),
        ("sampling.max_new_tokens", 0, "greater than or equal to 1"),
        ("optimizer.learning_rate", 0, "greater than 0"),
        ("optimizer.learning_rate", "small", "valid number"),
        ("optimizer.schedule", "step", "'constant', 'linear' or 'cosine'"),
        ("optimizer.betas", [0.9], "missing"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1 = 1.0: input should be less than 1. Decay of the"),
        (
            "optimizer.betas",
            [-0.1, 0.9],
            "optimizer.betas.0 = -0.1: input should be greater than or equal to 0",
        ),
        ("algorithm.group_size", 1, "greater than or equal to 2"),
        ("algorithm.clip.low", 1.0, "less than 1"),
        ("algorithm.clip.high", -0.1, "greater than or equal to 0"),
        ("algorithm.scale", "std", "'group_std', 'batch_std' or 'none'"),
        ("algorithm.kl.estimator", "k4", "'k1', 'k2', 'k3' or 'exact'"),
        ("checkpoints.keep_last", 0, "greater than or equal to 1"),
        ("rollout.slots", 0, "greater than or equal to 1"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size(path, value, words):
    said = refusal(at(path, value))
    assert said.startswith(f"here.toml: {path}")
    assert words in said


def number_settings(
    section: type[BaseModel] = RunConfig, path: str = "", chosen: dict[str, Any] | None = None
) -> list[tuple[str, int, dict[str, Any]]]:
    """Every setting that holds fractions, with how many it holds and what chooses the sections that have it."""
    found: list[tuple[str, int, dict[str, Any]]] = []
    chosen = chosen or {}
    for name, field in section.model_fields.items():
        flat = [field.annotation, *typing.get_args(field.annotation)]
        entries = [typing.get_args(a) or (a,) for a in typing.get_args(field.annotation)]
        if float in flat:
            found.append((f"{path}{name}", 1, chosen))
        elif typing.get_origin(field.annotation) is tuple and any(float in entry for entry in entries):
            found.append((f"{path}{name}", len(entries), chosen))
        kinds = dict.fromkeys(k for a in flat for k in (a, *typing.get_args(a)) if isinstance(k, type))
        for kind in [k for k in kinds if issubclass(k, BaseModel) and k is not SFT]:
            own = chosen
            if len(kinds) > 2:
                tag = tag_of(kind)
                own = merge(chosen, at(f"{path}{name}.{tag}", kind.model_fields[tag].default))
            found += number_settings(kind, f"{path}{name}.", own)
    return found


def test_the_settings_that_hold_fractions_were_found():
    found = number_settings()
    assert ("optimizer.betas", 2, {}) in found
    assert {"sampling.top_p", "algorithm.clip.high", "warm_start.optimizer.epsilon"} <= {x for x, *_ in found}
    names = {own["algorithm"]["name"] for *_, own in found if "algorithm" in own}
    assert names == set(ALGORITHM_NAMES) - {"sft"}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("path", "count", "chosen"), number_settings())
def test_no_setting_takes_a_number_that_is_not_finite(path, count, chosen, value):
    present = WARM if path.startswith("warm_start") else {}
    said = refusal(present, chosen, at(path, value if count == 1 else [value] * count))
    assert path in said
    assert "finite number" in said


def test_a_refusal_shows_the_value_and_the_help_text():
    said = refusal(at("algorithm.group_size", 1))
    assert said == (
        "here.toml: algorithm.group_size = 1: input should be greater than or equal to 2. "
        "Samples for each prompt. One is not enough: the others are its baseline."
    )


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_missing_section_is_named(section):
    data = {key: value for key, value in LEAST.items() if key != section}
    with pytest.raises(ConfigError, match=rf"^x: {section}: missing"):
        check_config(data, where="x")


def test_a_missing_key_comes_with_its_help():
    data = {**LEAST, "model": {}}
    with pytest.raises(ConfigError, match=r"model\.name: missing\. Embedded name"):
        check_config(data, where="x")
    assert "algorithm.worked: missing. Where the worked completion comes from" in refusal(
        {"algorithm": {"name": "sft"}}
    )


def test_every_finding_has_its_line():
    said = refusal(at("sampling.temperature", -1), at("sed", 3), at("model.nam", "x"))
    assert len(said.splitlines()) == 3
    assert all(line.startswith("here.toml: ") for line in said.splitlines())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training": {"epochs": 2}},
            "give one of training.steps, training.epochs and training.generated_tokens",
        ),
        ({"training": {"generated_tokens": 2}}, "give one of training.steps, training.epochs"),
        (
            {"evaluation": {"every": 1, "every_generated_tokens": 5}},
            "give either evaluation.every or evaluation.every_generated_tokens",
        ),
        ({"data": {"source": "gym:chain_sum"}}, "data.rows: a 'gym:' source has no end"),
        ({"data": {"held_out": 5, "held_out_source": "x.jsonl"}}, "give either data.held_out (split off)"),
        ({"grader": {"type": "function"}}, "here.toml: grader.function: got nothing; wants a value"),
        (
            {"grader": {"type": "number", "function": "a:b"}},
            "grader.function: got a key that this grader does not",
        ),
        (
            {"grader": {"type": "number", "ky": 1}},
            "grader.ky: got a key that this grader does not have; wants none. Did",
        ),
        ({"grader": {"key": "answer"}}, "grader.type: got nothing; wants a type"),
        (
            {"grader": {"file": "a.json", "type": "multi"}},
            "grader.file: want a file's name, and no other key",
        ),
        (
            {"grader": {"type": "json_schema", "schema": {"enum": [None]}}},
            "TOML has none: put the grader into a JSON",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, words):
    assert words in refusal(changes)


def test_k1_is_the_estimate_in_the_reward_and_not_in_the_loss():
    def kl(**own: Any) -> Any:
        return check({"algorithm": {"kl": {"coefficient": 0.1, **own}}}).algorithm.kl  # pyright: ignore

    assert kl().estimator == "k3"
    assert kl(place="reward").estimator == "k1"
    assert kl(place="reward", estimator="k3").estimator == "k3"
    assert "trains nothing" in refusal({"algorithm": {"kl": {"estimator": "k1"}}})
    steered = {"coefficient": 0.1, "target": 1.0, "place": "loss", "estimator": "exact"}
    assert "kl.target steers" in refusal({"algorithm": {"name": "ppo", "kl": steered}})


def test_the_clip_of_a_mean_ratio_is_narrower():
    for name in ("rft", "grft"):
        own = check({"algorithm": {"name": name, "ratio": "segment_mean"}}).algorithm
        assert (own.clip.low, own.clip.high) == (0.05, 0.05)  # pyright: ignore
        own = check({"algorithm": {"name": name, "ratio": "segment_mean", "clip": {"low": 0.1}}}).algorithm
        assert (own.clip.low, own.clip.high) == (0.1, 0.2)  # pyright: ignore


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"branching": [2, 2]}, 'branching: means nothing without shape = "tree"'),
        ({"shape": "tree", "group_size": 8}, 'group_size: means nothing without shape = "chain"'),
        ({"shape": "tree", "max_depth": 3}, 'max_depth: means nothing without shape = "chain"'),
        ({"shape": "tree", "survivor": "best"}, 'survivor: means nothing without shape = "chain"'),
        (
            {"survivor_temperature": 0.5},
            'survivor_temperature: means nothing without shape = "chain", survivor',
        ),
        (
            {"shape": "tree", "survivor": "softmax", "survivor_temperature": 0.5},
            'survivor: means nothing without shape = "chain"',
        ),
        ({"outcome_weight": 0.3}, 'outcome_weight: means nothing without score = "mixed"'),
        (
            {"shape": "tree", "score": "outcome", "critic": {"type": "judge", "model": "j"}},
            'critic: means nothing without score = "critic" or "mixed"',
        ),
        (
            {"shape": "tree", "score": "outcome", "rewards": {"boost": 2.0}},
            'rewards: means nothing without score = "critic" or "mixed"',
        ),
    ],
)
def test_settings_of_another_shape_of_grft_are_refused_by_name(own, words):
    assert words in refusal({"algorithm": {"name": "grft", **own}})


@pytest.mark.parametrize(
    "own",
    [
        {"group_size": 8, "max_depth": 3, "survivor": "softmax", "survivor_temperature": 0.5},
        {
            "shape": "tree",
            "branching": [2, 2],
            "score": "mixed",
            "outcome_weight": 0.3,
            "rewards": {"boost": 2.0},
        },
        {"shape": "tree", "score": "outcome"},
        {"score": "outcome", "critic": {"type": "monte_carlo", "continuations": 2}},
        {"score": "mixed", "critic": {"type": "monte_carlo"}, "rewards": {"boost": 2.0}},
    ],
)
def test_what_a_shape_of_grft_takes_is_taken_and_written_out(own):
    config = check({"algorithm": {"name": "grft", **own}})
    again = check_config(tomllib.loads(dump_config(config)), where="again")
    assert again.algorithm == config.algorithm


def test_what_cannot_go_together():
    assert "training.prompts_per_step = 8" in refusal({"algorithm": {"minibatches": 9}})
    for name in ("rft", "grpo"):
        anchored = {"algorithm": {"name": name, "kl": {"anchor": "rollout"}}, "report": {"kl_every": 2}}
        assert "leave one of them out" in refusal(anchored)


@pytest.mark.parametrize("name", ["grft", "spo_tree"])
def test_a_tree_has_a_depth(name):
    shape = {"shape": "tree"} if name == "grft" else {}
    assert "algorithm.branching" in refusal({"algorithm": {"name": name, **shape, "branching": []}})


def test_a_tree_needs_a_slot_for_each_open_path():
    wide = {"name": "grft", "shape": "tree", "branching": [4, 4, 5]}
    assert "keeps 80 paths of a prompt open" in refusal({"algorithm": wide})
    check({"algorithm": wide, "rollout": {"slots": 80}})
    chain = {"name": "grft", "group_size": 65}
    assert "keeps 65 paths" in refusal({"algorithm": chain})
    check({"algorithm": {**chain, "group_size": 64}})


def test_groups_are_drawn_anew_by_scores_known_while_trees_grow():
    tree = {"name": "grft", "shape": "tree", "max_draws": 2}
    for own in ({"score": "outcome"}, {"score": "mixed"}, {"critic": {"type": "monte_carlo"}}):
        assert "max_draws = 2" in refusal({"algorithm": {**tree, **own}})
    assert check({"algorithm": tree}).algorithm.max_draws == 2  # pyright: ignore


def test_either_steps_or_epochs():
    assert check({"training": {"steps": None, "epochs": 2}}).training.epochs == 2
    assert "give one of" in refusal({"training": {"steps": None}})
    sft = {"algorithm": {"name": "sft", "worked": "key:w"}}
    assert "'sft' draws no tokens" in refusal({**sft, "training": {"steps": None, "generated_tokens": 5}})
    counted = {"evaluation": {"every_generated_tokens": 5}}
    assert "evaluation.every_generated_tokens: 'sft' draws no tokens" in refusal({**sft, **counted})
    assert "report.kl_every: 'sft' draws no tokens" in refusal({**sft, "report": {"kl_every": 5}})
    check(counted)


def test_settings_cannot_be_changed_after_checking():
    config = check()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="frozen"):
        config.sampling.temperature = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def sections() -> list[type[Section]]:
    found: list[type[Section]] = []
    waiting: list[type[Section]] = [Section]
    while waiting:
        below = waiting.pop().__subclasses__()
        found += below
        waiting += below
    return [
        s
        for s in found
        if s.__module__ in ("graft.config", "graft.algorithm_settings", "graft.algorithm_parts")
    ]


def holds_a_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(holds_a_section(part) for part in typing.get_args(annotation))


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_every_section_and_field_says_what_it_is(section):
    """The docstrings are the help texts and the reference page; a section's own is its class's."""
    assert section.__doc__
    assert section.model_config.get("extra") == "forbid"
    for name, field in section.model_fields.items():
        is_tag = name == "name" and field.default in ALGORITHM_NAMES
        if not is_tag and not holds_a_section(field.annotation):
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.rstrip().endswith("."), f"{section.__name__}.{name}"


def test_sections_were_found():
    assert {RunConfig, GRPO, SFT, Optimizer, Checkpoints} <= set(sections())
    assert len(sections()) >= 18


@pytest.mark.parametrize(
    ("path", "data", "expected"),
    [
        ((), {}, "RunConfig"),
        (("algorithm",), {}, "GRPO"),
        (("algorithm",), {"algorithm": {"name": "sft"}}, "SFT"),
        (("algorithm", "clip"), {}, "TokenClip"),
        (("algorithm", "clip"), {"algorithm": {"name": "gspo"}}, "Clip"),
        (("model", "adapter"), {}, "Adapter"),
        (("warm_start", "optimizer"), {}, "Optimizer"),
        (("nowhere",), {}, None),
        (("seed",), {}, None),
        (("data", "options"), {}, None),
    ],
)
def test_the_section_at_a_path(path, data, expected):
    found = section_at(path, data)
    assert (found.__name__ if found else None) == expected


def test_settings_are_read_without_torch():
    """`graft --help` and the viewers shall be quick."""
    modules = "graft.config, graft.config_file, graft.types, graft.tree, graft.errors, graft.data.rows"
    code = f"import sys, graft, {modules}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
