"""`graft train` and `graft resume`: what they print, what they refuse, and how they stop."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from graft.interrupt import Interrupt
from graft.report.run_folder import RunFolder
from tests.cli.conftest import COMMAND


def test_it_trains_and_prints_the_run_folder_alone(task, graft):
    result = graft("train", task / "config.toml")
    assert result.code == 0
    assert result.out == f"{task / 'run'}\n"
    assert "training 2/2" in result.err
    folder = RunFolder.open(task / "run")
    assert [r["step"] for r in folder.read_metrics() if r["stage"] == "train"] == [1, 2]
    assert (task / "run" / "report.html").is_file()


def test_json_is_the_summary(task, graft):
    result = graft("train", task / "config.toml", "--json", "--set", "training.steps=1")
    summary = json.loads(result.out)
    assert summary["run"] == str(task / "run")
    assert (summary["status"], summary["steps"], summary["held_out_rows"]) == ("finished", 1, 4)


def test_a_taken_run_folder_is_refused_before_the_model_is_looked_for(task, graft):
    (task / "run").mkdir()
    (task / "run" / "metrics.jsonl").touch()
    result = graft("train", task / "config.toml", "--set", "model.name=nonesuch")
    assert result.code == 2
    assert f"`graft resume {task / 'run'}` goes on with it" in result.err
    assert "--new" in result.err


@pytest.mark.parametrize("new", [[], ["--new"]])
@pytest.mark.parametrize("run", ["/proc/graft/run", f"{'x' * 300}/run", "x" * 300])
def test_a_run_folder_that_cannot_be_is_refused_before_the_model_is_looked_for(task, graft, run, new):
    settings = ("--set", f"run={run}", "--set", "model.name=nonesuch")
    result = graft("train", task / "config.toml", *settings, *new)
    assert result.code == 2
    assert f"error: {run}: cannot make the run folder" in result.err
    assert "Traceback" not in result.err


def test_a_write_that_fails_in_mid_run_says_how_to_go_on(task, graft, monkeypatch):
    """Simulated: to root nothing is forbidden."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("graft.state.checkpoint._save_tensors", refuse)
        result = graft("train", task / "config.toml")
    assert result.code == 7
    assert "step-000002 could not be written: Permission denied" in result.err
    assert f"go on from the start with: graft resume {task / 'run'}" in result.err
    assert "Traceback" not in result.err
    assert graft("resume", task / "run").code == 0


def test_a_run_does_not_overwrite_the_settings_of_a_task(task, graft):
    result = graft("train", task / "config.toml", "--set", f"run={task}")
    assert result.code == 2
    assert "config.toml that the run would overwrite" in result.err


def test_new_takes_the_next_free_number(task, graft):
    arguments = (
        "train",
        task / "config.toml",
        "--new",
        "--set",
        "training.steps=1",
        "--set",
        "data.held_out=0",
    )
    assert [graft(*arguments).out for _ in range(3)] == [
        f"{task / name}\n" for name in ("run", "run-2", "run-3")
    ]


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            ["optimizer.learnin_rate=1"],
            2,
            "optimizer.learnin_rate: unknown setting. Did you mean 'learning_rate'?",
        ),
        (["training.steps=0"], 2, "training.steps = 0: input should be greater than or equal to 1"),
        (["grader.function=grader.py:rewrd"], 2, "has no function 'rewrd'; did you mean 'reward'?"),
        (["nonsense"], 2, "--set nonsense: want key=value"),
        (["model.name=smollm2-135m-instrct"], 4, "did you mean 'smollm2-135m-instruct'?"),
        (["model.name=./nonesuch"], 4, "there is no such folder"),
        (["data.source=bad.jsonl"], 3, "bad.jsonl"),
        (["data.source=none.jsonl"], 3, "none.jsonl"),
        (["grader.function=grader.py:raises"], 5, "raised ValueError: no such key: golden"),
        (["grader.function=grader.py:returns_nan"], 5, "returned nan; a score must be finite"),
        (["grader.function=grader.py:hangs", "grader.timeout_s=0.05"], 5, "took longer than"),
    ],
)
def test_what_goes_wrong_is_named_with_its_exit_code(task, graft, settings, code, message):
    (task / "bad.jsonl").write_text('{"prompt": "What is 1 + 1?", "answer": 2}\n{"question": "no prompt"}\n')
    result = graft("train", task / "config.toml", *(part for s in settings for part in ("--set", s)))
    assert result.code == code
    assert "error: " in result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_run_that_fails_before_its_first_step_says_how_to_go_on(task, graft):
    (task / "mended.py").write_text("def reward(completion, item):\n    raise ValueError('no such key')\n")
    settings = ("--set", "grader.function=mended.py:reward", "--set", "data.held_out=0")
    result = graft("train", task / "config.toml", *settings)
    assert result.code == 5
    assert f"go on from the start with: graft resume {task / 'run'}" in result.err
    summary = RunFolder.open(task / "run").read_summary()
    assert (summary["status"], summary["steps"], summary["steps_done"]) == ("failed", 2, 0)
    (task / "mended.py").write_text("def reward(completion, item):\n    return len(completion) % 2\n")
    assert graft("resume", task / "run").code == 0
    summary = RunFolder.open(task / "run").read_summary()
    assert (summary["status"], summary["steps"], summary["steps_done"]) == ("finished", 2, 2)


