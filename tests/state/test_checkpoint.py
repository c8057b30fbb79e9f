"""Checkpoints: to the bit, whole or not there, kept as asked, and an error that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.errors import CheckpointError
from graft.state.checkpoint import (
    Checkpoint,
    Checkpoints,
    load_optimizer_tensors,
    load_parameters,
    optimizer_tensors,
    trainable_parameters,
)

WEIGHTS = {
    "a.weight": torch.tensor([[1.0, -0.0], [float("inf"), 1e-45]]),
    "b": torch.tensor([0.1, 0.2], dtype=torch.bfloat16),
}
MOMENTS = {"b|exp_avg": torch.tensor([1e-30], dtype=torch.float64), "b|step": torch.tensor(3.0)}


def store(tmp_path: Path, *, keep_last: int = 10, keep_best: int = 0) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep_last=keep_last, keep_best=keep_best)


def save(checkpoints: Checkpoints, number: int, *, score: float | None = None, value: float = 0.0) -> Path:
    return checkpoints.save(
        number, weights={"w": torch.full((3,), value)}, optimizer={}, state={"at": number}, score=score
    )


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_round_trip_to_the_bit(tmp_path):
    state = {"run": {"steps": {"train": 4}}, "offsets": {"metrics.jsonl": 123}}
    folder = store(tmp_path).save(4, weights=WEIGHTS, optimizer=MOMENTS, state=state, score=0.5)
    assert folder.name == "step-000004"
    assert sorted(p.name for p in folder.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    found = store(tmp_path).load_newest()
    assert found is not None
    for saved, read in ((WEIGHTS, found.weights), (MOMENTS, found.optimizer)):
        assert saved.keys() == read.keys()
        for name, tensor in saved.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert bits(read[name]) == bits(tensor)
    assert found.state == {"format": 1, "score": 0.5, **state}


def test_what_is_saved_does_not_change_with_the_model(tmp_path):
    weights = {"w": torch.ones(2).requires_grad_(), "view": torch.arange(6.0).view(2, 3).T}
    store(tmp_path).save(1, weights=weights, optimizer={}, state={}, score=None)
    with torch.no_grad():
        weights["w"].zero_()
    found = store(tmp_path).load(1)
    assert found.weights["w"].tolist() == [1.0, 1.0]
    assert found.weights["view"].tolist() == [
        [0.0, 3.0],
        [1.0, 4.0],
        [2.0, 5.0],
    ]  # transposed, not its storage


def test_nothing_there(tmp_path):
    checkpoints = store(tmp_path)
    assert checkpoints.steps() == []
    assert checkpoints.load_newest() is None
    with pytest.raises(CheckpointError, match="step-000003"):
        checkpoints.load(3)


def test_the_newest_by_number_not_by_time_or_by_name(tmp_path):
    checkpoints = store(tmp_path)
    for number in (1_000_000, 9, 10):
        save(checkpoints, number)
    assert checkpoints.steps() == [9, 10, 1_000_000]
    newest = checkpoints.load_newest()
    assert newest is not None
    assert newest.state["at"] == 1_000_000


def test_unfinished_folders_are_never_taken_for_checkpoints(tmp_path):
    """A reader leaves them alone: they may be those of a run that is writing at this moment. The next `save` of the
    run, which is the only writer, removes what a killed process left."""
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    unfinished = checkpoints.folder / ".writing-000002-123"
    unfinished.mkdir()
    (unfinished / "weights.safetensors").write_bytes(b"half")
    (checkpoints.folder / ".writing-anchor-123").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    newest = checkpoints.load_newest()
    assert newest is not None
    assert (newest.number, newest.state["at"]) == (1, 1)
    assert (unfinished / "weights.safetensors").read_bytes() == b"half"
    assert (checkpoints.folder / ".writing-anchor-123").exists()
    save(checkpoints, 2)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-000001", "step-000002"]


class OvertakenReader(Checkpoints):
    """While it reads, the run that is going on writes the next checkpoint and removes this one."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__(folder, keep_last=1, keep_best=0)
        self.times = times

    def load(self, number: int) -> Checkpoint:
        if self.times:
            self.times -= 1
            save(Checkpoints(self.folder, keep_last=1, keep_best=0), number + 1)
        return super().load(number)


