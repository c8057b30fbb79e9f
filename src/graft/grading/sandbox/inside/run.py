"""Runs foreign code in a confined child and says what came of it.

The record goes out on a pipe that only this child has: first `READY`, written before foreign code runs, then one
object of JSON. Foreign code shares the process with this module, so a program that tries hard can write a record of
its own; the nonce makes sure that no accident does.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

READY = b"ready\n"

REASON_LENGTH = 4000
"""Characters of a traceback that are kept, its end."""

REASON_FRAMES = 25
"""Innermost frames of a traceback that are kept; there may be millions."""

SOURCE_NAMES = ("<grader>", "<code>", "<test>")


def run(call: dict[str, Any], result: int) -> int:
    """Do one call.

    Args:
        call: `kind` ("grade", "program", "assertions") and what that kind takes.
        result: the pipe for the record.

    Returns:
        The exit status of the process.
    """
    # What foreign code replaces in these modules must not change what is written.
    write, dumps, nonce = os.write, json.dumps, call.pop("nonce")
    record: dict[str, Any] = {"nonce": nonce}
    try:
        record |= _KINDS[call["kind"]](call)
    except MemoryError as error:
        record |= {"error": "memory", "reason": _trace(error)}
    except SystemExit as error:
        record |= {"error": "exit", "reason": _trace(error), "status": _status(error)}
    except BaseException as error:
        record |= {"error": "raised", "reason": _trace(error)}
    _flush()
    write(result, dumps(record).encode())
    return record.get("status", 1 if "error" in record else 0)


def _grade(call: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore  # what is printed before a limit strikes shall be seen
    module = _load(call["source"], "grader", "<grader>")
    grade = getattr(module, "grade", None)
    if not callable(grade):
        return {"error": "raised", "reason": "the source defines no function `grade(sample, item)`"}
    return _number(grade(call["sample"], call["item"]))


def _program(call: dict[str, Any]) -> dict[str, Any]:
    with open("stdin", "w+b") as file:
        os.unlink("stdin")
        file.write(call["stdin"].encode("utf-8", "surrogateescape"))
        file.seek(0)
        os.dup2(file.fileno(), 0)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # standard output alone is compared
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process
    _load(call["source"], "__main__", "<code>")
    return {}


def _assertions(call: dict[str, Any]) -> dict[str, Any]:
    module = _load(call["source"], "solution", "<code>")
    _execute(call["test"], "<test>", module)
    return {}


_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "grade": _grade,
    "program": _program,
    "assertions": _assertions,
}


def _load(source: str, name: str, file_name: str) -> types.ModuleType:
    """Execute a source as a module that `sys.modules` knows, as dataclasses and pydantic need it."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    _execute(source, file_name, module)
    return module


def _execute(source: str, file_name: str, module: types.ModuleType) -> None:
    # So that tracebacks show the lines, and `inspect.getsource` works.
    linecache.cache[file_name] = (len(source), None, source.splitlines(keepends=True), file_name)
    exec(compile(source, file_name, "exec", dont_inherit=True), module.__dict__)


def _number(value: Any) -> dict[str, Any]:
    kind = type(value).__name__
    if isinstance(value, str | bytes | bytearray):  # which float() would take
        return {"error": "value", "reason": f"grade returned {kind} {str(value[:80])!r}; want a number"}
    try:
        return {"value": float(value)}
    except Exception as error:
        return {"error": "value", "reason": f"grade returned {kind}; want a number\n{_trace(error)}"}


def _status(error: SystemExit) -> int:
    """The status that the interpreter would end with."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _trace(error: BaseException) -> str:
    """The traceback from the first line of foreign code on."""
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename not in SOURCE_NAMES:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace, limit=-REASON_FRAMES))
    except BaseException as failure:  # anybody's `__str__`, or no memory left
        return f"{type(error).__name__}, whose traceback cannot be shown ({type(failure).__name__})"
    return text if len(text) <= REASON_LENGTH else "... " + text[-REASON_LENGTH:]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # closed or replaced by foreign code: there is nothing to save
            continue
