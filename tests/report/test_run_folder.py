"""The run folder: what is written comes back, nothing is ever half there, and failures say what to do."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import CheckpointError, ConfigError, DataError, ResourceError
from graft.report.run_folder import RunFolder, refuse_unwritable, to_plain

SOURCE = Path(__file__).parents[2] / "src"
CONFIG = 'run = "x"\n\n[model]\nname = "tiny"\n'

records = st.fixed_dictionaries(
    {"step": st.integers(1, 10**6), "stage": st.just("train")},
    optional={
        "reward_mean": st.floats(),
        "gradient_norm": st.floats(),
        "tokens_sampled": st.integers(0, 2**53),
    },
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", CONFIG) as made:
        yield made


def step_record(step: int) -> dict[str, object]:
    return {"step": step, "stage": "train", "reward_mean": step / 8}


def same(left: object, right: object) -> bool:
    """Equal to the bit, NaN included."""
    return json.dumps(to_plain(left)) == json.dumps(to_plain(right))


def test_a_new_folder_holds_the_config_and_no_records(folder: RunFolder):
    assert folder.read_config() == CONFIG
    assert folder.read_settings()["model"] == {"name": "tiny"}
    assert folder.read_metrics() == []
    assert list(folder.read_trees()) == []
    assert folder.read_summary() == {}
    assert folder.offsets() == {"metrics.jsonl": 0, "trees.jsonl": 0}


@pytest.mark.parametrize(
    "name", ["config.toml", "metrics.jsonl", "trees.jsonl", "summary.json", "checkpoints"]
)
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"already holds a run .*graft resume .*another `run`"):
        RunFolder.create(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_with_other_files_is_taken(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path, CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="cannot make the run folder"):
            RunFolder.create(path, CONFIG)


LONG = "x" * 300
"""More than a name may have on any common system."""


@pytest.mark.parametrize("name", [LONG, f"{LONG}/run", "/proc/run"])
def test_a_path_that_the_system_refuses(tmp_path: Path, name: str):
    """`tmp_path / "/proc/run"` is `/proc/run`, where not even root makes a folder."""
    for refuse in (refuse_unwritable, lambda path: RunFolder.create(path, CONFIG)):
        with pytest.raises(ConfigError, match=r"cannot make the run folder.*: .*Give another `run`"):
            refuse(tmp_path / name)
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.open(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Simulated: to root nothing is forbidden."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("graft.report.run_folder.tempfile.TemporaryFile", refuse)
        with pytest.raises(ConfigError, match=r"run.*write into it: Read-only file system\. Give another"):
            RunFolder.create(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []
    refuse_unwritable(tmp_path / "runs" / "first")
    assert list(tmp_path.iterdir()) == []


def test_open_wants_a_run(tmp_path: Path, folder: RunFolder):
    assert RunFolder.open(folder.path).read_config() == CONFIG
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.open(tmp_path)


@settings(max_examples=20)
@given(st.lists(records, max_size=6))
def test_metrics_come_back_to_the_bit(written):
    with tempfile.TemporaryDirectory() as path, RunFolder.create(Path(path) / "run", CONFIG) as folder:
        for record in written:
            folder.append_metrics(record)
        assert same(folder.read_metrics(), written)
        for line in (folder.path / "metrics.jsonl").read_text(encoding="ascii").splitlines():
            json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


@settings(max_examples=20)
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=4))
def test_trees_come_back_whatever_the_text(written):
    with tempfile.TemporaryDirectory() as path, RunFolder.create(Path(path) / "run", CONFIG) as folder:
        for record in written:
            folder.append_tree(record)
        assert same(list(folder.read_trees()), written)


def test_values_that_are_not_finite_are_text_in_the_file_and_numbers_when_read(folder: RunFolder):
    folder.append_metrics({"step": 1, "stage": "train", "loss": math.nan, "gradient_norm": math.inf})
    line = (folder.path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "stage": "train", "loss": "NaN", "gradient_norm": "Infinity"}\n'
    (record,) = folder.read_metrics()
    assert math.isnan(record["loss"])
    assert record["gradient_norm"] == math.inf


def test_an_undeclared_metric_is_refused_and_nothing_is_written(folder: RunFolder):
    with pytest.raises(ValueError, match="not declared"):
        folder.append_metrics({"step": 1, "stage": "train", "my_number": 1.0})
    assert folder.offsets()["metrics.jsonl"] == 0


@settings(max_examples=3)
@given(st.lists(records, min_size=1, max_size=2), st.lists(records, min_size=1, max_size=1), records)
def test_cut_back_after_a_kill_at_any_byte(before, after, extra):
    with tempfile.TemporaryDirectory() as path, RunFolder.create(Path(path) / "run", CONFIG) as folder:
        for record in before:
            folder.append_metrics(record)
        offsets = folder.offsets()
        for record in after:
            folder.append_metrics(record)
        folder.close()
        whole = (folder.path / "metrics.jsonl").read_bytes()
        for size in range(len(whole) + 1):
            (folder.path / "metrics.jsonl").write_bytes(whole[:size])
            if size < offsets["metrics.jsonl"]:
                with pytest.raises(CheckpointError, match="the file was cut or replaced"):
                    folder.cut_back(offsets)
                assert (folder.path / "metrics.jsonl").read_bytes() == whole[:size]
            else:
                folder.cut_back(offsets)
                assert same(folder.read_metrics(), before)
        folder.append_metrics(extra)
        assert same(folder.read_metrics(), [*before, extra])


def test_cut_back_to_every_byte_takes_only_ends_of_lines(folder: RunFolder):
    for step in (1, 2, 3):
        folder.append_metrics(step_record(step))
    folder.close()
    file = folder.path / "metrics.jsonl"
    whole = file.read_bytes()
    ends = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]
    for offset in range(len(whole) + 1):
        file.write_bytes(whole)
        offsets = {"metrics.jsonl": offset, "trees.jsonl": 0}
        if offset in ends:
            folder.cut_back(offsets)
            assert file.read_bytes() == whole[:offset]
        else:
            with pytest.raises(CheckpointError, match="not the end of a line"):
                folder.cut_back(offsets)
            assert file.read_bytes() == whole


def test_cut_back_cuts_both_files_or_none(folder: RunFolder):
    folder.append_metrics(step_record(1))
    folder.append_tree({"step": 1})
    offsets = folder.offsets()
    folder.append_metrics(step_record(2))
    (folder.path / "trees.jsonl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"trees\.jsonl"):
        folder.cut_back(offsets)
    assert len(folder.read_metrics()) == 2


@pytest.mark.parametrize(
    "offsets", [{}, {"metrics.jsonl": 0}, {"metrics.jsonl": 0, "trees.jsonl": 0, "x": 0}]
)
def test_offsets_that_name_other_files_are_refused(folder: RunFolder, offsets):
    with pytest.raises(CheckpointError, match="want"):
        folder.cut_back(offsets)


def test_writing_goes_on_after_cut_back(folder: RunFolder):
    folder.append_metrics(step_record(1))
    offsets = folder.offsets()
    folder.append_metrics(step_record(2))
    folder.cut_back(offsets)
    folder.append_metrics(step_record(3))
    assert [record["step"] for record in folder.read_metrics()] == [1, 3]


def test_an_unfinished_last_line_is_not_read_and_not_written_behind(folder: RunFolder):
    folder.append_metrics(step_record(1))
    folder.close()
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "sta')
    assert [record["step"] for record in folder.read_metrics()] == [1]
    with pytest.raises(DataError, match="unfinished"):
        folder.append_metrics(step_record(2))


@pytest.mark.parametrize("damage", [b"{]\n", b"\xff\xfe\n", b"[1]\n", b"\n", b"[" * 100_000 + b"\n"])
def test_other_damage_is_reported_with_its_line(folder: RunFolder, damage: bytes):
    folder.append_metrics(step_record(1))
    folder.close()
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(damage + b'{"step": 3, "stage": "train"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: "):
        folder.read_metrics()


def test_the_summary_is_replaced_whole(folder: RunFolder):
    folder.write_summary({"status": "running", "steps": np.int64(3)})
    folder.write_summary({"status": "finished"})
    assert folder.read_summary() == {"status": "finished"}
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "summary.json",
    ]


def test_a_summary_without_json_form_leaves_the_old_one(folder: RunFolder):
    folder.write_summary({"status": "running"})
    with pytest.raises(TypeError, match="object has no JSON form"):
        folder.write_summary({"status": object()})
    assert folder.read_summary() == {"status": "running"}


def test_plain_values_from_numpy():
    assert to_plain({1: np.float32(0.5), "a": np.array([1, 2]), "b": (np.bool_(True), None)}) == {
        "1": 0.5,
        "a": [1, 2],
        "b": [True, None],
    }


def under_file_size_limit(code: str, path: Path, limit: int) -> str:
    """Run code in a process whose files cannot grow beyond `limit` bytes: a refusal by the kernel."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        preexec_fn=set_limit,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


