"""The warm parent: has its packages imported, and forks a child for each call.

It never sees what is graded: the call, its output and its result travel through pipes that it hands on to the child
and closes. Talks to graft in lines of JSON over one socket:

    {"import": ["numpy"]}              -> {"imported": ["numpy"]}
    {"run": true} and three pipes      -> {"status": 0, "cpu_s": 0.01, "over": null}     when the call has ended
    {"kill": true}                     ends the running call, which is then answered as usual

When the socket closes, it ends, and everything in the sandbox with it.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import site
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from graft.grading.sandbox.inside import confine, run

ALWAYS = (
    *("ast", "bisect", "collections.abc", "copy", "csv", "datetime", "dataclasses", "decimal", "difflib", "enum"),
    *("fractions", "functools", "hashlib", "heapq", "html", "io", "itertools", "json", "math", "numbers"),
    *("operator", "pathlib", "re", "string", "textwrap", "time", "typing", "unicodedata"),
)  # fmt: skip
"""Modules of the standard library that graders often use. None that runs code after every fork, as `random` (seeds
itself) and `threading` (new locks) do: that would cost each call a tenth of its time. Sources that name them get them
in time: see `packages.py`."""

DESCRIPTORS = 256
"""Open files of a process."""

MEMORY_CHECK_S = 0.05
"""Time between looks at the memory of a running call, seconds."""

SETUP_FAILED = 70
"""Exit status of a child that could not be confined. Without `READY` on the result pipe: see `run.py`."""


class Ended(Exception):  # noqa: N818 - not an error
    """graft has closed the socket."""


class WarmParent:
    """Serves one socket."""

    def __init__(self, channel: socket.socket, *, isolated: bool, limits: Mapping[str, Any]) -> None:
        self.channel = channel
        self.isolated = isolated
        self.limits = limits
        self._namespaces = confine.FreshProcessNamespaces() if isolated else None
        self._filter = confine.filter_here(isolated=isolated)
        self._child_limits: confine.Limits = []
        self._received = b""
        self._pipes: list[int] = []

    def serve(self) -> None:
        """Answer until graft closes the socket."""
        self._import(ALWAYS)
        self._answer({"ready": True})
        with suppress(Ended):
            while True:
                message = self._next_message()
                if "import" in message:
                    self._answer({"imported": self._import(message["import"])})
                elif "run" in message:
                    self._answer(self._call())

    def _import(self, names: Any) -> list[str]:
        """Import what can be imported; for the rest the code gets its own error."""
        found = []
        for name in names:
            with suppress(Exception):
                importlib.import_module(name)
                found.append(name)
        self._child_limits = confine.limits_of_call(
            self.limits, isolated=self.isolated, data_bytes=_data_bytes()
        )
        gc.collect()
        gc.freeze()  # collections in children shall not touch, and so copy, these objects
        return found

    def _call(self) -> dict[str, Any]:
        pipes, self._pipes = self._pipes, []
        folder = None if self.isolated else _new_folder()
        try:
            child = self._fork()
            if child == 0:
                self._become_child(pipes, folder)
        finally:
            for pipe in pipes:
                os.close(pipe)
        ended = self._wait(child)
        if not self.isolated:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return ended

    def _fork(self) -> int:
        if self._namespaces is None:
            return os.fork()
        self._namespaces.next_child_gets_one()
        try:
            child = os.fork()
        except BaseException:
            self._namespaces.back_to_own()
            raise
        if child:
            self._namespaces.back_to_own()
        return child

    def _become_child(self, pipes: list[int], folder: str | None) -> None:
        """Set the cage up, run the call, end the process. Never returns."""
        status = SETUP_FAILED
        try:
            status = self._child(pipes, folder)
        except BaseException as error:
            with suppress(BaseException):
                os.write(2, f"the call could not be run: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)

    def _child(self, pipes: list[int], folder: str | None) -> int:
        os.setsid()  # a signal to the own process group must not reach the warm parent
        aside = [fcntl.fcntl(pipe, fcntl.F_DUPFD, DESCRIPTORS // 2) for pipe in pipes]
        payload, result, output = (os.dup2(pipe, 3 + place) for place, pipe in enumerate(aside))
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(output, DESCRIPTORS)
        if folder is None:
            confine.enter_own_files(self.limits)
        else:
            os.chdir(folder)
        confine.set_limits(self._child_limits)
        confine.give_up_rights(self._filter, isolated=self.isolated)
        call = json.loads(_read_to_end(payload))
        if "numpy.random" in sys.modules:  # `random` does this by itself
            sys.modules["numpy.random"].seed()
        os.write(result, run.READY)
        return run.run(call, result)

    def _wait(self, child: int) -> dict[str, Any]:
        """Until the call has ended, or has to be ended."""
        over = None
        ending = _ending(child)
        while True:
            ready, _, _ = select.select([self.channel, *ending], [], [], MEMORY_CHECK_S)
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                for descriptor in ending:
                    os.close(descriptor)
                cpu_s = usage.ru_utime + usage.ru_stime
                return {"status": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s, "over": over}
            if self.channel in ready:
                try:
                    kill = "kill" in self._next_message()
                except Ended:
                    self._kill(child)
                    raise
                if kill:
                    self._kill(child)
            if not ready and self.isolated and _memory_of_others() > self._memory_limit():
                over = "memory_mb"
                self._kill(child)

    def _memory_limit(self) -> int:
        own = _proportional_memory(os.getpid())
        return own + self.limits["memory_mb"] * (1 << 20)

    def _kill(self, child: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(
                child, signal.SIGKILL
            )  # where isolated, process 1 of its namespace: takes all others along
            if not self.isolated:
                os.killpg(child, signal.SIGKILL)

    def _next_message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data, pipes, _, _ = socket.recv_fds(self.channel, 65536, 3)
            if not data:
                raise Ended
            self._received += data
            self._pipes += pipes
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _answer(self, message: dict[str, Any]) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")


def _ending(child: int) -> list[int]:
    """A descriptor that can be read when the child has ended; none but on Linux, where `_wait` looks now and then."""
    return [os.pidfd_open(child)] if hasattr(os, "pidfd_open") else []


def _read_to_end(pipe: int) -> str:
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    os.close(pipe)
    return b"".join(parts).decode()


def _new_folder() -> str:
    import tempfile  # brings `random`: see `ALWAYS`

    return tempfile.mkdtemp(prefix="graft-")


def _memory_of_others() -> int:
    """Bytes used by every process of the running call: all that there is besides process 1 and this one."""
    others = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - {1, os.getpid()}
    return sum(map(_proportional_memory, others))


def _proportional_memory(process: int) -> int:
    """Bytes of a process; pages that it shares with others count in part."""
    try:
        with open(f"/proc/{process}/smaps_rollup", "rb") as file:
            [line] = [line for line in file if line.startswith(b"Pss:")]
    except (OSError, ValueError):  # has ended
        return 0
    return int(line.split()[1]) * 1024


def _data_bytes() -> int:
    """Bytes of this process's private writable memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def main(descriptor: int, settings: Mapping[str, Any]) -> None:
    """Serve the socket behind a descriptor. `settings` has `isolated` and `limits`."""
    for open_one in map(int, os.listdir("/dev/fd")):
        if open_one > 2 and open_one != descriptor:
            with suppress(OSError):  # the listing's own
                os.close(open_one)
    # So that a child finds all there can be by counting up to a small number.
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    site.setquit()  # `exit` and the like, which the interpreter was started without
    site.sethelper()
    channel = socket.socket(fileno=os.dup(descriptor))  # not inherited by programs
    os.close(descriptor)
    WarmParent(channel, isolated=settings["isolated"], limits=settings["limits"]).serve()
