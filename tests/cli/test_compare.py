"""`graft compare` on a tiny model: equal budgets, one warm start a seed, and going on after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import main
from graft.report.comparison import OF_COMPLETIONS
from graft.report.metrics import without_wall_clock
from graft.report.run_folder import RunFolder
from tests.cli.conftest import COMMAND
from tests.tasks import write_task

BUDGET = 60
LABELS = ("plain", "keen")
WARM_START = {"worked": "grader.py:worked", "steps": 3, "rows_per_step": 2}
SECTIONS: dict[str, Any] = {
    "evaluation": {"samples": 2, "every_generated_tokens": 25},
    "checkpoints": {"every": 1, "keep_last": 100},
}
VARIANTS = (
    *("--variant", "plain:", "--variant", "keen:algorithm.scale=none,optimizer.learning_rate=3e-2"),
    *("--tokens", str(BUDGET)),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_folder) -> Path:
    """A task with a finished comparison of two variants on two seeds in `out`."""
    folder = tmp_path_factory.mktemp("compare")
    task = write_task(folder, tiny_model_folder, warm_start=WARM_START, **SECTIONS)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "compare",
                str(task / "config.toml"),
                *VARIANTS,
                "--seeds",
                "2",
                "--out",
                str(task / "out"),
                "--keep-checkpoints",
            ]
        )
    assert ended.value.code == 0
    return task


def runs(out: Path) -> dict[tuple[str, int], RunFolder]:
    return {
        (label, seed): RunFolder.open(out / "runs" / label / f"seed-{seed}")
        for label in LABELS
        for seed in (0, 1)
    }


def timeless(value: Any) -> Any:
    """A result without what the clock measured."""
    if isinstance(value, list):
        return [timeless(entry) for entry in value]
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key}
    return value


def test_what_is_written(undisturbed):
    out = undisturbed / "out"
    comparison = json.loads((out / "comparison.json").read_text())
    assert [line["label"] for line in comparison["lines"]] == list(LABELS)
    assert (comparison["generated_tokens"], comparison["seeds"], comparison["runs_to_do"]) == (
        BUDGET,
        [0, 1],
        0,
    )
    assert len((out / "comparison.md").read_text().splitlines()) == 6
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_are_equal(undisturbed):
    for folder in runs(undisturbed / "out").values():
        drawn = [r["generated_tokens"] for r in folder.read_metrics() if r["stage"] == "train"]
        assert drawn[-2] < BUDGET <= drawn[-1]
        stored = json.loads(folder.path.with_suffix(".json").read_text())
        assert stored["generated_tokens"] == drawn[-1]
        assert stored["curve"][0]["generated_tokens"] == 0
        assert len(stored["curve"]) >= 3


def test_a_seed_has_one_warm_start_to_the_bit_and_the_same_rows(undisturbed):
    out = undisturbed / "out"
    for seed in (0, 1):
        folders = [runs(out)[label, seed] for label in LABELS]
        warm = RunFolder.open(out / "warm-starts" / f"seed-{seed}")
        for folder in folders:
            assert (
                folder.read_metrics()[:5] == warm.read_metrics()
            )  # before, three steps, after the warm start
            for file in ("weights", "optimizer"):
                name = f"checkpoints/step-000003/{file}.safetensors"
                assert (folder.path / name).read_bytes() == (warm.path / name).read_bytes()
        first = [
            [(t["row"], t["nodes"]) for t in f.read_trees() if (t["stage"], t["step"]) == ("train", 1)]
            for f in folders
        ]
        assert first[0] == first[1]  # the same weights draw the same samples
        later = [
            (f.path / "checkpoints" / "step-000004" / "weights.safetensors").read_bytes() for f in folders
        ]
        assert later[0] != later[1]
    zero, one = ((out / "warm-starts" / f"seed-{s}" / "metrics.jsonl").read_bytes() for s in (0, 1))
    assert zero != one


def test_a_run_is_the_one_that_train_makes_by_itself(undisturbed, graft):
    compared = runs(undisturbed / "out")["keen", 1]
    alone = undisturbed / "alone"
    config = undisturbed / "config.toml"
    config_alone = undisturbed / "alone.toml"
    config_alone.write_text(config.read_text().replace("steps = 2\n", f"generated_tokens = {BUDGET}\n", 1))
    settings = (f"run={alone}", "seed=1", "algorithm.scale=none", "optimizer.learning_rate=3e-2")
    assert graft("train", config_alone, *(part for s in settings for part in ("--set", s))).code == 0
    one, other = (
        [without_wall_clock(r) for r in folder.read_metrics()] for folder in (compared, RunFolder.open(alone))
    )
    assert one == other


def test_the_checkpoints_of_finished_runs_go(undisturbed, tmp_path, graft):
    done = graft(
        "compare", undisturbed / "config.toml", "--variant", "plain:", "--seeds", 1, "--tokens", 9,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    run = tmp_path / "out" / "runs" / "plain" / "seed-0"
    assert (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()


def test_a_later_call_runs_nothing_and_reads_the_same(undisturbed, graft):
    before = sorted(
        (p, p.stat().st_mtime_ns) for p in (undisturbed / "out" / "runs").rglob("*") if p.is_file()
    )
    again = graft(
        "compare", undisturbed / "config.toml", *VARIANTS, "--seeds", 2, "--out", undisturbed / "out", "--json",
        "--target", "0.01",
    )  # fmt: skip
    assert again.code == 0
    assert again.err.count("has its result") == 4
    assert json.loads(again.out)["lines"][0]["reached_target"] == 2
    after = sorted(
        (p, p.stat().st_mtime_ns) for p in (undisturbed / "out" / "runs").rglob("*") if p.is_file()
    )
    assert before == after


def test_results_alone_are_enough(undisturbed, tmp_path, graft):
    """Moved to another folder, without the runs, and from before a setting existed that has its default and some
    metrics were kept."""
    for stored in (undisturbed / "out" / "runs").glob("*/seed-*.json"):
        result = json.loads(stored.read_text())
        assert str(undisturbed) not in stored.read_text().replace(result["settings"]["model"]["name"], "")
        del result["settings"]["algorithm"]["max_sampling_rounds"]
        for later in OF_COMPLETIONS:
            del result[later]
        copy = tmp_path / "out" / stored.relative_to(undisturbed / "out")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(result))
    for name in ("config.toml", "rows.jsonl", "grader.py"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    again = graft(
        "compare", tmp_path / "config.toml", *VARIANTS, "--seeds", 2, "--out", tmp_path / "out", "--json"
    )
    assert again.code == 0, again.err
    assert again.err.count("has its result") == 4
    for line in json.loads(again.out)["lines"]:
        assert [line[later] for later in OF_COMPLETIONS] == [None, None]
    assert not (tmp_path / "out" / "warm-starts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "70"), "training.generated_tokens was 60 and is 70 now"),
        (("--set", "data.suffix=now"), "data.suffix was '' and is 'now' now"),
        (("--set", "warm_start.steps=4"), "warm_start.steps was 3 and is 4 now"),
    ],
)
def test_changed_settings_are_refused(undisturbed, graft, arguments, message):
    result = graft(
        "compare", undisturbed / "config.toml", *VARIANTS, "--out", undisturbed / "out", *arguments
    )
    assert result.code == 2
    assert message in result.err
    assert "Give another --out, or remove" in result.err


def test_a_warm_start_of_other_settings_is_refused_to_a_new_variant(undisturbed, graft):
    result = graft(
        "compare", undisturbed / "config.toml", "--variant", "new:", "--tokens", 9, "--set", "warm_start.steps=4",
        "--out", undisturbed / "out",
    )  # fmt: skip
    assert result.code == 2
    assert f"{undisturbed / 'out' / 'warm-starts' / 'seed-0'}: made with other settings" in result.err


def test_killed_in_the_middle_it_goes_on_to_the_same_results(undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [
        *COMMAND,
        "compare",
        str(undisturbed / "config.toml"),
        *VARIANTS,
        "--keep-checkpoints",
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    kill_at(command, "warm start 2/")
    kill_at(command, "training", times=2)
    assert not (out / "runs" / "plain" / "seed-0.json").exists()
    drawn = [
        r["step"]
        for r in RunFolder.open(out / "runs" / "plain" / "seed-0").read_metrics()
        if r["stage"] == "train"
    ]
    assert drawn
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    for label in LABELS:
        one, other = (
            json.loads((folder / "runs" / label / "seed-0.json").read_text())
            for folder in (undisturbed / "out", out)
        )
        assert timeless(one) == timeless(other)
        weights = [
            max((folder / "runs" / label / "seed-0" / "checkpoints").iterdir()) / "weights.safetensors"
            for folder in (undisturbed / "out", out)
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def kill_at(command: list[str], line_start: str, times: int = 1) -> None:
    """Start a comparison and kill it with SIGKILL when its run says a line for so many times."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = 0
        for line in process.stderr:
            seen += line.startswith(line_start)
            if seen == times:
                process.kill()
                break
        # the run holds the other end of the pipe: it closes when the run is gone too
        process.stderr.read()
    assert process.returncode == -signal.SIGKILL


def test_ctrl_c_stops_the_run_with_a_checkpoint(tiny_model_folder, tmp_path):
    out = tmp_path / "out"
    config = write_task(tmp_path, tiny_model_folder) / "config.toml"
    command = [
        *COMMAND,
        "compare",
        str(config),
        "--algorithms",
        "grpo",
        "--tokens",
        "5000",
        "--out",
        str(out),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("training"):
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
        process.wait(timeout=120)
    assert process.returncode == 130, said
    assert (
        "grpo, seed 0 did not come to its end. What has finished is kept; the same command goes on." in said
    )
    assert RunFolder.open(out / "runs" / "grpo" / "seed-0").read_summary()["status"] == "interrupted"
    assert list((out / "runs" / "grpo" / "seed-0" / "checkpoints").glob("step-*"))
