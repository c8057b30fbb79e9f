"""Opening sandboxes and writing graders for them."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import Any

import pytest

from graft.errors import GraderError
from graft.grading.sandbox import Sandbox, SandboxLimits

LIMITS = SandboxLimits(wall_s=60.0, cpu_s=60, memory_mb=512, disk_mb=64, processes=16, output_kb=256)
"""Far from what honest tests need, on a busy machine too."""


def open_sandbox(**settings: Any) -> Sandbox:
    """A sandbox, or a skip that says why there cannot be one."""
    try:
        return Sandbox(**{"workers": 1, "limits": LIMITS, **settings})
    except GraderError as error:
        pytest.skip(f"{error}")


def grader(body: str) -> str:
    """A source whose `grade` has this body."""
    return f"def grade(sample, item):\n{indent(dedent(body), '    ')}\n"
