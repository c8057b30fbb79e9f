"""graft's side of one warm parent: starts it, hands calls to it, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from graft.errors import GraderError
from graft.grading.sandbox import bubblewrap
from graft.grading.sandbox.packages import PACKAGES
from graft.grading.sandbox.records import SandboxLimits

START_S = 120.0
"""Longest time for starting, and for importing packages, seconds."""

GRACE_S = 10.0
"""Longest time between the order to end a call and its end, seconds."""

RECORD_BYTES = 1 << 16
"""Longest record of a call that is read."""

CHUNK = 1 << 16
"""Bytes read at once."""

PIPE_BYTES = 1 << 20
"""The largest size that Linux lets a user give a pipe."""

LOG_LINES = 15
"""Lines of the warm parent's own messages that an error shows."""

Limit = Literal["wall_s", "memory_mb", "output_kb", "record"]


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known of a call that has ended."""

    status: int
    """Exit status of its first process; minus the signal's number if one ended it."""

    cpu_s: float
    """Processor time of that process and of those that it waited for, seconds."""

    over: Limit | None
    """The limit for which it was ended."""

    record: bytes
    """What came out of the result pipe."""

    output: bytes
    """What the code wrote to standard output and error."""

    seconds: float
    """From handing over to the end."""


class WorkerLost(Exception):  # noqa: N818 - reads as a sentence
    """The warm parent has ended or does not answer; the message has the end of what it said."""