def test_a_missing_settings_file_says_how_to_get_one(tmp_path, graft):
    result = graft("train", tmp_path / "none.toml")
    assert result.code == 2
    assert "`graft init` writes one to start from" in result.err


def test_resume_refuses_a_folder_without_a_run(tmp_path, graft):
    result = graft("resume", tmp_path)
    assert result.code == 3
    assert "not a run folder" in result.err


@pytest.fixture
def training(task) -> Iterator[subprocess.Popen[str]]:
    """A run of 120 steps in a process of its own, killed if a test leaves it behind."""
    command = [*COMMAND, "train", str(task / "config.toml"), "--set", "training.steps=120"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_leaves_a_checkpoint_and_resume_finishes(task, training, graft):
    run = task / "run"
    assert training.stderr is not None
    for line in training.stderr:
        if line.startswith("training 2/"):
            break
    training.send_signal(signal.SIGINT)
    out, err = training.communicate(timeout=60)
    assert (training.returncode, out) == (130, "")
    assert (
        err.count("SIGINT: the run stops at the next moment at which nothing is lost, with a checkpoint.")
        == 1
    )
    assert err.index("Another Ctrl-C") < err.index("interrupted (SIGINT)")
    assert f"interrupted (SIGINT): a checkpoint is written. Go on with: graft resume {run}" in err
    assert "Traceback" not in err
    assert 2 <= checkpoint_of(run) < 120
    assert RunFolder.open(run).read_summary()["status"] == "interrupted"

    result = graft("resume", run)
    assert (result.code, result.out) == (0, f"{run}\n")
    folder = RunFolder.open(run)
    trained = [record["step"] for record in folder.read_metrics() if record["stage"] == "train"]
    assert trained == list(range(1, 121))
    assert folder.read_summary()["status"] == "finished"


def test_sigterm_is_143(task, graft):
    function = ("--set", "grader.function=grader.py:terminates_once")
    result = graft("train", task / "config.toml", *function)
    assert (result.code, result.out) == (143, "")
    assert (
        f"interrupted (SIGTERM): a checkpoint is written. Go on with: graft resume {task / 'run'}"
        in result.err
    )
    assert graft("resume", task / "run").code == 0


def test_a_second_ctrl_c_stops_at_once(task, graft, monkeypatch):
    first = Interrupt._receive

    def twice(self: Interrupt, number: int, frame: FrameType | None) -> None:
        first(self, number, frame)
        signal.raise_signal(signal.SIGINT)  # before anything else can look at the first

    monkeypatch.setattr(Interrupt, "_receive", twice)
    function = ("--set", "grader.function=grader.py:interrupts_once")
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        result = graft("train", task / "config.toml", *function)
    finally:
        signal.signal(signal.SIGINT, former)
    assert (result.code, result.out) == (130, "")
    assert "stopped at once, without a checkpoint of this moment. Go on with: graft resume" in result.err
    assert graft("resume", task / "run").code == 0


def test_ctrl_c_before_the_run_began(task, graft):
    (task / "slow.py").write_text("raise KeyboardInterrupt")
    result = graft("train", task / "config.toml", "--set", "grader.function=slow.py:reward")
    assert result.code == 130
    assert "stopped before the run began: nothing was written" in result.err
    assert not (task / "run").exists()


def checkpoint_of(run: Path) -> int:
    [name] = [path.name for path in (run / "checkpoints").glob("step-*")]
    return int(name.removeprefix("step-"))


def test_report_is_written_again(task, graft):
    graft("train", task / "config.toml", "--set", "training.steps=1")
    page = task / "run" / "report.html"
    page.unlink()
    result = graft("report", task / "run")
    assert (result.code, result.out, result.err) == (0, f"{page}\n", "")
    assert page.stat().st_size > 10_000


def test_dry_run_writes_nothing_and_counts_what_the_run_then_does(task, graft):
    before = sorted(path.name for path in task.iterdir())
    result = graft("train", task / "config.toml", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert sorted(path.name for path in task.iterdir()) == before
    said = json.loads(result.out)
    assert (said["rows_train"], said["rows_held_out"], said["rows_shared"]) == (8, 4, 0)
    assert said["steps"] == {"training": 2}
    assert said["peak_memory_gb"] > 0
    assert said["seconds"] == pytest.approx(sum(part["seconds"] for part in said["parts"]))
    summary = json.loads(graft("train", task / "config.toml", "--json").out)
    assert said["tokens_sampled_training"] == pytest.approx(summary["generated_tokens"], rel=0.5)


def test_dry_run_for_people(task, graft):
    result = graft("train", task / "config.toml", "--dry-run")
    assert "8 to train on, 4 held out; they share no question" in result.out
    assert "Assumed:\n- completions have" in result.out


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_scores_that_do_not_fit_the_settings_are_told(task, graft, options):
    member = '{type="function", function="grader.py:reward"}'
    grader = f'grader={{type="multi", calculate_output="10*f", graders={{f={member}}}}}'
    result = graft("train", task / "config.toml", "--set", grader, "--set", "training.steps=1", *options)
    assert result.code == 0, result.err
    assert "scores go to 10, and everything from 1 counts as solved" in " ".join(result.err.split())


def test_dry_run_finds_a_reward_that_fails(task, graft):
    result = graft("train", task / "config.toml", "--dry-run", "--set", "grader.function=grader.py:raises")
    assert result.code == 5
    assert "no such key: golden" in result.err
