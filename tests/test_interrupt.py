"""Real signals to this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from graft.interrupt import Interrupt, Interrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """What stood there before must stand there again; a signal that comes through is noted, not deadly."""
    came: dict[int, object] = {}

    def note(number: int, frame: object) -> None:
        came[number] = came.get(number, 0)
        came[number] += 1  # pyright: ignore

    former = {number: signal.signal(number, note) for number in Interrupt.SIGNALS}
    yield came
    for number in Interrupt.SIGNALS:
        assert signal.signal(number, former[number]) is note


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # a Python call: the handler has run when it is over


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_the_first_signal_waits_until_it_is_asked_for(handlers, number, name, code):
    done = []

    def run() -> None:
        with Interrupt() as interrupt:
            interrupt.check()
            send(number)
            done.append("the step goes on")
            interrupt.check()
            done.append("never")

    with pytest.raises(Interrupted, match=name) as caught:
        run()
    assert done == ["the step goes on"]
    assert caught.value.exit_code == code
    assert handlers == {}


@pytest.mark.parametrize("second", Interrupt.SIGNALS)
def test_the_second_signal_acts_at_once(handlers, second):
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
        assert handlers == {}
        send(second)
        assert handlers == {second: 1}
        with pytest.raises(Interrupted, match="SIGTERM"):
            interrupt.check()


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_the_first_signal_is_answered_while_the_work_goes_on(handlers, number):
    """The line comes before anybody has asked for the signal; the second signal says nothing of its own."""
    said: SimpleQueue[str] = SimpleQueue()
    with Interrupt(said.put, meaning="once more stops at once") as interrupt:
        send(number)
        assert said.get(timeout=60) == f"{signal.Signals(number).name}: once more stops at once"
        send(number)
        assert handlers == {number: 1}
        with pytest.raises(Interrupted):
            interrupt.check()
    assert said.empty()


def test_the_answer_is_given_before_it_is_left(handlers):
    said: list[str] = []
    with Interrupt(said.append, meaning="stops soon"):
        send(signal.SIGINT)
    assert said == ["SIGINT: stops soon"]


def test_the_answer_is_not_given_by_the_thread_that_was_interrupted(handlers):
    """Which may hold the terminal's locks, in the midst of drawing."""
    threads: list[threading.Thread] = []
    with Interrupt(lambda line: threads.append(threading.current_thread()), meaning="stops soon"):
        send(signal.SIGINT)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_without_a_signal_nothing_happens_and_handlers_come_back(handlers):
    with Interrupt() as interrupt:
        interrupt.check()
        interrupt.check()
    send(signal.SIGINT)
    assert handlers == {signal.SIGINT: 1}


def test_handlers_come_back_after_an_error(handlers):
    with pytest.raises(ZeroDivisionError), Interrupt():
        raise ZeroDivisionError
    send(signal.SIGTERM)
    assert handlers == {signal.SIGTERM: 1}


def test_a_signal_that_was_never_asked_for_does_not_raise_on_leaving(handlers):
    with Interrupt():
        send(signal.SIGINT)
    assert handlers == {}


def test_outside_the_main_thread_it_does_nothing(handlers):
    outcome = []

    def work() -> None:
        with Interrupt() as interrupt:
            interrupt.check()
            outcome.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    send(signal.SIGINT)
    assert len(outcome) == 1
    assert handlers == {signal.SIGINT: 1}
