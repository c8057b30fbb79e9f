"""What runs inside the process of one side. Standard library only: a peer's environment imports it too.

The process is started as `python -m benchmarks.<module> '<settings as JSON>'`. It says that it is ready with one
line of JSON about itself, then measures once for each line that it reads, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Channel:
    """Lines of JSON over the process's real standard output; whatever else prints goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, record: dict[str, Any]) -> None:
        """Answer, with the memory that the process has needed so far."""
        self._out.write(json.dumps({**record, "peak_memory_gb": peak_memory_gb()}) + "\n")

    def cases(self) -> Iterator[str]:
        """What is to be measured next, until the harness closes the pipe."""
        for line in sys.stdin:
            yield line.strip()


def serve(
    prepare: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[str], dict[str, Any]]]],
) -> None:
    """Prepare with the settings of the command line, then measure as often as asked.

    Args:
        prepare: settings -> facts about the side, and a function that measures one case.
    """
    channel = Channel()
    about, measure = prepare(json.loads(sys.argv[1]))
    channel.send(about)
    for case in channel.cases():
        channel.send(measure(case))


def peak_memory_gb() -> float | None:
    """Largest resident size of this process so far, 10^9 bytes; None where the system does not tell.

    `getrusage` would do for a process that nobody started: its figure survives `exec`, so that a child of a large
    process begins with that one's size.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e9


def versions(*names: str) -> dict[str, str]:
    """Versions of installed distributions."""
    from importlib.metadata import version

    return {name: version(name) for name in names}
