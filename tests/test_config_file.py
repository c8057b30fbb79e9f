"""Settings files: overrides, resolved folders, and what is written back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.algorithm_settings import GRPO, SFT
from graft.config import RunConfig
from graft.config_file import check_config, dump_config, load_config, set_override
from graft.errors import ConfigError

TEXT = """
run = "out"

[model]
name = "smollm2-135m-instruct"

[data]
source = "rows.jsonl"
options = { min = 1, deep = { a = [1, 2] } }

[algorithm]
name = "grpo"
group_size = 4
clip = { high = 0.28 }

[training]
steps = 10
"""


def write(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read(tmp_path):
    config = load_config(write(tmp_path))
    assert config.run == "out"
    assert isinstance(config.algorithm, GRPO)
    assert config.algorithm.group_size == 4
    assert config.algorithm.clip.high == 0.28
    assert config.data.options == {"min": 1, "deep": {"a": [1, 2]}}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("optimizer.learning_rate=1e-5", "optimizer.learning_rate", 1e-5),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("data.shuffle=false", "data.shuffle", False),
        ("run=runs/second", "run", "runs/second"),  # not TOML: text
        ('run="quoted"', "run", "quoted"),
        ("run='2024-01-01'", "run", "2024-01-01"),
        ("model.name=a=b", "model.name", "a=b"),  # only the first = separates
        (" seed = 7 ", "seed", 7),
        ("data.suffix=", "data.suffix", ""),
        ("data.options={ max = 3 }", "data.options", {"max": 3}),
        ("data.options.min=9", "data.options", {"min": 9, "deep": {"a": [1, 2]}}),
        ("data.options.deep.a=x", "data.options", {"min": 1, "deep": {"a": "x"}}),
        ("algorithm.clip.low=0.1", "algorithm.clip.low", 0.1),
        ("model.adapter.rank=4", "model.adapter.rank", 4),  # a section that the file does not have
        ("sampling.temperature=2", "sampling.temperature", 2.0),
        ("data.system=antworte kurz, größer", "data.system", "antworte kurz, größer"),
    ],
)
def test_overrides(tmp_path, override, path, value):
    found: Any = load_config(write(tmp_path), [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_the_rest_of_its_section_stays(tmp_path):
    config = load_config(write(tmp_path), ["algorithm.group_size=6", "algorithm.group_size=7"])
    assert isinstance(config.algorithm, GRPO)
    assert config.algorithm.group_size == 7
    assert config.algorithm.clip.high == 0.28


@pytest.mark.parametrize("override", ["seed", "=3", " = 3"])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="want key=value"):
        set_override({}, override)


def test_an_override_through_a_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--set run\.name=x: 'run' is a value, not a section"):
        load_config(write(tmp_path), ["run.name=x"])


def test_an_unknown_override_is_refused_like_a_key_of_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.lr: unknown setting\. (Did|Known)"):
        load_config(write(tmp_path), ["optimizer.lr=1"])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file\. `graft init`"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"run = ", b"run = 'a'\nrun = 'b'", b"run = '\xff'", b"\x00"])
def test_what_is_not_toml(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml: not a TOML file: "):
        load_config(path)


@pytest.mark.parametrize("base", ["", "sub", "../beside", "/absolute/place"])
def test_file_names_start_from_the_files_own_folder(tmp_path, base, monkeypatch):
    monkeypatch.chdir("/")
    text = f'base = "{base}"\n{TEXT}' if base else TEXT
    assert Path(load_config(write(tmp_path, text)).base) == (tmp_path / base).resolve()


def test_a_relative_path_to_the_file(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("config.toml")).base == str(tmp_path.resolve())


def test_what_is_written_back_is_read_from_anywhere(tmp_path):
    config = load_config(write(tmp_path))
    other = tmp_path / "runs" / "one"
    other.mkdir(parents=True)
    (other / "config.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(other / "config.toml") == config  # base was resolved


texts = st.text(max_size=20)
sampling = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 10**6)},
    optional={
        "temperature": st.floats(1e-300, 1e300),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(1, 100),
        "min_p": st.floats(0, 1),
    },
)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(
    run=texts,
    seed=st.integers(0, 2**63 - 1),
    system=st.none() | texts,
    suffix=texts,
    options=st.dictionaries(texts, values, max_size=3),
    sampling=sampling,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    targets=st.none() | st.lists(texts, max_size=3),
    algorithm=st.sampled_from([{}, {"kl": {"coefficient": 1e-3}}, {"name": "sft", "worked": "key:w"}]),
    warm=st.booleans(),
)
def test_writing_and_reading_back_gives_the_same_settings(
    run, seed, system, suffix, options, sampling, betas, targets, algorithm, warm
):
    data: dict[str, Any] = {
        "run": run,
        "seed": seed,
        "model": {"name": "m", **({} if targets is None else {"adapter": {"target_modules": targets}})},
        "data": {"source": "rows.jsonl", "system": system, "suffix": suffix, "options": options},
        "sampling": sampling,
        "training": {"steps": 3},
        "optimizer": {"betas": betas},
        "algorithm": algorithm,
    }
    if warm:
        data["warm_start"] = {"worked": "key:w", "steps": 2, "optimizer": {"learning_rate": 1e-9}}
    config = check_config(data, where="test")
    assert check_config(tomllib.loads(dump_config(config)), where="test") == config


def test_infinity_in_a_table_that_is_passed_on_is_written_and_read_back():
    data = {"run": "r", "model": {"name": "m"}, "data": {"options": {"most": float("inf")}}}
    config = check_config({**data, "training": {"steps": 1}}, where="test")
    again = check_config(tomllib.loads(dump_config(config)), where="test")
    assert again == config
    assert again.data.options == {"most": float("inf")}


def test_defaults_are_written_out():
    """A run folder's settings stay what they were when a default changes."""
    least = {"run": "r", "model": {"name": "m"}, "data": {}, "training": {"steps": 1}}
    written = tomllib.loads(dump_config(check_config(least, where="test")))
    assert written["algorithm"]["name"] == "grpo"
    assert written["algorithm"]["clip"] == {"low": 0.2, "high": 0.2}
    assert written["optimizer"]["learning_rate"] == 1e-6
    expected = {name for name, field in RunConfig.model_fields.items() if field.default is not None}
    assert set(written) == expected
    sft = {**least, "algorithm": {"name": "sft", "worked": "key:w"}}
    assert check_config(sft, where="test").algorithm == SFT(worked="key:w")


