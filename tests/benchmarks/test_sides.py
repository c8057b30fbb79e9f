"""graft's and transformers' sides on a tiny model, in this process. What they measure is not looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine_side, step_graft
from graft.kernels import load_kernels


@pytest.mark.parametrize("side", ["hf", "generic", "fast"])
def test_engine_side_makes_exactly_the_tokens_asked_for(side: str, tiny_model_folder: Path) -> None:
    if side == "fast" and isinstance(load_kernels(), str):
        pytest.skip("no native kernels on this machine")
    about, measure = engine_side.prepare(
        {
            "side": side,
            "dtype": "fp32",
            "model": str(tiny_model_folder),
            "prompts": 2,
            "samples": 3,
            "new_tokens": 5,
        }
    )
    record = measure("generate")
    assert record["tokens"] == 2 * 3 * 5
    assert record["seconds"] > 0
    assert len(about["prompt_tokens"]) == 2
    assert {"kernels", "threads", "versions"} <= set(about)


def test_graft_step_trains_on_the_groups_with_signal(tiny_model_folder: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(tiny_model_folder),
        "dtype": "fp32",
        "prompts": 4,
        "samples": 2,
        "new_tokens": 5,
        "microbatch_tokens": 512,
        "gradient_checkpointing": False,
    }
    about, measure = step_graft.prepare(settings)
    full, sparse = measure("full"), measure("sparse")
    assert len(about["prompt_tokens"]) == 4
    assert full["tokens"] == sparse["tokens"] == 4 * 2 * 5
    assert (full["groups_with_signal"], sparse["groups_with_signal"]) == (4, 1)
    assert (full["tokens_trained"], sparse["tokens_trained"]) == (40, 10)
    assert set(full["parts"]) == set(step_graft.PARTS)
