"""Bodies of OpenAI's call that creates a fine-tuning job, in which a grader may stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.data.sources import parse_json


def job_settings(data: Any) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """What leads to the reinforcement settings of a job's body, or of a part of one, and these; None if it is none."""
    steps: tuple[str, ...] = ()
    for key in ("method", "reinforcement"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data, steps = data[key], (*steps, key)
    is_job = isinstance(data, dict) and ("reinforcement" in steps or isinstance(data.get("grader"), dict))
    return (steps, data) if is_job else None


def read_job(path: Path) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """`job_settings` of a JSON file; None, too, where it cannot be read."""
    try:
        data = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (OSError, ValueError):
        return None
    return job_settings(data)
