"""A small task on disk for a tiny model: rows, functions that grade, criticise and work out, and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomlkit

ROWS = [{"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(12)]

CODE = """
def reward(completion, item):
    return sum(map(ord, completion)) % 7 / 3


def parity(completion, item):
    return sum(map(ord, completion)) % 2


def critic(chain):
    scores = [sum(map(ord, text)) % 11 for text in chain.thoughts]
    return {"thoughts": scores, "progress": sorted(scores)}


def coarse(chain):
    scores = [sum(map(ord, text)) % 2 for text in chain.thoughts]
    return {"thoughts": scores, "progress": [5] * len(scores)}


def worked(item):
    return f"the answer is {item['answer']}"
"""

DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"source": "rows.jsonl", "held_out": 4},
    "grader": {"type": "function", "function": "grader.py:reward", "timeout_s": 5},
    "algorithm": {"group_size": 2},
    "sampling": {"max_new_tokens": 6},
    "training": {"prompts_per_step": 2, "steps": 2},
    "optimizer": {"learning_rate": 1e-2},
}


def task_settings(folder: Path, model: Path | str, /, **sections: Any) -> dict[str, Any]:
    """Settings of a run that takes well under a second; keys of `sections` are added to the sections' own, and those
    that are None taken out."""
    names = dict.fromkeys(["model", *DEFAULTS, *sections])
    merged = {name: {**DEFAULTS.get(name, {}), **sections.get(name, {})} for name in names}
    merged["model"] = {"name": str(model), **merged["model"]}
    kept = {name: {k: v for k, v in own.items() if v is not None} for name, own in merged.items()}
    return {"run": str(folder / "run"), "base": str(folder), **kept}


def write_task(folder: Path, model: Path | str, /, *, code: str = "", **sections: Any) -> Path:
    """The folder, with config.toml, rows.jsonl and grader.py in it.

    Args:
        folder: where.
        model: the policy.
        code: put behind that of `CODE`.
        **sections: as `task_settings`.
    """
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "grader.py").write_text(CODE + "\n" + code)
    (folder / "config.toml").write_text(tomlkit.dumps(task_settings(folder, model, **sections)))
    return folder
