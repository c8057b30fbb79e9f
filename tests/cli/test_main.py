"""What all commands share: help, version, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graft import errors
from graft.cli.main import EXIT_CODES
from graft.version import VERSION


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_help_needs_no_torch_and_lists_commands_and_exit_codes():
    ended = run_python(
        "import sys\n"
        "from graft.cli.main import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as done:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'graft.config'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else done.code)\n"
    )
    assert ended.returncode == 0, ended.stderr
    for command in ("init", "train", "resume", "eval", "report", "model", "settings"):
        assert f"\n  {command} " in ended.stdout
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in ended.stdout


def test_what_needs_no_model_imports_no_torch(task, tmp_path):
    """A refused run, the list of models and the report come at once."""
    (task / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.toml").write_text("")
    for arguments, code in (
        (["train", str(task / "config.toml")], 2),
        (["resume", str(tmp_path / "nowhere")], 3),
        (["eval", str(tmp_path)], 2),
        (["model", "list"], 0),
        (["settings"], 0),
        (["report", str(tmp_path / "done")], 0),
    ):
        ended = run_python(
            "import sys\n"
            "from graft.cli.main import main\n"
            "try:\n"
            f"    main({arguments!r})\n"
            "except SystemExit as done:\n"
            "    heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
            "    sys.exit(f'imported {heavy}' if heavy else done.code)\n"
        )
        assert ended.returncode == code, (arguments, ended.stderr)


def test_every_kind_of_error_has_a_documented_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)


def test_a_setting_that_is_wrong_is_a_message_on_stderr_and_code_2(task, graft_process):
    result = graft_process("train", task / "config.toml", "--set", "trainng.steps=3")
    assert result.code == 2
    assert result.out == ""
    assert result.err == "error: --set trainng.steps=3: trainng: unknown setting. Did you mean 'training'?\n"


def test_an_unexpected_failure_keeps_its_traceback():
    ended = run_python(
        "from graft.cli.main import app, main\n"
        "@app.command('fail')\n"
        "def fail():\n"
        "    raise RuntimeError('nobody foresaw this')\n"
        "main(['fail'])\n"
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("RuntimeError: nobody foresaw this\n")


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "c.toml", "--sett", "a=b"], []])
def test_a_wrong_command_line_is_code_2(graft, arguments):
    result = graft(*arguments)
    assert result.code == 2
    assert "Usage: graft" in result.err + result.out


def test_version(graft):
    result = graft("--version")
    assert (result.code, result.out, result.err) == (0, VERSION + "\n", "")
