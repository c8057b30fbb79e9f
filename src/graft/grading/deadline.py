"""A call that ends in time, whatever the other side does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Made = TypeVar("Made")


def within(seconds: float, call: Callable[[], Made]) -> Made:
    """The value of a call, or the exception that it raised.

    HTTP libraries limit each read alone: a server that sends a byte now and then would keep them for ever. The call
    runs on a thread of its own, a daemon; one that is late is left behind, and ends with the server's patience.

    Raises:
        TimeoutError: it took longer.
    """
    made: Future[Made] = Future()

    def work() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=work, daemon=True, name="graft-call").start()
    return made.result(timeout=seconds)
