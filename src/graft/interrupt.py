"""Ctrl-C and SIGTERM, taken at the next moment at which the run's state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The run was asked to stop; raised between two units of work."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number
        self.run: Any = None
        """The `graft.runs.Run` as it was left, with a checkpoint written; None where nothing was being trained."""


class Interrupt:
    """While entered, the first signal only sets a flag that `check` turns into `Interrupted`.

    A second signal acts at once, as if this were not there. Outside the main thread, where Python delivers no
    signals, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None] | None = None, *, meaning: str = "") -> None:
        """
        Args:
            say: told of the first signal when it comes, from a thread of its own; nobody if not given.
            meaning: what the signal will do and what a second one would, as `say` is told it.
        """
        self._say, self._meaning = say, meaning
        self._received: int | None = None
        self._former: dict[int, object] = {}
        # its `put` may be called again within itself, so a signal handler may call it
        self._to_say: SimpleQueue[str | None] = SimpleQueue()
        self._speaker: threading.Thread | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            if self._say is not None:
                self._speaker = threading.Thread(target=self._speak, daemon=True, name="graft-interrupt")
                self._speaker.start()
            self._former = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._speaker is not None:  # what was to be said stands before what is said next
            self._to_say.put(None)
            self._speaker.join()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()
        self._to_say.put(f"{signal.Signals(number).name}: {self._meaning}")

    def _speak(self) -> None:
        """Not the handler's work: it may have come while the main thread held the terminal's locks."""
        assert self._say is not None
        while (line := self._to_say.get()) is not None:
            self._say(line)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._former = {}
