"""The folder of a comparison on disk; whole comparisons are in `tests/cli/test_compare.py`."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from graft.comparison.entrants import Entry
from graft.comparison.folder import ComparisonFolder, comparable, make_run
from graft.config_file import check_config
from graft.errors import ConfigError, DataError


def entry(run: Path, **sections: Any) -> Entry:
    settings = {
        "run": str(run),
        "model": {"name": "m"},
        "data": {"source": "rows.jsonl", "held_out": 4},
        "grader": {"type": "number"},
        "training": {"generated_tokens": 100},
        **sections,
    }
    return Entry("grpo", 0, check_config(settings, where="test"), ())


@pytest.fixture
def folder(tmp_path) -> ComparisonFolder:
    (tmp_path / "runs" / "grpo").mkdir(parents=True)
    return ComparisonFolder(tmp_path)


def test_a_result_comes_back_with_its_settings_wherever_the_folder_is_now(folder, tmp_path):
    own = entry(tmp_path / "a")
    assert folder.read_result(own) is None
    written = folder.write_result(own, {"seed": 0, "held_out": [0.5]})
    assert folder.read_result(entry(tmp_path / "b", base="elsewhere")) == written
    assert not {"run", "base"} & set(written["settings"])


def test_a_result_of_other_settings_is_refused_by_their_names(folder, tmp_path):
    folder.write_result(entry(tmp_path / "a"), {})
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 1e-06 and is 0\.1 now"):
        folder.read_result(entry(tmp_path / "a", optimizer={"learning_rate": 0.1}))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": 3}'])
def test_a_damaged_result_is_named(folder, tmp_path, text):
    own = entry(tmp_path / "a")
    folder.result(own.label, own.seed).write_text(text)
    with pytest.raises(DataError, match=r"seed-0\.json: not a result of a comparison .*Remove it"):
        folder.read_result(own)


def test_a_result_from_before_a_setting_existed_has_its_default(folder, tmp_path):
    own = entry(tmp_path / "a")
    stored = folder.write_result(own, {})
    del stored["settings"]["checkpoints"]
    folder.result(own.label, own.seed).write_text(json.dumps(stored))
    assert folder.read_result(own) == stored


def test_a_warm_start_is_shared_whatever_comes_behind_it(folder, tmp_path):
    """The algorithm may differ, the model may not."""
    warm = {"warm_start": {"worked": "key:worked", "steps": 2}}
    make_run(folder.warm_start(0), entry(tmp_path / "w", **warm).config, None)
    folder.refuse_changed(entry(tmp_path / "a", **warm, algorithm={"name": "dapo"}))
    with pytest.raises(ConfigError, match=r"warm-starts.*model\.name was 'm' and is 'n' now"):
        folder.refuse_changed(entry(tmp_path / "a", **warm, model={"name": "n"}))


def test_a_run_begins_with_the_files_of_its_warm_start(tmp_path):
    warm, run = tmp_path / "warm", tmp_path / "runs" / "grpo" / "seed-0"
    (warm / "checkpoints" / "step-000002").mkdir(parents=True)
    (warm / "checkpoints" / "step-000002" / "weights.safetensors").write_bytes(b"weights")
    (warm / "metrics.jsonl").write_text("{}\n")
    (run.parent / ".making-seed-0").mkdir(parents=True)  # left by a process that was killed
    (run.parent / ".making-seed-0" / "rubbish").touch()
    own = entry(run)
    make_run(run, own.config, warm)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.toml", "metrics.jsonl"]
    assert (run / "checkpoints" / "step-000002" / "weights.safetensors").read_bytes() == b"weights"
    (run / "metrics.jsonl").write_text("more\n")
    assert (warm / "metrics.jsonl").read_text() == "{}\n"
    assert [path.name for path in run.parent.iterdir()] == ["seed-0"]


def test_one_comparison_at_a_time(folder, tmp_path):
    """The lock is held while the block runs, also by a process that has inherited it, and free afterwards."""

    def taken() -> bool:
        other = os.open(tmp_path / ".lock", os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(other)
        return False

    with folder.locked(print) as lock:
        assert taken()
        inherited = os.dup(lock)
    assert taken()
    os.close(inherited)
    assert not taken()


def test_settings_are_compared_without_the_places_of_files(tmp_path):
    assert comparable(entry(tmp_path / "a").config) == comparable(entry(tmp_path / "b", base="c").config)
