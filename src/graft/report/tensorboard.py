"""The recorded metrics as TensorBoard event files, under the names of `METRICS` (extra `track`).

Each stage is a TensorBoard run of its own in `RUN/tensorboard/`, so that its steps count for themselves:

    warm_start/  train/  evaluation_before/  evaluation/

`evaluation_before` holds the model as it was given; with a warm start, step 0 of `evaluation` is the model
after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graft.errors import ConfigError
from graft.report.metrics import Moment, check_record, find_metric

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
"""Inside the run folder; `tensorboard --logdir RUN/tensorboard` shows it."""


class TensorBoardWriter:
    """Writes the records that also go to `metrics.jsonl`.

        with TensorBoardWriter(folder.path) as writer:
            writer.write({"step": 1, "stage": "train", "reward_mean": 0.25})

    On a resumed run earlier events of a stage are hidden from its first newly written step on, so that no
    step shows twice.
    """

    def __init__(self, run_folder: str | Path) -> None:
        """
        Raises:
            ConfigError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "report.tensorboard = true needs TensorBoard, which is not installed. "
                'Install it with: pip install "graft-rl[track]"'
            ) from error
        self._make_writer = SummaryWriter
        self._folder = Path(run_folder) / FOLDER
        self._writers: dict[str, SummaryWriter] = {}

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            ValueError: a name is not declared, see `metrics.check_record`.
        """
        checked = check_record(record)
        writer = self._writer(_run_name(checked), checked["step"])
        for name, value in checked.items():
            if name != "step" and not find_metric(name).text:
                writer.add_scalar(name, value, checked["step"])

    def close(self) -> None:
        """Write everything to disk and close the files."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, name: str, step: int) -> SummaryWriter:
        if name not in self._writers:
            self._writers[name] = self._make_writer(str(self._folder / name), purge_step=step)
        return self._writers[name]


def _run_name(record: Mapping[str, Any]) -> str:
    return "evaluation_before" if record.get("moment") == Moment.BEFORE else str(record["stage"])
