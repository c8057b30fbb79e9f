"""A run on the terminal: a first line, a progress bar that moves within a step too, a table at the end.

Everything goes to stderr. Where stderr is not a terminal there is one plain line for each record, without
control characters. Imports no torch.

    with Terminal() as terminal:
        terminal.describe(device="cpu", dtype="bf16", engine="fast", threads=8)
        terminal.begin(Activity.TRAINING, total=200)
        engine.grow(..., progress=terminal.sampled)
        terminal.record({"step": 1, "stage": "train", "reward_mean": 0.25, "step_seconds": 1.5})
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from graft.report.metrics import Moment, Stage, find_metric
from graft.report.text import format_duration, format_value, visible
from graft.report.trees import ShownPair, ShownSample, is_solved

RUNNING_MEAN_STEPS = 10
"""Steps over which the shown reward and the time left are averaged."""

WIDE = 100
"""Columns from which the bar leaves room to say of how many steps the reward is a mean."""


class Activity(StrEnum):
    """What the bar counts."""

    MEASURING = "measuring"
    WARM_START = "warm start"
    TRAINING = "training"


class Terminal:
    """Shows a run while it goes. Call `begin` for each part of it, `record` with each record."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            console: where to write; stderr if not given.
            clock: seconds that only rise.
        """
        self.console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="green", finished_style="green"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}", style="cyan"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._activity = Activity.MEASURING
        self._total = 0
        self._done = 0
        self._step_began = clock()
        self._in_tokens = False
        self._step_times: deque[float] = deque(maxlen=RUNNING_MEAN_STEPS)
        self._step_sizes: deque[int] = deque(maxlen=RUNNING_MEAN_STEPS)
        self._rewards: deque[float] = deque(maxlen=RUNNING_MEAN_STEPS)
        self._latest: dict[str, float] = {}

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing and leave the last state on the screen."""
        self._progress.stop()

    def describe(self, *, device: str, dtype: str, engine: str, threads: int) -> None:
        """Print the first line of a run: what it runs on."""
        self.say(f"device {device}, {dtype}, {engine} engine, {threads} threads")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(Text(visible(line)), soft_wrap=not self.console.is_terminal)

    def begin(self, activity: Activity, total: int, *, done: int = 0) -> None:
        """Start a bar. A measurement between training steps needs none: it shows in training's bar.

        Args:
            activity: what is counted.
            total: steps, or rows to measure.
            done: how many of them were made before, on resuming.
        """
        self._begin(activity, total, done)
        self._in_tokens = False

    def begin_tokens(self, activity: Activity, total: int, *, done: int = 0) -> None:
        """Start a bar that counts tokens drawn for training, as the records' `generated_tokens` says.

        Args:
            activity: what is counted.
            total: tokens at which it ends; the last step may go beyond.
            done: how many of them were drawn before, on resuming.
        """
        self._begin(activity, total, done)
        self._in_tokens = True

    def _begin(self, activity: Activity, total: int, done: int) -> None:
        self._activity, self._total, self._done = activity, total, done
        self._latest.pop("loss", None)
        self._step_times.clear()
        self._step_sizes.clear()
        self._step_began = self._clock()
        if self._task is not None:
            self._progress.update(self._task, left="")
        self._task = self._progress.add_task(str(activity), total=total, completed=done, figures="", left="")

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take up the mean reward and the last held-out accuracy where a resumed run left them."""
        for record in records:
            if "reward_mean" in record:
                self._rewards.append(float(record["reward_mean"]))
            if "held_out_accuracy" in record:
                self._latest["held_out_accuracy"] = float(record["held_out_accuracy"])

    def sampled(self, tokens: int) -> None:
        """Show how far sampling is within a step.

        Args:
            tokens: tokens drawn so far in this step or measurement.
        """
        if self._task is None or not self.console.is_terminal:
            return
        self._progress.update(self._task, figures=self._figures(sampled=tokens))

    def measured(self, rows: int) -> None:
        """Show how many rows of a measurement are done."""
        self._done = rows
        if self._task is not None:
            self._progress.update(self._task, completed=rows)

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a record as it goes to `metrics.jsonl`: a step made or an evaluation finished."""
        self._latest.update({name: value for name, value in record.items() if isinstance(value, int | float)})
        if "reward_mean" in record:
            self._rewards.append(float(record["reward_mean"]))
        if record["stage"] == Stage.EVALUATION:
            self._finish_evaluation(record)
        else:
            self._finish_step(int(record["generated_tokens"]) if self._in_tokens else self._done + 1)
        self._step_began = self._clock()

    def _finish_evaluation(self, record: Mapping[str, Any]) -> None:
        if self._task is not None and self._activity is Activity.MEASURING:
            self._progress.update(self._task, completed=self._total, figures="", left="")
        if record["moment"] != Moment.DURING or not self.console.is_terminal:
            self.say(describe_evaluation(record))
        if self._task is not None:
            self._progress.update(self._task, figures=self._figures())

    def _finish_step(self, done: int) -> None:
        self._step_sizes.append(done - self._done)
        self._done = done
        self._step_times.append(self._clock() - self._step_began)
        if self._task is not None:
            self._progress.update(
                self._task, completed=self._done, figures=self._figures(), left=self._time_left()
            )
        if not self.console.is_terminal:
            counted = f"{self._done}/{self._total}" + (" tokens" if self._in_tokens else "")
            parts = [f"{self._activity} {counted}", self._figures(), self._time_left()]
            self.say("  ".join(part for part in parts if part))

    def _figures(self, sampled: int | None = None) -> str:
        """The numbers beside the bar, those measured. While a step samples, its tokens replace the speed."""
        parts = []
        if self._activity is not Activity.MEASURING and not self._rewards and "loss" in self._latest:
            parts.append(f"loss {self._latest['loss']:.3g}")
        if self._activity is Activity.TRAINING:
            if self._rewards:
                parts.append(self._reward())
            if "held_out_accuracy" in self._latest:
                parts.append(f"held-out {100 * self._latest['held_out_accuracy']:.0f}%")
            if sampled is None and "tokens_per_s" in self._latest:
                parts.append(f"{self._latest['tokens_per_s']:,.0f} tokens/s")
        if sampled is not None:
            parts.append(f"{sampled:,} tokens")
        return "  ".join(parts)

    def _reward(self) -> str:
        """The running mean; of how many steps is left out where it would leave no room for the bar."""
        count = len(self._rewards)
        mean = f"reward {sum(self._rewards) / count:.3f}"
        if self.console.is_terminal and self.console.width < WIDE:
            return f"mean {mean}"
        return f"{mean} (mean of {count} steps)" if count > 1 else mean

    def _time_left(self) -> str:
        left = self._total - self._done
        if left <= 0 or not self._step_times:
            return ""
        return f"{format_duration(left * sum(self._step_times) / sum(self._step_sizes))} left"


