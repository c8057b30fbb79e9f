"""Foreign Python in a cage: `python` graders and code tests."""

from graft.grading.sandbox.records import (
    AssertionTest,
    CodeTest,
    ProgramTest,
    SandboxLimits,
    SandboxResult,
)
from graft.grading.sandbox.sandbox import Sandbox

__all__ = ["AssertionTest", "CodeTest", "ProgramTest", "Sandbox", "SandboxLimits", "SandboxResult"]
