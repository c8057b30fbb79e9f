"""A run of a comparison in a process of its own: `python -m graft.comparison.child RUN STAGE`, its stdin a pipe.

The run resumes and stops with its phase STAGE. When whoever started it is gone, the pipe ends, and so does the run at
once: it can be resumed from its newest checkpoint at any time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graft.errors import GraftError
from graft.interrupt import Interrupted
from graft.report.metrics import Stage

PARENT_IS_GONE = 1


def run_in_a_process(run: Path, until: Stage, *, lock: int) -> int:
    """Go on with a run in a new process until a phase has ended; returns its exit code.

    Its progress goes to stderr. Signals are passed on to it, so that it writes a checkpoint.

    Args:
        run: the run folder.
        until: the phase after which it stops.
        lock: descriptor that the process keeps open as long as it lives.
    """
    command = [sys.executable, "-m", "graft.comparison.child", str(run), str(until)]
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,
        ) as child,
        _passed_on(child.send_signal),
    ):
        return child.wait()


@contextmanager
def _passed_on(send: Callable[[int], None]) -> Iterator[None]:
    """While entered, Ctrl-C and SIGTERM go to the child alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {
        number: signal.signal(number, lambda n, _: send(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(run: str, until: str) -> None:
    """Resume the run and exit."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from graft.runs import resume_run

    try:
        resume_run(run, until=Stage(until))
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:  # before the first step, or the second Ctrl-C
        sys.exit(130)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(PARENT_IS_GONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
