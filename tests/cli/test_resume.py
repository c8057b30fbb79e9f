"""`graft resume`: how a run that was stopped ends stands in `test_train.py`; here, one that needs nothing more, and one
that was to stop between its phases."""

from __future__ import annotations

import json
import re

from graft.config_file import dump_config, load_config
from graft.report.metrics import Stage, without_wall_clock
from graft.report.run_folder import RunFolder
from graft.runs import resume_run


def test_a_finished_run_stays_as_it_is(task, graft):
    graft("train", task / "config.toml")
    folder = RunFolder.open(task / "run")
    metrics, trees = (folder.path / "metrics.jsonl").read_bytes(), (folder.path / "trees.jsonl").read_bytes()
    result = graft("resume", task / "run", "--json")
    assert result.code == 0
    summary = json.loads(result.out)
    assert (summary["run"], summary["status"]) == (str(task / "run"), "finished")
    assert (folder.path / "metrics.jsonl").read_bytes() == metrics
    assert (folder.path / "trees.jsonl").read_bytes() == trees


def test_a_run_that_was_moved_goes_on_where_it_is_now(task, graft):
    graft("train", task / "config.toml", "--set", "checkpoints.every=1")
    moved = (task / "run").rename(task / "elsewhere")
    result = graft("resume", moved)
    assert (result.code, result.out) == (0, f"{moved}\n")
    assert not (task / "run").exists()


def test_settings_that_were_edited_are_checked(task, graft):
    graft("train", task / "config.toml", "--set", "training.steps=1")
    config = task / "run" / "config.toml"
    config.write_text(config.read_text().replace("group_size = 2", "group_size = 0"))
    result = graft("resume", task / "run")
    assert result.code == 2
    assert f"{config}: algorithm.group_size = 0" in result.err


def test_settings_that_do_not_fit_the_checkpoint_are_refused_and_others_taken(task, graft):
    graft("train", task / "config.toml", "--set", "training.steps=1")
    config = task / "run" / "config.toml"
    longer = config.read_text().replace("\nsteps = 1", "\nsteps = 2").replace("reward", "parity")
    config.write_text(longer.replace("seed = 0", "seed = 1"))
    result = graft("resume", task / "run")
    assert result.code == 6
    assert "seed: 0 in the checkpoint, 1 here" in result.err
    config.write_text(longer)
    assert graft("resume", task / "run").code == 0
    rewards = [r["reward_mean"] for r in RunFolder.open(task / "run").read_metrics() if r["stage"] == "train"]
    assert len(rewards) == 2
    assert (rewards[1] * 4).is_integer()  # four samples of 0 or 1


def test_stopped_after_the_warm_start_it_goes_on_as_if_it_had_not(task, graft):
    with (task / "config.toml").open("a") as config:
        config.write('\n[warm_start]\nworked = "grader.py:worked"\nsteps = 2\nrows_per_step = 2\n')
    with (task / "grader.py").open("a") as grader:
        grader.write("\n\ndef worked(item):\n    return str(item['answer'])\n")
    whole, halted = task / "whole", task / "halted"
    assert graft("train", task / "config.toml", "--set", f"run={whole}").code == 0
    settings = load_config(task / "config.toml", [f"run={halted}"])
    RunFolder.create(halted, dump_config(settings)).close()
    resume_run(halted, until=Stage.WARM_START)
    folder = RunFolder.open(halted)
    assert folder.read_summary()["status"] == "interrupted"
    assert {r["stage"] for r in folder.read_metrics()} == {"warm_start", "evaluation"}
    assert [p.name for p in (halted / "checkpoints").iterdir()] == ["step-000002"]
    assert graft("resume", halted).code == 0
    one, other = ([without_wall_clock(r) for r in RunFolder.open(f).read_metrics()] for f in (whole, halted))
    assert one == other
    assert folder.read_summary()["status"] == "finished"


def test_the_progress_line_goes_on_with_the_rewards_of_the_steps_before(task, graft):
    graft("train", task / "config.toml", "--set", "training.steps=1")
    config = task / "run" / "config.toml"
    config.write_text(re.sub(r"(?m)^steps = 1$", "steps = 2", config.read_text()))
    result = graft("resume", task / "run")
    assert result.code == 0
    [line] = [line for line in result.err.splitlines() if line.startswith("training ")]
    assert line.startswith("training 2/2  reward ")
    assert "(mean of 2 steps)  held-out " in line
