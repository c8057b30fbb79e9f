"""Calls that end in time."""

from __future__ import annotations

import threading

import pytest

from graft.grading.deadline import within


def test_the_value_and_the_exception_of_the_call_come_back():
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_a_late_call_is_left_behind():
    ended = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, ended.wait)
    [left] = [thread for thread in threading.enumerate() if thread.name == "graft-call" and thread.is_alive()]
    assert left.daemon  # it would not keep the process
    ended.set()
    left.join()
