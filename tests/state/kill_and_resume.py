"""Helper program of `test_kill_and_resume.py`: runs a tiny training and kills it at random moments.

    python -m tests.state.kill_and_resume MODEL_FOLDER WORK_FOLDER KILLS ENGINE ADAPTER ALGORITHM

Prints one JSON line: how many kills fell into which part of the run, and the first difference found between any
killed and resumed run and the undisturbed one (null if there is none).

The modules are imported once; every run is a fork of this process, which itself computes nothing.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import graft  # noqa: F401  guards the CPU before torch computes anything

# isort: split
import torch
from safetensors.torch import load_file

from graft.assemble import assemble
from graft.config_file import check_config, dump_config
from graft.interrupt import Interrupt
from graft.loop import Loop
from graft.report.metrics import without_wall_clock
from graft.report.run_folder import RunFolder
from graft.report.terminal import Terminal
from tests.tasks import task_settings, write_task

PARTS = ("sampling", "update", "checkpoint")
"""Parts of a run that a kill is aimed at."""


class MarkedLoop(Loop):
    """Says on a pipe which part of the run begins."""

    pipe = -1

    def mark(self, part: str) -> None:
        os.write(self.pipe, bytes([PARTS.index(part)]))

    def sample(self, *args, **kwargs):
        self.mark("sampling")
        return super().sample(*args, **kwargs)

    def update(self, *args, **kwargs):
        self.mark("update")
        return super().update(*args, **kwargs)

    def save(self):
        self.mark("checkpoint")
        super().save()


ALGORITHMS = {
    "grpo": {"name": "grpo", "group_size": 4, "updates_per_batch": 2, "kl": {"coefficient": 0.01}},
    "reinforce": {"name": "reinforce"},
    "dapo": {"name": "dapo", "group_size": 2, "max_sampling_rounds": 3, "overlong": {"mask": True}},
    "ppo": {
        "name": "ppo",
        "group_size": 2,
        "updates_per_batch": 2,
        "minibatches": 2,
        "kl": {"coefficient": 0.1, "target": 0.05, "horizon": 20},
        "value": {"warmup_steps": 2, "learning_rate": 1e-2},
    },
    "rft": {
        "name": "rft",
        "group_size": 2,
        "segments": {"cutter": "tokens:4"},
        "updates_per_batch": 2,
        "value": {"learning_rate": 1e-2},
    },
    "rft-refresh": {
        "name": "rft",
        "group_size": 2,
        "refresh_every": 4,
        "segments": {"cutter": "tokens:4"},
        "value": {"warmup_steps": 2, "learning_rate": 1e-2},
        "kl": {"anchor": "rollout"},
    },
    "grpo-refresh": {"name": "grpo", "group_size": 4, "refresh_every": 3},
    "grft": {
        "name": "grft",
        "group_size": 3,
        "survivor": "softmax",
        "max_draws": 3,
        "segments": {"cutter": "low_probability:0.02"},
        "critic": {"type": "function", "function": "grader.py:coarse"},
        "updates_per_batch": 2,
    },
    "grft-tree": {
        "name": "grft",
        "group_size": None,
        "shape": "tree",
        "branching": [3, 2],
        "score": "mixed",
        "segments": {"cutter": "tokens:4"},
        "critic": {"type": "function", "function": "grader.py:critic"},
        "updates_per_batch": 2,
    },
    "vineppo": {
        "name": "vineppo",
        "group_size": 2,
        "segments": {"cutter": "tokens:4"},
        "critic": {"continuations": 2},
    },
    "sft": {  # a loss that falls by less than a nat is no improvement: training ends after its fourth step
        "name": "sft",
        "worked": "grader.py:worked",
        "group_size": None,
        "early_stopping": {"patience": 2, "minimum_improvement": 1.0},
    },
    "ppo-separate": {
        "name": "ppo",
        "group_size": 2,
        "value": {"trunk": "separate", "update": "after_policy", "learning_rate": 1e-3},
    },
}


def sections_of(engine: str, adapter: bool, algorithm: str) -> dict[str, dict]:
    reward = "parity" if algorithm == "dapo" else "reward"  # many groups without signal, drawn anew
    reports_kl = algorithm != "sft" and ALGORITHMS[algorithm].get("kl", {}).get("anchor") != "rollout"
    # the warm start ends after its first step
    stops = {"validate_every": 1, "early_stopping": {"patience": 1, "minimum_improvement": 1.0}}
    return {
        "model": {"adapter": {"rank": 4}} if adapter else {},
        "grader": {"function": f"grader.py:{reward}"},
        "algorithm": ALGORITHMS[algorithm],
        "sampling": {"max_new_tokens": 16},
        "rollout": {"engine": engine, "slots": 6},
        "training": {"prompts_per_step": 3, "steps": 6, "microbatch_tokens": 64},
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
        "warm_start": {"worked": "grader.py:worked", "steps": 2, "rows_per_step": 4}
        | (stops if algorithm == "sft" else {}),
        "evaluation": {"every": 2, "samples": 2},
        "checkpoints": {"every": 1, "keep_last": 2, "keep_best": 1},
        "report": {"kl_every": 2} if reports_kl else {},
    }


def run(config: dict, folder: Path, pipe: int) -> None:
    """Start or resume the run in `folder`, in this process."""
    torch.set_num_threads(1)
    checked = check_config({**config, "run": str(folder)}, where="test")
    parts = assemble(checked)
    exists = (folder / "config.toml").exists()
    with (
        RunFolder.open(folder) if exists else RunFolder.create(folder, dump_config(checked)) as handle,
        Terminal() as terminal,
        Interrupt() as interrupt,
    ):
        loop = MarkedLoop(parts, handle, terminal, interrupt)
        loop.pipe = pipe
        loop.restore()
        loop.run()


def fork(config: dict, folder: Path) -> tuple[int, int]:
    """Begin a run in a child; returns its id and the pipe on which it marks its parts."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        run(config, folder, writing)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int, pipe: int) -> dict[str, float]:
    """Let a run end by itself; returns how long its parts took at most, in seconds."""
    longest: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    part, began = None, time.perf_counter()
    while marker := os.read(pipe, 1):
        now = time.perf_counter()
        if part is not None:
            longest[part] = max(longest[part], now - began)
        part, began = PARTS[marker[0]], now
    os.close(pipe)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("an undisturbed run failed; see its log")
    return longest


