"""Ctrl-C wherever a run looks for it, then resume: the bits of the run that nobody disturbed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graft.assemble import assemble
from graft.config_file import check_config, dump_config
from graft.interrupt import Interrupt, Interrupted
from graft.loop import Loop
from graft.report.run_folder import RunFolder
from graft.report.terminal import Terminal
from tests.state.kill_and_resume import difference
from tests.tasks import task_settings, write_task

EVERY = 7
"""Of the moments at which a run looks for Ctrl-C, one in so many is tried."""


class InterruptAt(Interrupt):
    """A signal that comes just before the run looks for one for the n-th time, the first being 0."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.place, self.looks = place, 0

    def check(self) -> None:
        self.looks += 1
        if self.looks - 1 == self.place:
            raise Interrupted(2)


def go(settings: dict[str, Any], run: Path, place: int | None = None) -> int:
    """Start or resume a run; how often it looked for a signal until it ended or was stopped."""
    config = check_config({**settings, "run": str(run)}, where="test")
    exists = (run / "config.toml").exists()
    with (
        closing(assemble(config)) as parts,
        RunFolder.open(run) if exists else RunFolder.create(run, dump_config(config)) as folder,
        Terminal() as terminal,
        InterruptAt(place) as interrupt,
    ):
        assert isinstance(interrupt, InterruptAt)
        loop = Loop(parts, folder, terminal, interrupt)
        loop.restore()
        try:
            loop.run()
        except Interrupted:
            loop.save()
        return interrupt.looks


SETTINGS: dict[str, dict[str, Any]] = {
    "a warm start that is validated": {
        "algorithm": {"name": "reinforce"},
        "training": {"steps": 1},
        "warm_start": {"worked": "grader.py:worked", "steps": 2, "rows_per_step": 4, "validate_every": 1},
    },
    "several updates from older weights": {
        "algorithm": {"name": "grpo", "updates_per_batch": 2, "minibatches": 2, "refresh_every": 2},
        "training": {"steps": 3},
        "evaluation": {"every": 1},
        "report": {"kl_every": 2},
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wherever_it_is_stopped_it_ends_in_the_same_bits(name, tmp_path, tiny_model_folder):
    write_task(tmp_path, tiny_model_folder)
    settings = task_settings(
        tmp_path, tiny_model_folder, **{"sampling": {"max_new_tokens": 4}, **SETTINGS[name]}
    )
    settings["training"]["microbatch_tokens"] = 64
    looks = go(settings, tmp_path / "undisturbed")
    for place in range(0, looks, EVERY):
        stopped = tmp_path / f"stopped-{place}"
        go(settings, stopped, place)
        go(settings, stopped)
        found = difference(tmp_path / "undisturbed", stopped)
        assert found is None, f"stopped at look {place}: {found}"
