"""Plain lines where there is no terminal, a bar where there is one, and no control character is obeyed."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from graft.report.metrics import Moment, Stage
from graft.report.terminal import Activity, Terminal, describe_evaluation, print_before_after
from graft.report.text import duration_in_words, format_duration, visible
from graft.report.trees import ShownPair, ShownSample
from tests.report.synthetic import evaluation_metrics, train_metrics, warm_start_metrics


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def show_a_run(terminal: Terminal, clock: Clock) -> None:
    numbers = random.Random(0)
    terminal.describe(device="cpu", dtype="bf16", engine="fast", threads=8)
    terminal.begin(Activity.MEASURING, 200)
    terminal.sampled(500)
    terminal.measured(100)
    terminal.record(evaluation_metrics(0, Moment.BEFORE, 0.115))
    terminal.begin(Activity.WARM_START, 1)
    clock.now += 2
    terminal.record(warm_start_metrics(1))
    terminal.record(evaluation_metrics(0, Moment.AFTER_WARM_START, 0.335))
    terminal.begin(Activity.TRAINING, 100)
    for step in (1, 2):
        terminal.sampled(900)
        clock.now += 10
        terminal.record(
            {**train_metrics(step, 100, numbers), "reward_mean": step / 4, "tokens_per_s": 1400.4}
        )
    terminal.record(evaluation_metrics(2, Moment.DURING, 0.45))


def test_without_a_terminal_there_is_one_plain_line_for_each_record():
    console, clock = plain_console(), Clock()
    with Terminal(console, clock=clock) as terminal:
        show_a_run(terminal, clock)
    assert written(console).splitlines() == [
        "device cpu, bf16, fast engine, 8 threads",
        "before: held-out accuracy 11.5 % (7.8 to 16.7), 200 rows",
        "warm start 1/1  loss 1.55",
        "after warm start: held-out accuracy 33.5 % (27.3 to 40.3), 200 rows",
        "training 1/100  reward 0.250  held-out 34%  1,400 tokens/s  16:30 left",
        "training 2/100  reward 0.375 (mean of 2 steps)  held-out 34%  1,400 tokens/s  16:20 left",
        "during training: held-out accuracy 45.0 % (38.3 to 51.9), 200 rows",
    ]


def test_without_a_terminal_nothing_but_text_is_written():
    console, clock = plain_console(), Clock()
    with Terminal(console, clock=clock) as terminal:
        show_a_run(terminal, clock)
        terminal.say("a\x1b[2Jb\rc")
    assert all(character.isprintable() or character == "\n" for character in written(console))
    assert "a␛[2Jb␍c" in written(console)


@pytest.mark.parametrize(
    ("width", "reward"), [(80, " mean reward 0.375 "), (100, " reward 0.375 (mean of 2 steps) ")]
)
def test_on_a_terminal_there_is_a_bar_that_fits(width, reward):
    console, clock = (
        Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard"),
        Clock(),
    )
    with Terminal(console, clock=clock) as terminal:
        show_a_run(terminal, clock)
        terminal.sampled(1234)
        terminal._progress.refresh()
        screen = written(console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    last = [line for line in shown.splitlines() if "training" in line][-1]
    assert len(last) <= width
    assert "━" in last
    assert "2/100" in last
    assert reward in last
    assert "held-out 45%" in last
    assert "1,234 tokens" in last
    assert "16:20 left" in last


def test_resuming_counts_on_from_the_steps_that_were_made():
    console, clock = plain_console(), Clock()
    with Terminal(console, clock=clock) as terminal:
        terminal.begin(Activity.TRAINING, 10, done=7)
        clock.now += 5
        terminal.record({"step": 8, "stage": Stage.TRAIN, "reward_mean": 0.5})
    assert written(console) == "training 8/10  reward 0.500  10 s left\n"


def test_resuming_takes_up_the_mean_reward_and_the_last_held_out_accuracy():
    console = plain_console()
    with Terminal(console, clock=Clock()) as terminal:
        terminal.recall(
            [
                evaluation_metrics(0, Moment.BEFORE, 0.25),
                *({"step": n, "stage": Stage.TRAIN, "reward_mean": n / 10} for n in range(1, 13)),
                evaluation_metrics(12, Moment.DURING, 0.5),
            ]
        )
        terminal.begin(Activity.TRAINING, 13, done=12)
        terminal.record({"step": 13, "stage": Stage.TRAIN, "reward_mean": 1.5})
    # of steps 4 to 13: (0.4 + ... + 1.2 + 1.5) / 10
    assert written(console) == "training 13/13  reward 0.870 (mean of 10 steps)  held-out 50%\n"


def test_a_bar_of_tokens_counts_what_was_drawn():
    console, clock = plain_console(), Clock()
    with Terminal(console, clock=clock) as terminal:
        terminal.begin_tokens(Activity.TRAINING, 1000, done=100)
        for generated in (300, 400, 1050):
            clock.now += 3
            terminal.record({"step": 8, "stage": Stage.TRAIN, "generated_tokens": generated})
    assert written(console).splitlines() == [
        "training 300/1000 tokens  10 s left",  # 3 s for 200 tokens, 700 left
        "training 400/1000 tokens  12 s left",  # 6 s for 300, 600 left
        "training 1050/1000 tokens",
    ]


def test_what_was_not_measured_is_not_shown():
    console = plain_console()
    with Terminal(console, clock=Clock()) as terminal:
        terminal.begin(Activity.TRAINING, 1)
        terminal.record({"step": 1, "stage": "train"})
    assert written(console) == "training 1/1\n"
    assert describe_evaluation({"moment": "after"}) == "after training: held-out accuracy not measured"


def test_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]):
    with Terminal() as terminal:
        show_a_run(terminal, Clock())
    print_before_after([evaluation_metrics(0, Moment.BEFORE, 0.1)])
    out, err = capsys.readouterr()
    assert out == ""
    assert "device cpu" in err


def pair(before: str, after: str) -> ShownPair:
    first, last = (
        ShownSample([(text, None)], score, "graded", "", len(text), "eos")
        for text, score in ((before, 0.0), (after, 1.0))
    )
    return ShownPair(7, [{"role": "user", "content": "2 [bold]+[/bold] 2 ="}], {}, first, last)


def test_before_and_after_in_80_columns():
    console = plain_console()
    evaluations = [
        evaluation_metrics(0, Moment.BEFORE, 0.115),
        evaluation_metrics(0, Moment.AFTER_WARM_START, 0.335),
        evaluation_metrics(50, Moment.DURING, 0.5),
        evaluation_metrics(100, Moment.AFTER, 0.66),
    ]
    print_before_after(evaluations, [pair("It is 5. " * 20, "It is\x1b[31m 4.")], console=console)
    text = written(console)
    assert all(len(line) <= 80 for line in text.splitlines())
    for line in ("before", "after warm start", "after training"):
        assert line in text
    assert "during" not in text
    assert "66.0 %" in text
    assert "59.2 to 72.2" in text
    assert "Row 7: 2 [bold]+[/bold] 2 =" in text
    assert "before: wrong (0)" in text
    assert "after: right (1)" in text
    assert "It is␛[31m 4." in text
    assert text.count("It is 5.") >= 15


def test_a_sample_without_a_score_is_neither_right_nor_wrong():
    console = plain_console()
    lost = ShownSample([("text", None)], None, "timed_out", "", 4, "eos")
    shown = ShownPair(1, [], {}, lost, lost)
    print_before_after([evaluation_metrics(0, Moment.BEFORE, 0.1)], [shown], console=console)
    assert "no score (timed_out)" in written(console)
    assert "wrong" not in written(console)


def test_a_run_without_held_out_rows_says_so():
    console = plain_console()
    print_before_after([], console=console)
    assert "was not measured" in written(console)


@pytest.mark.parametrize(
    ("seconds", "short", "words"),
    [
        (0, "0 s", "0 s"),
        (59.4, "59 s", "59 s"),
        (59.6, "1:00", "1 min 0 s"),
        (200, "3:20", "3 min 20 s"),
        (7400, "2:03:20", "2 h 3 min"),
    ],
)
def test_durations(seconds, short, words):
    assert format_duration(seconds) == short
    assert duration_in_words(seconds) == words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc\r\nd", "a\tb\nc\nd"),
        ("\x00\x1b\x7f\x9b", "␀␛␡⟨U+009B⟩"),
        ("\u202egnp\u202c", "⟨U+202E⟩gnp⟨U+202C⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("שלום 🌱 é 你好", "שלום 🌱 é 你好"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert visible(text) == shown
