"""The filter that the kernel puts on a call's system calls.

Namespaces hide files, processes and the network. The filter closes what they leave open: kinds of socket that
network namespaces do not cover (a virtual machine's AF_VSOCK among them), new user namespaces, in which a process
would be root again, memory and messages that outlive a call (keyrings, System V and POSIX queues), and interfaces
that honest graders do without and attackers like. Capabilities guard the rest.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterable

FORBIDDEN = {
    # name: number on x86_64, on aarch64; None where there is no such call
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "syslog": (103, 116),
    "modify_ldt": (154, None),
}
"""Answered with EPERM."""

MACHINES = {"x86_64": 0, "aarch64": 1}
"""Columns of `FORBIDDEN` and the like."""

_ARCHITECTURE = (0xC000003E, 0xC00000B7)
_SOCKETS = ((41, 198), (53, 199))  # socket, socketpair
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_X32 = 0x40000000  # bit of the numbers of x86_64's second set of calls, which the table does not list
_NEW_NAMESPACES = 0x7E020000  # all CLONE_NEW... flags of clone()
_AF_UNIX = 1

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in the record that the kernel filters


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a kind of processor, 8 bytes an instruction.

    Args:
        machine: as `platform.machine()` says it; None for this one.

    Raises:
        KeyError: there is no table for that processor.
    """
    column = MACHINES[machine or platform.machine()]
    parts = [
        _step(_LOAD, _MACHINE),
        _step(_EQUAL, _ARCHITECTURE[column], yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        *_when(_AT_LEAST, _X32, _step(_RETURN, _ERROR | _ENOSYS)),
        *_when(
            _EQUAL, _CLONE3[column], _step(_RETURN, _ERROR | _ENOSYS)
        ),  # flags in memory: let libc use clone
    ]
    for numbers in FORBIDDEN.values():
        if numbers[column] is not None:
            parts += _when(_EQUAL, numbers[column], _step(_RETURN, _ERROR | _EPERM))
    for numbers in _SOCKETS:
        parts += _when(
            _EQUAL,
            numbers[column],
            _step(_LOAD, _FIRST_ARGUMENT),
            _step(_EQUAL, _AF_UNIX, yes=1),
            _step(_RETURN, _ERROR | _EPERM),
            _step(_RETURN, _ALLOW),
        )
    parts += _when(
        _EQUAL,
        _CLONE[column],
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _NEW_NAMESPACES, no=1),
        _step(_RETURN, _ERROR | _EPERM),
        _step(_RETURN, _ALLOW),
    )
    return b"".join([*parts, _step(_RETURN, _ALLOW)])


def _when(test: int, value: int | None, *steps: bytes) -> Iterable[bytes]:
    """`steps` if the loaded word passes the test, else go on behind them."""
    assert value is not None
    return (_step(test, value, no=len(steps)), *steps)


def _step(operation: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction of classic BPF: operation, jumps, operand."""
    return struct.pack("=HBBI", operation, yes, no, value)
