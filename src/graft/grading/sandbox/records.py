"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, fields

from graft.errors import ConfigError
from graft.types import Outcome


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one call may use. The defaults are those of OpenAI's python grader, where it has the limit."""

    wall_s: float = 120.0
    """Time from handing the call over to its end, seconds."""

    cpu_s: int = 120
    """Processor time of each process of the call, seconds."""

    memory_mb: int = 2048
    """Memory that the call's processes may add to the warm interpreter, all together, MiB."""

    disk_mb: int = 1024
    """Size of the call's own file system in memory (`/tmp`), and of its largest file, MiB."""

    processes: int = 32
    """Processes and threads alive at once, the first one counted."""

    output_kb: int = 1024
    """Bytes written to standard output and standard error together, KiB."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(
                    f"sandbox: {field.name} = {getattr(self, field.name)}; want a number above 0"
                )


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """What came of one call."""

    value: float | None
    """Finite, or None when the outcome says that there is no value."""

    outcome: Outcome

    reason: str
    """Empty when all went well; else what went wrong, with the code's own traceback where there is one."""

    stdout: str
    """What the code wrote to standard output and standard error."""

    seconds: float
    """From handing the call over to its end."""


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """Runs the code as a program: passes when it reads `stdin`, writes `stdout` and ends with status 0.

    Trailing white space of lines and trailing empty lines do not count.
    """

    stdin: str
    stdout: str
    """Never enters the sandbox, so that no code can read it or claim to have written it."""


@dataclass(frozen=True, slots=True)
class AssertionTest:
    """Runs `source` in the namespace of the code: passes when it comes to its end without an exception."""

    source: str


CodeTest = ProgramTest | AssertionTest
