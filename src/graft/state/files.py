"""Writing files so that a crash at any moment leaves the old content or the new, never a mixture."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graft.errors import ResourceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a file cannot grow."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn what the system says to a write into a ResourceError that says what was being written and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise ResourceError(
                f"{what} could not be written: {error.strerror or error}. What was there before is intact. See that "
                "the folder is there, that you may write into it and that it is not mounted read-only; a stopped run "
                "then goes on with `graft resume`."
            ) from error
        raise ResourceError(
            f"the disk is full: {what} could not be written ({error.strerror}). What was there before is intact. "
            "Free some space and go on with `graft resume`; checkpoints.keep_last and keep_best say how many are kept."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        ResourceError: the disk is full, or the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(str(path)):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):  # the first error says more
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file that somebody else wrote survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