def kill_within(child: int, pipe: int, part: str, after: float) -> bool:
    """Kill the run `after` seconds into the next such part; False if it ended before."""
    while True:
        marker = os.read(pipe, 1)
        if not marker:
            os.waitpid(child, 0)
            os.close(pipe)
            return False
        if PARTS[marker[0]] == part:
            break
    select.select([], [], [], after)
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(pipe)
    return killed


def difference(one: Path, other: Path) -> str | None:
    """The first place where two finished runs differ, apart from the clock."""
    for name in ("metrics.jsonl", "trees.jsonl"):
        a, b = ((folder / name).read_text().splitlines() for folder in (one, other))
        if len(a) != len(b):
            return f"{name}: {len(a)} and {len(b)} lines"
        for number, (x, y) in enumerate(zip(a, b, strict=True), start=1):
            x, y = json.loads(x), json.loads(y)
            if name == "metrics.jsonl":
                x, y = without_wall_clock(x), without_wall_clock(y)
            if x != y:
                changed = [key for key in x if x[key] != y.get(key)]
                return f"{name}, line {number}: {changed}"
    kept = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    if kept[0] != kept[1]:
        return f"checkpoints {kept[0]} and {kept[1]}"
    for path in sorted((one / "checkpoints").rglob("*.safetensors")):
        a, b = load_file(path), load_file(other / path.relative_to(one))
        for key in sorted(set(a) | set(b)):
            if key not in a or key not in b or a[key].numpy().tobytes() != b[key].numpy().tobytes():
                return f"{path.relative_to(one)}: {key}"
    return None


def main(model: str, work: str, kills: str, engine: str, adapter: str, algorithm: str) -> None:
    folder = Path(work)
    sections = sections_of(engine, adapter == "adapter", algorithm)
    config = task_settings(write_task(folder, model), model, **sections)
    longest = finish(*fork(config, folder / "undisturbed"))
    rng = random.Random(0)
    counts = dict.fromkeys(PARTS, 0)
    found, runs = None, 0
    while sum(counts.values()) < int(kills) and found is None:
        runs += 1
        disturbed = folder / f"disturbed-{runs}"
        for attempt in range(4):
            part = PARTS[(runs + attempt) % len(PARTS)]
            if kill_within(*fork(config, disturbed), part, rng.uniform(0, longest[part])):
                counts[part] += 1
        finish(*fork(config, disturbed))
        found = difference(folder / "undisturbed", disturbed)
    print(json.dumps({"kills": counts, "runs": runs, "difference": found}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