def test_the_callers_data_are_left_alone():
    data = {"run": "r", "model": {"name": "m"}, "data": {}, "training": {"steps": 1}, "algorithm": {}}
    check_config(data, where="test")
    assert data["algorithm"] == {}


OWN_CRITIC = """
run = "r"
model.name = "m"
data.source = "rows.jsonl"
training.steps = 1
algorithm = { name = "grft", critic = { type = "function", function = "a.py:b" } }
"""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=0", "--set training.steps=0: training.steps = 0: "),
        (
            "optimizer.learning_rat=1",
            "--set optimizer.learning_rat=1: optimizer.learning_rat: unknown setting. Did",
        ),
        (
            "algorithm.critic.model=x",
            "--set algorithm.critic.model=x: algorithm.critic.model: unknown setting for critic 'function'. Known",
        ),
        (
            "algorithm.value.coefficient=1",
            "--set algorithm.value.coefficient=1: algorithm.value: unknown setting for algorithm 'grft'. Known",
        ),
        (
            "algorithm.name=gfrt",
            "--set algorithm.name=gfrt: algorithm.name: no algorithm is called 'gfrt'. Did you",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_not_the_files(tmp_path, override, said):
    file = tmp_path / "own.toml"
    file.write_text(OWN_CRITIC)
    with pytest.raises(ConfigError) as refused:
        load_config(file, ["seed=3", override])
    assert str(refused.value).startswith(said)
    file.write_text(OWN_CRITIC.replace("steps = 1", "steps = -1"))
    with pytest.raises(ConfigError) as refused:
        load_config(file, ["seed=3"])
    assert str(refused.value).startswith(f"{file}: training.steps = -1: ")
