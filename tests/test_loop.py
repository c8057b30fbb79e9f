"""Which weights sample, train and stand still: refreshing the policy that samples, warming up the value model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graft.algorithms import ALGORITHMS
from graft.config_file import check_config
from graft.report.run_folder import RunFolder
from graft.runs import start_run
from tests.tasks import task_settings, write_task

CUT = {"segments": {"cutter": "tokens:2"}, "critic": {"type": "function", "function": "grader.py:critic"}}
OF_ALGORITHMS: dict[str, dict[str, Any]] = {
    "process_grpo": CUT,
    "rft": CUT,
    "grft": {**CUT, "max_depth": 3, "entropy": {"coefficient": 1e-9}},
    "dapo": {"max_sampling_rounds": 2},
}
SAMPLING = [name for name, row in ALGORITHMS.items() if row.samples]


def train(folder: Path, model: Path, algorithm: dict[str, Any], **sections: Any) -> RunFolder:
    folder.mkdir()
    write_task(folder, model)
    settings = task_settings(folder, model, algorithm=algorithm, evaluation={"every": 1}, **sections)
    settings["model"]["precision"] = "exact"
    start_run(check_config(settings, where="test"))
    return RunFolder.open(folder / "run")


def steps_of(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in run.read_metrics() if record["stage"] == "train"]


def drawn_in(run: RunFolder, step: int) -> list[list[int]]:
    trees = [tree for tree in run.read_trees() if tree["stage"] == "train" and tree["step"] == step]
    return [node["tokens"] for tree in trees for node in tree["nodes"]]


@pytest.mark.parametrize("name", SAMPLING)
def test_every_row_of_the_table_trains_on_samples_of_an_older_policy(name, tmp_path, tiny_model_folder):
    """The engine's log-probabilities are those of the weights that sampled: so must the trainer's be."""
    group_size = None if name == "spo_tree" else 3  # which has its branching
    algorithm = {"name": name, "group_size": group_size, "refresh_every": 2, **OF_ALGORITHMS.get(name, {})}
    run = train(
        tmp_path / "task",
        tiny_model_folder,
        algorithm,
        training={"steps": 3, "prompts_per_step": 3},
    )
    steps = steps_of(run)
    assert len(steps) == 3
    assert all(record["engine_gap_max"] < 1e-3 for record in steps)
    assert [record["ratio_max"] for record in steps][::2] == [1.0, 1.0]
    assert steps[1]["ratio_max"] > 1.01
    assert len([r for r in run.read_metrics() if r.get("moment") == "during"]) == 2


@pytest.mark.parametrize(
    "algorithm", [{"name": "grpo"}, {"name": "grft", "max_depth": 3, **CUT}], ids=lambda own: own["name"]
)
def test_what_is_drawn_is_what_the_weights_of_the_refresh_draw(algorithm, tmp_path, tiny_model_folder):
    """A policy that does not move draws with the first weights throughout."""

    def run(name: str, every: int, rate: float) -> RunFolder:
        return train(
            tmp_path / name,
            tiny_model_folder,
            {**algorithm, "group_size": 3, "refresh_every": every},
            training={"steps": 3},
            optimizer={"learning_rate": rate},
        )

    still, older, fresh = run("still", 1, 1e-30), run("older", 2, 0.05), run("fresh", 1, 0.05)
    for step in (1, 2):
        assert drawn_in(older, step) == drawn_in(still, step)
    assert drawn_in(older, 3) != drawn_in(still, 3)
    assert drawn_in(fresh, 2) != drawn_in(still, 2)


def logprobs_of(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> np.ndarray:
    path = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(path).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].numpy()


def test_the_ratio_by_two_plain_models(tmp_path, tiny_model_folder):
    """Step 2 starts at the weights after step 1, and its samples are of those before it."""
    run = train(
        tmp_path / "task",
        tiny_model_folder,
        {"group_size": 4, "refresh_every": 2, "entropy": {"coefficient": 1e-9}},  # so that all groups train
        checkpoints={"every": 1, "keep_last": 3},
    )
    before, after = (AutoModelForCausalLM.from_pretrained(tiny_model_folder) for _ in range(2))
    after.load_state_dict(load_file(run.path / "checkpoints/step-000001/weights.safetensors"), strict=False)
    largest = 0.0
    for tree in run.read_trees():
        if (tree["stage"], tree["step"]) == ("train", 2):
            [prompt, *completions] = [node["tokens"] for node in tree["nodes"]]
            for own in completions:
                gap = logprobs_of(after, prompt, own) - logprobs_of(before, prompt, own)
                largest = max(largest, float(np.exp(gap).max()))
    assert largest > 1.05
    assert steps_of(run)[1]["ratio_max"] == pytest.approx(largest, rel=1e-4)


def test_a_checkpoint_holds_the_older_weights_where_the_next_step_samples_with_them(
    tmp_path, tiny_model_folder
):
    run = train(
        tmp_path / "task",
        tiny_model_folder,
        {"name": "ppo", "refresh_every": 3},
        training={"steps": 4},
        checkpoints={"every": 1, "keep_last": 9},
    )
    folders = {int(p.name[5:]): p for p in (run.path / "checkpoints").glob("step-*")}
    files = {number: folder / "rollout.safetensors" for number, folder in folders.items()}
    assert {number for number, path in files.items() if path.exists()} == {1, 2, 4}
    kept = load_file(files[2])
    first = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    assert {name.split(".")[0] for name in kept} == {"model", "value"}
    for name, tensor in kept.items():
        expected = torch.zeros_like(tensor) if name.startswith("value.") else first[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    for name, tensor in load_file(folders[3] / "weights.safetensors").items():
        torch.testing.assert_close(load_file(files[4])[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ppo", "rft"])
def test_the_policy_stands_still_while_the_value_model_warms_up(name, tmp_path, tiny_model_folder):
    algorithm = {
        "name": name,
        "value": {"warmup_steps": 2, "learning_rate": 0.05},
        **OF_ALGORITHMS.get(name, {}),
    }
    run = train(
        tmp_path / "task",
        tiny_model_folder,
        algorithm,
        training={"steps": 3},
        checkpoints={"every": 1, "keep_last": 9},
    )
    first = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    weights, values = (
        [load_file(run.path / f"checkpoints/step-00000{number}/{what}.safetensors") for number in (1, 2, 3)]
        for what in ("weights", "values")
    )
    stands_still = [all(torch.equal(own[name], first[name]) for name in own) for own in weights]
    assert stands_still == [True, True, False]
    assert not torch.equal(values[0]["head.weight"], torch.zeros_like(values[0]["head.weight"]))
    assert not torch.equal(values[1]["head.weight"], values[0]["head.weight"])
    steps = steps_of(run)
    assert [record["learning_rate"] for record in steps] == [0.0, 0.0, 1e-2]
    assert ["entropy" in record for record in steps] == [False, False, True]
    assert all(record["value_loss"] > 0 for record in steps)
    drawn = [record["tokens_sampled"] for record in steps]
    assert [record["generated_tokens"] for record in steps] == [sum(drawn[: n + 1]) for n in range(3)]