FILL = """
import sys
from graft.errors import ResourceError
from graft.report.run_folder import RunFolder
folder = RunFolder.create(sys.argv[1], "")
step = 0
try:
    while True:
        folder.append_metrics({"step": step + 1, "stage": "train", "reward_mean": 0.5})
        step += 1
except ResourceError as error:
    print(step, error)
    try:
        folder.append_metrics({"step": step + 1, "stage": "train", "reward_mean": 0.5})
    except ResourceError:
        print("again")
"""


def test_when_the_disk_is_full_all_lines_before_stay_whole(tmp_path: Path):
    limit = 1000
    first, second = under_file_size_limit(FILL, tmp_path / "run", limit).splitlines()
    written, message = first.split(" ", 1)
    records = RunFolder(tmp_path / "run").read_metrics()
    assert [record["step"] for record in records] == list(range(1, int(written) + 1))
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert size % (size // len(records)) < 60 < limit
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert "Free some space" in message
    assert "graft resume" in message
    assert second == "again"


SUMMARY = """
import sys
from graft.errors import ResourceError
from graft.report.run_folder import RunFolder
folder = RunFolder.create(sys.argv[1], "")
folder.write_summary({"status": "running"})
try:
    folder.write_summary({"status": "x" * 5000})
except ResourceError:
    print("refused")
"""


def test_when_the_disk_is_full_the_old_summary_stays(tmp_path: Path):
    assert under_file_size_limit(SUMMARY, tmp_path / "run", 1000) == "refused\n"
    assert RunFolder(tmp_path / "run").read_summary() == {"status": "running"}
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_on_the_device(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    (folder.path / "metrics.jsonl").unlink()
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with folder, pytest.raises(ResourceError, match=os.strerror(errno.ENOSPC)):
        folder.append_metrics(step_record(1))


def test_report_imports_no_torch():
    modules = "graft.report.html, graft.report.terminal, graft.report.tensorboard"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)})
    assert done.returncode == 0
