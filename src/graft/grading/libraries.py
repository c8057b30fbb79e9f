"""Libraries of the extra `graders`: imported when a grader needs one, and asked for by name when it is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from graft.errors import GraderError


def import_library(name: str, purpose: str) -> ModuleType:
    """A library that a grader needs.

    Args:
        name: of the module.
        purpose: what needs it, for the message.

    Raises:
        GraderError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GraderError(
            f"{purpose}: the library '{name.partition('.')[0]}' cannot be imported ({error}). "
            "Install it: pip install 'graft-rl[graders]'"
        ) from None
