"""Building the parts of a run: what is refused before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MistralConfig

from graft.algorithm_parts import KL, AdaptiveKL, Value
from graft.algorithm_settings import GRPO, PPO, RFT, PolicyKL
from graft.assemble import algorithm_notes, assemble, refuse_short_window
from graft.config_file import check_config
from graft.errors import DataError, ModelError
from tests.tasks import task_settings, write_task


@pytest.mark.parametrize(("window", "refused"), [(99, True), (100, False), (None, False)])
def test_a_window_shorter_than_the_longest_path_is_refused(window, refused):
    config = check_config(
        {
            "run": "r",
            "model": {"name": "m"},
            "data": {"source": "a.jsonl", "max_prompt_tokens": 60},
            "grader": {"type": "number"},
            "sampling": {"max_new_tokens": 40},
            "training": {"steps": 1},
        },
        where="test",
    )
    policy = SimpleNamespace(plain=SimpleNamespace(config=MistralConfig(sliding_window=window)))
    if refused:
        with pytest.raises(ModelError, match="see 99 tokens back, but a path may have 100"):
            refuse_short_window(config, policy)  # pyright: ignore[reportArgumentType] - a double
    else:
        refuse_short_window(config, policy)  # pyright: ignore[reportArgumentType]


def child_processes() -> set[str]:
    threads = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {child for thread in threads for child in (thread / "children").read_text().split()}


def test_what_a_grader_holds_is_closed_when_the_model_is_missing(tmp_path):
    """The sandbox of a `python` grader has a process of its own as soon as it is open."""
    write_task(tmp_path, "nonesuch")
    settings = task_settings(tmp_path, "nonesuch", grading={"sandbox": {"unsafe": True}})
    settings["grader"] = {"type": "python", "source": "def grade(sample, item):\n    return 1.0\n"}
    before = child_processes()
    with pytest.raises(ModelError, match="nonesuch"):
        assemble(check_config(settings, where="test"))
    assert child_processes() == before


def test_rows_without_what_the_judge_shall_see_are_refused_before_the_model_is_loaded(tmp_path):
    write_task(tmp_path, "nonesuch")
    critic = {"type": "judge", "model": "j", "reference_key": "answr"}
    settings = task_settings(tmp_path, "nonesuch", algorithm={"name": "rft", "critic": critic})
    said = (
        r"critic.reference_key = 'answr': \d+ of \d+ rows .* the first at .*jsonl:\d+. Did you mean 'answer'"
    )
    with pytest.raises(DataError, match=said):
        assemble(check_config(settings, where="test"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (GRPO(), []),
        (RFT(kl=PolicyKL(of="rollout")), ["algorithm.kl.of = 'rollout'"]),
        (RFT(value=Value(warmup_steps=3)), ["algorithm.value.warmup_steps = 3"]),
        (RFT(kl=PolicyKL(anchor="rollout")), ["with one update a batch trains nothing"]),
        (RFT(kl=PolicyKL(anchor="rollout"), updates_per_batch=2), []),
        (GRPO(kl=KL(anchor="rollout", coefficient=0.1)), ["with one update a batch trains nothing"]),
        (GRPO(kl=KL(anchor="rollout", coefficient=0.1), minibatches=2), []),
        (
            RFT(kl=PolicyKL(anchor="rollout"), refresh_every=2),
            [],
        ),  # the second batch's anchor is an older policy
        (PPO(kl=AdaptiveKL(coefficient=0.1, estimator="exact")), ["algorithm.kl.estimator = 'exact'"]),
    ],
)
def test_settings_that_may_surprise_are_noted(settings: Any, said: list[str]):
    notes = algorithm_notes(settings)
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))