def test_a_reader_that_is_overtaken_by_the_run_reads_the_next_one(tmp_path):
    writer = store(tmp_path, keep_last=1)
    save(writer, 1)
    found = OvertakenReader(writer.folder, times=2).load_newest()
    assert found is not None
    assert (found.number, found.state["at"]) == (3, 3)


def test_other_peoples_folders_are_left_alone(tmp_path):
    checkpoints = store(tmp_path, keep_last=1)
    save(checkpoints, 1)
    (checkpoints.folder / "step-000001.bak").mkdir()
    (checkpoints.folder / "step-by-step").mkdir()
    (checkpoints.folder / "step-000009").write_text("a file")
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]
    assert (checkpoints.folder / "step-000001.bak").is_dir()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_says_what_to_do(tmp_path, name, damage):
    checkpoints = store(tmp_path)
    for number in (1, 2):
        checkpoints.save(number, weights=WEIGHTS, optimizer=MOMENTS, state={}, score=None)
    damage(checkpoints.folder / "step-000002" / name)
    with pytest.raises(
        CheckpointError, match=r"step-000002: damaged .* Remove this folder .*there are \[1\]"
    ):
        checkpoints.load_newest()
    assert checkpoints.load(1).weights.keys() == WEIGHTS.keys()


def test_the_only_one_is_damaged(tmp_path):
    checkpoints = store(tmp_path)
    truncate(save(checkpoints, 2) / "weights.safetensors")
    with pytest.raises(CheckpointError, match="there is no other, the run starts anew"):
        checkpoints.load_newest()


def test_another_format_is_named(tmp_path):
    checkpoints = store(tmp_path)
    state = save(checkpoints, 2) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        checkpoints.load_newest()


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (9, 0, [1, 2, 3, 4, 5, 6]),
        (1, 1, [2, 6]),
        (1, 2, [2, 4, 6]),  # 4 and 1 have the same score: the newer one
        (1, 3, [1, 2, 4, 6]),
        (1, 9, [1, 2, 4, 5, 6]),  # 3 was never measured
        (2, 1, [2, 5, 6]),
    ],
)
def test_pruning_by_hand(tmp_path, keep_last, keep_best, kept):
    checkpoints = store(tmp_path, keep_last=keep_last, keep_best=keep_best)
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.5, 5: 0.1, 6: 0.2}
    for number, score in scores.items():
        save(checkpoints, number, score=score)
        assert number in checkpoints.steps()
    assert checkpoints.steps() == kept
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [f"step-{n:06d}" for n in kept]


def test_a_damaged_older_checkpoint_does_not_stop_a_save(tmp_path):
    checkpoints = store(tmp_path, keep_last=2, keep_best=1)
    (save(checkpoints, 1, score=0.5) / "state.json").write_text("{")
    save(checkpoints, 2, score=0.4)
    save(checkpoints, 3, score=0.3)
    save(checkpoints, 4, score=0.2)
    assert checkpoints.steps() == [2, 3, 4]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from graft.errors import ResourceError
