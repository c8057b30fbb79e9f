"""Turns a freshly forked child into a cage, before any foreign code runs in it."""

from __future__ import annotations

import os
import platform
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from graft.grading.sandbox.inside import kernel, system_calls

CHILD_ID = 1000
"""User and group of foreign code, where the warm parent is root of its user namespace."""

_MIB = 1 << 20

Limits = Sequence[tuple[int, tuple[int, int]]]
"""Kind of limit, and its soft and hard value."""


class FreshProcessNamespaces:
    """Gives every child that is forked a process namespace of its own, as its process 1.

    Nothing outside can be seen or signalled from there, and when process 1 ends, the kernel ends all others in it.
    """

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def next_child_gets_one(self) -> None:
        """The next child that is forked is process 1 of a new namespace. Raises OSError."""
        kernel.unshare(kernel.CLONE_NEWPID)

    def back_to_own(self) -> None:
        """Children are forked into this process's own namespace again. Raises OSError."""
        kernel.setns(self._own, kernel.CLONE_NEWPID)


def enter_own_files(limits: Mapping[str, Any]) -> None:
    """Give this process mounts of its own: an empty `/tmp` (also seen as `/dev/shm`) and its own `/proc`.

    Raises:
        OSError: the kernel refused.
    """
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    # Read-only, since the owner of a network namespace may write some of its settings, which outlive the call.
    guarded = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("proc", "/proc", "proc", guarded | kernel.MS_NOEXEC | kernel.MS_RDONLY, "subset=pid")
    size = f"size={limits['disk_mb']}m,nr_inodes={16 * limits['disk_mb']},mode=1777"
    kernel.mount("tmpfs", "/tmp", "tmpfs", guarded, size)
    kernel.mount("/tmp", "/dev/shm", None, kernel.MS_BIND)
    os.chdir("/tmp")


def limits_of_call(limits: Mapping[str, Any], *, isolated: bool, data_bytes: int) -> Limits:
    """Per-process limits of the kernel, none above what this process has.

    Args:
        limits: `memory_mb` and the like.
        isolated: whether bubblewrap is around this process.
        data_bytes: private memory of the warm interpreter, which the call does not pay for.
    """
    disk = limits["disk_mb"] * _MIB
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: disk,
        # 1, not 0: at 0 a core dump still goes to a program of the host where the host pipes them to one.
        resource.RLIMIT_CORE: 1,
    }
    if sys.platform == "linux":
        # Private memory of each process. What processes share, and all of them together, the warm parent watches.
        wanted[resource.RLIMIT_DATA] = data_bytes + limits["memory_mb"] * _MIB
        wanted[resource.RLIMIT_MSGQUEUE] = 0
        wanted[resource.RLIMIT_MEMLOCK] = 0
    if isolated:  # elsewhere all processes of the user count, graft's own too
        # Process 1 of the sandbox and the warm parent count as well, unless foreign code gets a user of its own.
        wanted[resource.RLIMIT_NPROC] = limits["processes"] + (0 if os.getuid() == 0 else 2)
    allowed = [
        (kind, value if (hard := resource.getrlimit(kind)[1]) == resource.RLIM_INFINITY else min(value, hard))
        for kind, value in wanted.items()
    ]
    return [(kind, (value, value)) for kind, value in allowed]


def set_limits(limits: Limits) -> None:
    """Raises OSError or ValueError where the kernel refuses."""
    for kind, pair in limits:
        resource.setrlimit(kind, pair)


def filter_here(*, isolated: bool) -> bytes | None:
    """The system call filter of this machine; None where the unsafe mode has to do without one."""
    if sys.platform == "linux" and (isolated or platform.machine() in system_calls.MACHINES):
        return system_calls.filter_program()
    return None


def give_up_rights(filter_program: bytes | None, *, isolated: bool) -> None:
    """Become an ordinary user without capabilities, under the system call filter. Cannot be undone.

    Args:
        filter_program: of `filter_here`.
        isolated: whether bubblewrap is around this process.

    Raises:
        OSError: the kernel refused.
    """
    if isolated:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(CHILD_ID, CHILD_ID, CHILD_ID)
            os.setresuid(CHILD_ID, CHILD_ID, CHILD_ID)
        kernel.drop_capabilities()
    elif sys.platform == "linux":
        kernel.die_with_parent(signal.SIGKILL)
    if filter_program is not None:
        kernel.forbid_new_privileges()
        kernel.install_filter(filter_program)
