"""`graft model`: list, pull, export and chat."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def trained(task, graft):
    settings = (
        "--set",
        "model.adapter.rank=2",
        "--set",
        "checkpoints.every=1",
        "--set",
        "checkpoints.keep_last=2",
    )
    assert graft("train", task / "config.toml", *settings).code == 0
    return task / "run"


def test_list_says_what_is_ready(graft, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    [entry] = json.loads(graft("model", "list", "--json").out)
    assert entry["name"] == "smollm2-135m-instruct"
    assert (entry["ready"], entry["state"]) == (False, "not pulled")
    assert "not pulled" in graft("model", "list").out


def test_pull_knows_its_models(graft):
    result = graft("model", "pull", "smollm2-135m-instrct")
    assert result.code == 4
    assert "did you mean 'smollm2-135m-instruct'?" in result.err


def test_export_is_a_model_that_transformers_loads_with_the_checkpoints_weights(task, trained, graft):
    result = graft("model", "export", trained, task / "last")
    assert (result.code, result.out) == (0, f"{task / 'last'}\n")
    graft("model", "export", trained, task / "first", "--checkpoint", 1)
    first, last = (
        AutoModelForCausalLM.from_pretrained(task / name).state_dict() for name in ("first", "last")
    )
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_export_of_the_adapter_alone(task, trained, graft):
    assert graft("model", "export", trained, task / "adapter", "--adapter").code == 0
    assert all("lora_" in name for name in load_file(task / "adapter" / "adapter_model.safetensors"))


def test_export_refusals(task, trained, graft):
    (task / "full").mkdir()
    (task / "full" / "something").touch()
    full = graft("model", "export", trained, task / "full")
    assert (full.code, "not empty" in full.err) == (4, True)
    missing = graft("model", "export", trained, task / "out", "--checkpoint", 7)
    assert (missing.code, "no checkpoint of step 7; there are 1, 2" in missing.err) == (6, True)


def test_chat_answers_each_line_and_ends_with_the_input(tiny_model_folder, graft, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhello\nagain\n"))
    result = graft("model", "chat", tiny_model_folder, "--max-new-tokens", 4, "--temperature", 0.01)
    assert result.code == 0
    assert result.err.count("> ") == 5
    assert "\x1b" not in result.out
    assert result.out.strip()


def test_chat_with_a_run(trained, graft, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    result = graft("model", "chat", trained, "--max-new-tokens", 4, "--system", "Be kind")
    assert result.code == 0
    assert f"{trained}: checkpoint of step 2" in result.err


def test_chat_beyond_the_models_positions_is_an_error(tiny_model_folder, graft, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("long " * 200 + "\n"))
    result = graft("model", "chat", tiny_model_folder)
    assert result.code == 3
    assert "as many as the model has positions" in result.err
