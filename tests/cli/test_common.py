"""What the commands share. How an interruption is told stands in `test_train.py`."""

from __future__ import annotations

import json
import signal

import click
import numpy as np
import pytest
import typer

from graft.cli.common import print_json, say, says_how_to_go_on
from graft.interrupt import Interrupted


def test_messages_go_to_stderr_and_data_to_stdout(capsys):
    say("for people")
    print_json({"rate": np.float32(0.5), "steps": np.arange(2), "loss": float("nan"), "best": float("-inf")})
    said = capsys.readouterr()
    assert said.err == "for people\n"
    assert json.loads(said.out) == {"rate": 0.5, "steps": [0, 1], "loss": "NaN", "best": "-Infinity"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_becomes_an_exit_code_and_the_command_to_go_on(number, tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended, says_how_to_go_on(tmp_path):
        raise Interrupted(number)
    assert ended.value.exit_code == 128 + number
    assert f"Go on with: graft resume {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [ValueError("no"), click.UsageError("no")])
def test_other_failures_pass(failure, tmp_path, capsys):
    with pytest.raises(type(failure), match="no"), says_how_to_go_on(tmp_path):
        raise failure
    assert capsys.readouterr().err == ""
