"""Methods, section 10: kill -9 anywhere, then the same bits as the undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("engine", "adapter", "algorithm", "kills"),
    [
        ("auto", "full", "grpo", 20),
        ("generic", "adapter", "grpo", 4),
        ("auto", "full", "ppo", 6),
        ("auto", "full", "rft", 6),
        ("auto", "full", "grft", 6),
        ("auto", "full", "grft-tree", 3),
        ("auto", "full", "vineppo", 3),
        ("auto", "full", "rft-refresh", 6),
        ("generic", "adapter", "grpo-refresh", 4),
        ("auto", "full", "ppo-separate", 4),
        ("auto", "full", "dapo", 4),
        ("auto", "full", "reinforce", 3),
        ("auto", "full", "sft", 4),
    ],
)
def test_every_killed_run_ends_in_the_same_bits(
    tiny_model_folder, tmp_path, engine, adapter, algorithm, kills
):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.state.kill_and_resume",
            str(tiny_model_folder),
            str(tmp_path),
            str(kills),
            engine,
            adapter,
            algorithm,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    result = json.loads(done.stdout)
    assert result["difference"] is None, result
    assert sum(result["kills"].values()) >= kills
    if kills >= 20:
        assert all(count >= 3 for count in result["kills"].values()), result
