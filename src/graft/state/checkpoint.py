"""Checkpoints: a folder each, complete or not there at all.

    checkpoints/step-000040/weights.safetensors     trainable parameters, in the optimiser's own precision
                            optimizer.safetensors   moments and step counts
                            values.safetensors      the value model, where there is one
                            rollout.safetensors     both as they sample, where that is an older state of them
                            state.json              where the run stands; file offsets; machine fingerprint

A checkpoint is written under a temporary name, flushed to disk and renamed, so a folder called `step-…` is always
whole. Restarting from it and cutting the run's files back to its offsets gives the undisturbed run.
Any process may read while a run is going on; what an earlier process left unfinished is removed by `save` alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graft.errors import CheckpointError
from graft.state.files import disk_errors, sync_file, sync_folder

PREFIX = "step-"
ANCHOR = "anchor.safetensors"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back."""

    number: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    values: Mapping[str, Tensor]
    """Parameters of the value model; empty where there is none."""

    rollout: Mapping[str, Tensor]
    """What trains, by name, as it is sampled with; empty where that is the same."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        """
        Args:
            folder: the run's `checkpoints/`.
            keep_last: newest ones kept.
            keep_best: ones kept for their held-out score, besides.
        """
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def steps(self) -> list[int]:
        """Numbers of the checkpoints that are there, rising."""
        folders = (p.name.removeprefix(PREFIX) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir())
        return sorted(int(number) for number in folders if number.isdecimal())

    def save(
        self,
        number: int,
        *,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        score: float | None,
        values: Mapping[str, Tensor] | None = None,
        rollout: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write a checkpoint and remove those that need not be kept.

        Args:
            number: orders the checkpoints; counts warm-start and training steps together.
            weights: trainable parameters by name.
            optimizer: see `optimizer_tensors`.
            state: JSON: where the run stands.
            score: latest held-out score, for `keep_best`.
            values: parameters of the value model, where there is one.
            rollout: weights that sample, where they are older than those in training.

        Raises:
            ResourceError: the disk is full or refuses; earlier checkpoints are intact.
        """
        final = self.folder / f"{PREFIX}{number:06d}"
        temporary = self.folder / f".writing-{number:06d}-{os.getpid()}"
        with disk_errors(str(final)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            try:
                temporary.mkdir()
                _save_tensors(weights, temporary / "weights.safetensors")
                _save_tensors(optimizer, temporary / "optimizer.safetensors")
                for name, tensors in (("values", values), ("rollout", rollout)):
                    if tensors:
                        _save_tensors(tensors, temporary / f"{name}.safetensors")
                record = {"format": FORMAT, "score": score, **state}
                (temporary / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
                for file in temporary.iterdir():
                    sync_file(file)
                temporary.rename(final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(self.folder)
            self._prune()
        return final

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none yet. Touches nothing.

        Raises:
            CheckpointError: its files are damaged or of another format.
        """
        while steps := self.steps():
            try:
                return self.load(steps[-1])
            except CheckpointError:
                if self.steps()[-1:] <= steps[-1:]:
                    raise  # else a run that is going on has put a newer one in its place
        return None

    def load(self, number: int) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            CheckpointError: it is not there, damaged, or of another format.
        """
        folder = self.folder / f"{PREFIX}{number:06d}"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state.get("format") != FORMAT:
                raise CheckpointError(
                    f"{folder}: format {state.get('format')}; this version reads format {FORMAT}"
                )
            values, rollout = folder / "values.safetensors", folder / "rollout.safetensors"
            return Checkpoint(
                number=number,
                weights=load_file(folder / "weights.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
                state=state,
                values=load_file(values) if values.exists() else {},
                rollout=load_file(rollout) if rollout.exists() else {},
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: damaged checkpoint ({error}). Remove this folder to go on from the one before it"
                f"{self._alternatives(number)}."
            ) from error

    def save_anchor(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights that KL is measured from, for resuming. Raises ResourceError: the disk is full."""
        temporary = self.folder / f".writing-anchor-{os.getpid()}"
        with disk_errors(str(self.folder / ANCHOR)):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                _save_tensors(weights, temporary)
                sync_file(temporary)
                temporary.replace(self.folder / ANCHOR)
            finally:
                with suppress(OSError):  # the first error says more
                    temporary.unlink(missing_ok=True)
            sync_folder(self.folder)

    def load_anchor(self) -> Mapping[str, Tensor]:
        """What `save_anchor` kept. Raises CheckpointError: it is gone or damaged."""
        try:
            return load_file(self.folder / ANCHOR)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder / ANCHOR}: the weights that KL is measured from cannot be read ({error})"
            ) from error

    def _alternatives(self, number: int) -> str:
        others = [s for s in self.steps() if s != number]
        return f" (there are {others})" if others else "; there is no other, the run starts anew"

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(".writing-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _prune(self) -> None:
        steps = self.steps()
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            scored = [(score, step) for step in steps if (score := self._score(step)) is not None]
            keep |= {step for _, step in sorted(scored, reverse=True)[: self.keep_best]}
        for step in set(steps) - keep:
            path = self.folder / f"{PREFIX}{step:06d}"
            doomed = (
                self.folder / f".writing-{step:06d}-old"
            )  # so that a half-removed one is never taken for whole
            path.rename(doomed)
            shutil.rmtree(doomed)

    def _score(self, step: int) -> float | None:
        path = self.folder / f"{PREFIX}{step:06d}" / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["score"]
        except (OSError, ValueError, KeyError):  # damaged: said when it is loaded
            return None


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name; a parameter shared by two modules stands once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the model.

    Raises:
        CheckpointError: names or shapes differ from the model's trainable parameters.
    """
    own = trainable_parameters(model)
    if set(own) != set(weights):
        missing, unknown = sorted(set(own) - set(weights))[:3], sorted(set(weights) - set(own))[:3]
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}. "
            "Was model.name or model.adapter changed?"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                shape, wanted = tuple(weights[name].shape), tuple(parameter.shape)
                raise CheckpointError(f"checkpoint weight '{name}' has shape {shape}, the model's {wanted}")
            parameter.copy_(weights[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `<parameter>|<entry>`; `names` in the order it holds its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}|{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in zip(names, parameters, strict=True)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    parameters = dict(
        zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True)
    )
    for key, value in tensors.items():
        name, _, entry = key.rpartition("|")
        parameter = parameters[name]
        held = optimizer.state[parameter].get(entry)
        if held is not None:
            held.copy_(value)
        else:
            optimizer.state[parameter][entry] = (
                value if entry == "step" else value.to(parameter.device)
            ).clone()