class Worker:
    """One warm parent, in bubblewrap or, in the unsafe mode, without. Not for two threads at once."""

    def __init__(self, limits: SandboxLimits, *, unsafe: bool) -> None:
        """
        Raises:
            GraderError: it does not start.
        """
        self.limits = limits
        self._packages: frozenset[str] = frozenset()
        self._received = b""
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in `close`
        self._channel, theirs = socket.socketpair()
        try:
            with theirs:
                settings = {"isolated": not unsafe, "limits": asdict(limits)}
                self._process = (_start_unsafe if unsafe else _start)(settings, theirs, self._log.fileno())
        except BaseException:
            self._channel.close()
            self._log.close()
            raise
        try:
            self._channel.settimeout(START_S)
            self._answer()
        except WorkerLost as error:
            self.close()
            raise bubblewrap.refusal("it did not start", str(error).splitlines()) from None
        except BaseException:
            self.close()
            raise

    def run(self, call: bytes, packages: frozenset[str]) -> Ended:
        """Do one call.

        Args:
            call: the object that `inside/run.py` takes, as JSON.
            packages: names in `PACKAGES` to have imported beforehand; not part of the call's time.

        Raises:
            WorkerLost: the warm parent ended or hangs. Close this worker.
        """
        self._import(packages)
        with contextlib.ExitStack() as stack:
            payload_end, payload = _pipe(stack)
            record, record_end = _pipe(stack)
            output, output_end = _pipe(stack)
            for file in (payload, record, output):
                os.set_blocking(file.fileno(), False)
            started = time.perf_counter()
            try:
                theirs = [payload_end, record_end, output_end]
                socket.send_fds(self._channel, [b'{"run": true}\n'], [file.fileno() for file in theirs])
            except OSError as error:
                raise self._lost(f"{error}") from None
            for file in theirs:
                file.close()
            return self._follow(_Traffic(payload, call, record, output, self.limits), started)

    def kill(self) -> None:
        """End the warm parent and everything in it at once, from any thread; `close` it afterwards."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the warm parent and everything in it."""
        self._channel.close()  # of which it ends; the signal is for one that cannot
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.2)
        self.kill()
        self._process.wait()
        self._log.close()

    def _import(self, packages: frozenset[str]) -> None:
        if missing := packages - self._packages:
            modules = [module for name in sorted(missing) for module in PACKAGES[name]]
            self._channel.settimeout(START_S)
            self._say({"import": modules})
            self._answer()
            self._packages |= missing

    def _follow(self, traffic: _Traffic, started: float) -> Ended:
        """Move the call's bytes until it has ended; have it ended when it goes over a limit."""
        over: Limit | None = None
        deadline = started + self.limits.wall_s
        traffic.selector.register(self._channel, selectors.EVENT_READ)
        with traffic.selector:
            answered = False
            while not answered:
                for key, _ in traffic.selector.select(max(0.0, deadline - time.perf_counter())):
                    if key.fileobj is self._channel:
                        answered = True
                    else:
                        traffic.move(key.fileobj)
                late = time.perf_counter() >= deadline
                if over is not None and late:
                    raise self._lost(f"did not end a call within {GRACE_S:g} s")
                if over is None and not answered:
                    over = "wall_s" if late else traffic.over
                    if over is not None:
                        deadline = time.perf_counter() + GRACE_S
                        self._say({"kill": True})
            answer = self._answer()
            seconds = time.perf_counter() - started
            traffic.drain()
        return Ended(
            status=answer["status"],
            cpu_s=answer["cpu_s"],
            over=over or traffic.over or answer["over"],
            record=bytes(traffic.record),
            output=bytes(traffic.output),
            seconds=seconds,
        )

    def _say(self, message: Mapping[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._lost(f"{error}") from None

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            try:
                data = self._channel.recv(65536)
            except OSError as error:
                raise self._lost(f"{error}") from None
            if not data:
                raise self._lost("it ended")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _lost(self, what: str) -> WorkerLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)  # so that its last words are in the log
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
        status = self._process.poll()
        return WorkerLost("\n".join([what if status is None else f"{what}; status {status}", *lines]))


class _Traffic:
    """The three pipes of a call."""

    def __init__(self, payload: Any, call: bytes, record: Any, output: Any, limits: SandboxLimits) -> None:
        self.selector = selectors.DefaultSelector()
        self.record, self.output = bytearray(), bytearray()
        self._payload, self._call = payload, memoryview(call)
        self._output_bytes = limits.output_kb * 1024
        self._into = {record: (self.record, RECORD_BYTES), output: (self.output, self._output_bytes)}
        self.selector.register(payload, selectors.EVENT_WRITE)
        for file in self._into:
            self.selector.register(file, selectors.EVENT_READ)

    @property
    def over(self) -> Limit | None:
        """The limit that what was read goes over."""
        if len(self.record) > RECORD_BYTES:
            return "record"
        return "output_kb" if len(self.output) > self._output_bytes else None

    def move(self, file: Any) -> bool:
        """Write or read what goes at once. Returns whether there may be more."""
        if file is self._payload:
            return self._write()
        data = file.read(CHUNK)
        if data:
            buffer, limit = self._into[file]
            buffer += data[: limit + 1 - len(buffer)]  # what is over the limit is not kept
        elif data is not None:
            self.selector.unregister(file)
        return bool(data)

    def drain(self) -> None:
        """Read what an ended call has left in its pipes: not more than fits, should somebody still write."""
        for file in self._into:
            for _ in range(PIPE_BYTES // CHUNK):
                if file not in self.selector.get_map() or not self.move(file):
                    break

    def _write(self) -> bool:
        try:
            written = self._payload.write(self._call)
        except BrokenPipeError:  # the call has ended without reading it
            written = len(self._call)
        if written:
            self._call = self._call[written:]
        if not self._call:
            self.selector.unregister(self._payload)
            self._payload.close()
        return bool(self._call)


def _pipe(stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Reading and writing end as unbuffered files."""
    read, write = os.pipe()
    return stack.enter_context(open(read, "rb", 0)), stack.enter_context(open(write, "wb", 0))


def _start(settings: dict[str, Any], theirs: socket.socket, log: int) -> subprocess.Popen[bytes]:
    """Start a warm parent in bubblewrap."""
    try:
        program = bubblewrap.find_bubblewrap()
    except GraderError as error:
        raise bubblewrap.refusal(str(error), []) from None
    as_root = os.geteuid() == 0
    with contextlib.ExitStack() as stack:
        info, info_end = _pipe(stack)
        block, go = _pipe(stack)
        command, packages = bubblewrap.bubblewrap_command(
            program, as_root=as_root, info=info_end.fileno(), block=block.fileno()
        )
        process = _popen(
            [
                *command,
                *_start_command("/sandbox/inside/start.py", {**settings, "packages": packages}, theirs),
            ],
            log,
            [theirs.fileno(), *([info_end.fileno(), block.fileno()] if as_root else [])],
            env={},
        )
        if as_root:
            info_end.close()
            told = info.read()
            try:
                if told:  # else it has ended, and its last words are in the log
                    _map_users(json.loads(told)["child-pid"])
                    go.write(b"1")
            except OSError as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise bubblewrap.refusal(f"its users could not be mapped: {error}", []) from None
    return process


def _start_unsafe(settings: dict[str, Any], theirs: socket.socket, log: int) -> subprocess.Popen[bytes]:
    """Start a warm parent as an ordinary process of this user."""
    settings = {**settings, "packages": bubblewrap.package_folders()}
    command = _start_command(str(bubblewrap.INSIDE / "start.py"), settings, theirs)
    return _popen(command, log, [theirs.fileno()], env=bubblewrap.ENVIRONMENT)


def _start_command(script: str, settings: dict[str, Any], theirs: socket.socket) -> list[str]:
    # No site module: `.pth` files may run code, and the package folders are given.
    return [bubblewrap.python(), "-S", "-s", "-P", script, str(theirs.fileno()), json.dumps(settings)]


def _popen(
    command: list[str], log: int, descriptors: list[int], env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        pass_fds=descriptors,
        env=env,
        start_new_session=True,  # one group to end; and Ctrl-C is graft's to handle
    )


def _map_users(child: int) -> None:
    """Root inside is root here, for the warm parent; foreign code gets a user that owns nothing.

    Raises:
        OSError: this root may not do that.
    """
    for kind in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{kind}").write_text(f"0 0 1\n1000 {bubblewrap.CHILD_USER} 1\n", encoding="ascii")