from graft.state.checkpoint import Checkpoints
from graft.state.files import write_atomically
checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=1, keep_best=0)
large, small = {"w": torch.zeros(50_000)}, {"w": torch.zeros(5)}
def save(weights=small, optimizer=small, state={}):
    checkpoints.save(2, weights=weights, optimizer=optimizer, state=state, score=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for attempt in (
    lambda: save(weights=large),
    lambda: save(optimizer=large),
    lambda: save(state={"long": "x" * 50_000}),
    lambda: checkpoints.save_anchor(large),
    lambda: write_atomically(checkpoints.folder / "note.txt", "x" * 50_000),
):
    try:
        attempt()
    except ResourceError as error:
        print(error)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """No file of a process can grow beyond 20 kB."""
    checkpoints = store(tmp_path)
    save(checkpoints, 1, value=5.0)
    checkpoints.save_anchor({"w": torch.tensor([8.0])})
    (checkpoints.folder / "note.txt").write_text("before")
    before = sorted(p.name for p in checkpoints.folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(checkpoints.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 5
    for line, name in zip(said, [*["step-000002"] * 3, "anchor.safetensors", "note.txt"], strict=True):
        assert line.startswith("the disk is full: ")
        assert name in line
        assert "What was there before is intact" in line
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == before
    assert checkpoints.load(1).weights["w"].tolist() == [5.0] * 3
    assert checkpoints.load_anchor()["w"].tolist() == [8.0]
    assert (checkpoints.folder / "note.txt").read_text() == "before"


def test_the_anchor(tmp_path):
    checkpoints = store(tmp_path, keep_last=1)
    with pytest.raises(CheckpointError, match=r"anchor\.safetensors: the weights that KL is measured from"):
        checkpoints.load_anchor()
    checkpoints.save_anchor(WEIGHTS)
    for number in (1, 2, 3):
        save(checkpoints, number)
    assert checkpoints.steps() == [3]  # pruning leaves the anchor
    assert {n: bits(t) for n, t in checkpoints.load_anchor().items()} == {
        n: bits(t) for n, t in WEIGHTS.items()
    }
    checkpoints.save_anchor({"w": torch.ones(1)})
    assert checkpoints.load_anchor().keys() == {"w"}
    truncate(checkpoints.folder / "anchor.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_anchor()


def make_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    model[0].weight.requires_grad_(False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        torch.manual_seed(number)
        model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1, weight_decay=0.01)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    model = make_model()
    optimizer = adam(model)
    train(model, optimizer, range(3))
    names = trainable_parameters(model)
    assert list(names) == ["0.bias", "2.weight", "2.bias"]
    store(tmp_path).save(
        3, weights=names, optimizer=optimizer_tensors(optimizer, names), state={}, score=None
    )
    train(model, optimizer, range(3, 7))

    resumed = make_model(seed=1)
    resumed[0].weight.data.copy_(model[0].weight)  # frozen: not in the checkpoint
    found = store(tmp_path).load(3)
    load_parameters(resumed, found.weights)
    other = adam(resumed)
    load_optimizer_tensors(other, trainable_parameters(resumed), found.optimizer)
    assert {entry.rpartition("|")[2] for entry in found.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    train(resumed, other, range(3, 7))
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    fresh = make_model()
    load_parameters(fresh, found.weights)
    train(fresh, adam(fresh), range(3, 7))
    assert not torch.equal(fresh[2].weight, model[2].weight)  # the moments do matter


def test_an_optimizer_that_has_not_stepped(tmp_path):
    model = make_model()
    names = trainable_parameters(model)
    assert optimizer_tensors(adam(model), names) == {}
    store(tmp_path).save(0, weights=names, optimizer={}, state={}, score=None)
    optimizer = adam(model)
    load_optimizer_tensors(optimizer, names, store(tmp_path).load(0).optimizer)
    train(model, optimizer, range(1))


def test_weights_that_do_not_fit_are_refused():
    model = make_model()
    own = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    renamed = {name.replace("2.bias", "3.bias"): tensor for name, tensor in own.items()}
    with pytest.raises(
        CheckpointError, match=r"missing \['2\.bias'\], unknown \['3\.bias'\].*model\.adapter"
    ):
        load_parameters(model, renamed)
    with pytest.raises(CheckpointError, match=r"'2\.bias' has shape \(5,\), the model's \(2,\)"):
        load_parameters(model, {**own, "2.bias": torch.zeros(5)})


def test_shared_weights_stand_once():
    model: Any = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert list(trainable_parameters(model)) == ["0.weight"]