_MOMENT_NAMES = {
    Moment.BEFORE: "before",
    Moment.AFTER_WARM_START: "after warm start",
    Moment.DURING: "during training",
    Moment.AFTER: "after training",
}


def describe_evaluation(record: Mapping[str, Any]) -> str:
    """One line: `after training: held-out accuracy 43.5 % (36.8 to 50.4), 200 rows`."""
    name = _MOMENT_NAMES[Moment(record["moment"])]
    loss = ""
    if "validation_loss" in record:
        loss = (
            f"validation loss {_value(record, 'validation_loss')}, {_value(record, 'validation_rows')} rows"
        )
    if "held_out_accuracy" not in record:
        return f"{name}: {loss or 'held-out accuracy not measured'}"
    interval, rows = _interval(record), _value(record, "held_out_rows")
    return (
        f"{name}: held-out accuracy {_value(record, 'held_out_accuracy')}"
        + (f" ({interval})" if interval else "")
        + (f", {rows} rows" if rows else "")
        + (f"; {loss}" if loss else "")
    )


def print_before_after(
    evaluations: Sequence[Mapping[str, Any]],
    pairs: Sequence[ShownPair] = (),
    *,
    threshold: float = 1.0,
    console: Console | None = None,
) -> None:
    """Print what training changed: held-out numbers, then a few held-out rows before and after, side by side.

    Args:
        evaluations: records of stage `evaluation`; those made between training steps are skipped.
        pairs: rows to show, e.g. from `trees.telling_pairs`.
        threshold: a score of at least this counts as solved.
        console: where to write; stderr if not given.
    """
    console = console or Console(stderr=True, highlight=False)
    shown = [record for record in evaluations if record["moment"] != Moment.DURING]
    if not shown:
        console.print(Text("held-out accuracy was not measured: the run has no held-out rows"))
        return
    console.print(_table_of_evaluations(shown))
    for pair in pairs:
        console.print(_table_of_pair(pair, threshold))


def _table_of_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Held-out rows", title_justify="left", title_style="bold")
    table.add_column("")
    validated = any("validation_loss" in record for record in evaluations)
    headings = ["accuracy", "95 % interval", "reward", "tokens", "rows"]
    for heading in headings + ["validation loss"] * validated:
        table.add_column(heading, justify="right")
    for record in evaluations:
        table.add_row(
            _MOMENT_NAMES[Moment(record["moment"])],
            Text(_value(record, "held_out_accuracy"), style="bold"),
            _interval(record),
            _value(record, "held_out_reward_mean"),
            _value(record, "held_out_length_mean"),
            _value(record, "held_out_rows"),
            *([_value(record, "validation_loss")] if validated else []),
        )
    return table


def _table_of_pair(pair: ShownPair, threshold: float) -> Table:
    question = " ".join(visible(pair.question).split())
    table = Table(
        title=Text(_shorten(f"Row {pair.row}: {question}", 400)),
        title_justify="left",
        expand=True,
        show_lines=True,
    )
    for heading, sample in (("before", pair.before), ("after", pair.after)):
        table.add_column(Text.assemble(heading, ": ", _verdict(sample, threshold)), ratio=1, overflow="fold")
    table.add_row(
        *(Text(_shorten(visible(sample.text).strip(), 600)) for sample in (pair.before, pair.after))
    )
    return table


def _verdict(sample: ShownSample, threshold: float) -> Text:
    if sample.score is None:
        return Text(f"no score ({sample.outcome})", style="yellow")
    solved = is_solved(sample, threshold)
    return Text(f"{'right' if solved else 'wrong'} ({sample.score:g})", style="green" if solved else "red")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _interval(record: Mapping[str, Any]) -> str:
    if "held_out_low" not in record or "held_out_high" not in record:
        return ""
    return f"{100 * record['held_out_low']:.1f} to {100 * record['held_out_high']:.1f}"


def _value(record: Mapping[str, Any], name: str) -> str:
    return format_value(find_metric(name), record[name]) if name in record else ""
