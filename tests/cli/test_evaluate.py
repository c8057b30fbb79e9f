"""`graft eval`: what is measured, and what cannot be."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def trained(task, graft):
    assert graft("train", task / "config.toml").code == 0
    return task / "run"


def test_a_config_measures_its_model_and_a_run_its_newest_checkpoint(task, trained, graft):
    base = json.loads(graft("eval", task / "config.toml", "--json").out)
    after = json.loads(graft("eval", trained, "--json").out)
    summary = json.loads((trained / "summary.json").read_text())
    assert (base["checkpoint"], after["checkpoint"]) == (None, 2)
    assert base["pass_at"]["1"]["mean"] == summary["held_out_before"]
    assert after["pass_at"]["1"]["mean"] == summary["held_out_after"]
    assert base["reward_mean"] != after["reward_mean"]  # or the weights were not those of the checkpoint
    assert after["rows"] == 4


def test_another_model_on_the_rows_of_a_run(task, trained, tiny_model_folder, graft):
    base = json.loads(graft("eval", task / "config.toml", "--json").out)
    other = json.loads(graft("eval", trained, "--model", tiny_model_folder, "--json").out)
    assert other == base


def test_the_text_has_a_line_for_each_k(task, graft):
    result = graft("eval", task / "config.toml", "--samples", 4, "--rows", 3)
    assert result.code == 0
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names == ["model", "rows", "pass@1", "pass@2", "pass@4", "reward", "length"]
    assert "3 held-out, 4 completions each" in result.out
    assert "(95 %: " in result.out


def test_settings_can_be_changed(task, graft):
    result = graft("eval", task / "config.toml", "--json", "--set", "sampling.max_new_tokens=1")
    assert json.loads(result.out)["length_mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "data.held_out=0"], 2, "there are no held-out rows to measure"),
        (["--set", "evaluation.sampels=2"], 2, "Did you mean 'samples'?"),
        (["--rows", "0"], 2, "--rows"),
    ],
)
def test_refusals(task, graft, arguments, code, message):
    result = graft("eval", task / "config.toml", *arguments)
    assert result.code == code
    assert message in result.err


def test_a_folder_that_is_no_run_is_refused(task, graft):
    result = graft("eval", task)
    assert result.code == 2
    assert "no run's" in result.err


def test_a_run_without_a_checkpoint_is_code_6(task, trained, graft):
    for path in (trained / "checkpoints").glob("step-*"):
        path.rename(path.with_name("gone"))
    result = graft("eval", trained)
    assert result.code == 6
    assert "no checkpoint yet" in result.err
