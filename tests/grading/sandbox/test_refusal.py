"""Where bubblewrap cannot run: a refusal that says why, unless the unsafe mode was chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.errors import GraderError
from graft.grading.sandbox import bubblewrap
from tests.grading.sandbox.sandboxes import open_sandbox

SCRIPT = """
from graft.errors import GraderError
from graft.grading.sandbox import Sandbox
try:
    Sandbox(workers=1).close()
    print("it runs")
except GraderError as error:
    print("refused:", error)
with Sandbox(workers=1, unsafe=True) as sandbox:
    print("unsafe:", sandbox.run_grade("def grade(s, i): return 0.5", [({}, {})])[0].value)
"""


def run_script(*wrapper: str, **settings) -> str:
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_user_namespaces_it_refuses_and_the_unsafe_mode_works():
    """A machine that forbids them is made with bubblewrap itself."""
    open_sandbox().close()
    program = bubblewrap.find_bubblewrap()
    forbidding = (program, "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--")
    said = run_script(*forbidding)
    assert "it runs" not in said
    assert "refused: the sandbox for foreign code cannot run here: it did not start" in said
    assert "bwrap: " in said  # its own words
    assert "user.max_user_namespaces" in said
    assert "unsafe mode by name" in said
    assert "unsafe: 0.5" in said


@pytest.mark.skipif(sys.platform == "linux", reason="this is Linux, where bubblewrap runs")
def test_elsewhere_than_on_linux_it_refuses():
    with pytest.raises(GraderError, match="bubblewrap runs on Linux alone"):
        open_sandbox()


def test_nothing_of_the_environment_is_handed_to_bubblewrap():
    command, inside = bubblewrap.bubblewrap_command("bwrap", as_root=False, info=3, block=4)
    assert "--clearenv" in command
    assert "--unshare-all" in command
    assert "--share-net" not in command
    assert not {"--bind", "--dev-bind-try", "--bind-try"} & set(command)
    writable = [command[at + 1] for at, word in enumerate(command) if word == "--dev-bind"]
    assert writable == [f"/dev/{name}" for name in bubblewrap.DEVICES]
    assert len(inside) == len(bubblewrap.package_folders()) >= 1
    home = str(Path.home())
    shown = [command[at + 1] for at, word in enumerate(command) if word == "--ro-bind"]
    assert home not in shown
    assert "/" not in shown
    assert not any(os.path.realpath(path) == "/etc" for path in shown)
