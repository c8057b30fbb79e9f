"""Functions that settings name and that are not there: refused at once, by the setting's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from graft.assemble import assemble
from graft.config_file import check_config
from graft.errors import ConfigError
from graft.named_functions import refuse_functions
from tests.tasks import task_settings, write_task

CRITIC = {"name": "rft", "group_size": None}


def critic(reference: str) -> dict[str, Any]:
    return {"algorithm": {**CRITIC, "critic": {"type": "function", "function": reference}}}


def function(reference: str) -> dict[str, Any]:
    return {"type": "function", "function": reference}


def settings_of(folder: Path, sections: dict[str, Any]) -> dict[str, Any]:
    settings = task_settings(folder, "no-such-model", **{k: v for k, v in sections.items() if k != "grader"})
    return {**settings, **({"grader": sections["grader"]} if "grader" in sections else {})}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (critic("nofile.py:critic"), [r"algorithm\.critic\.function: .*nofile\.py: cannot be read"]),
        (critic("mycritic.critic"), [r"algorithm\.critic\.function: 'mycritic\.critic' names no function"]),
        (
            critic("grader.py:critc"),
            [r"algorithm\.critic\.function: .*no function 'critc'; did you mean 'critic'"],
        ),
        (
            {
                "algorithm": {
                    **CRITIC,
                    "critic": {"type": "grader", "grader": function("grader.py:rewrd")},
                }
            },
            [r"algorithm\.critic\.grader\.function: .*did you mean 'reward'"],
        ),
        ({"grader": function("grader.py:rewrd")}, [r"^grader\.function: .*did you mean 'reward'"]),
        (
            {
                "grader": {
                    "type": "multi",
                    "graders": {"a": function("grader.py:reward"), "b": function("none.py:b")},
                    "calculate_output": "a + b",
                }
            },
            [r"^grader\.graders\.b\.function: .*none\.py: cannot be read"],
        ),
        (
            {"warm_start": {"worked": "grader.py:wrked", "steps": 1}, **critic("nofile.py:critic")},
            [r"algorithm\.critic\.function: ", r"warm_start\.worked: .*did you mean 'worked'"],
        ),
    ],
)
def test_the_setting_is_named_before_a_model_is_missed(tmp_path, sections, said):
    write_task(tmp_path, "no-such-model")
    with pytest.raises(ConfigError) as refused:
        assemble(check_config(settings_of(tmp_path, sections), where="here"))
    lines = str(refused.value).splitlines()
    assert len(lines) == len(said)
    for line, words in zip(lines, said, strict=True):
        assert re.search(words, line), line


def test_functions_that_are_there_and_keys_of_rows_are_taken(tmp_path):
    write_task(tmp_path, "no-such-model")
    sections = {**critic("grader.py:critic"), "warm_start": {"worked": "key:answer", "steps": 1}}
    refuse_functions(check_config(settings_of(tmp_path, sections), where="here"))


def test_a_function_in_memory_stands_in_for_the_graders(tmp_path):
    settings = check_config(settings_of(tmp_path, {"grader": function("none.py:b")}), where="here")
    refuse_functions(settings, reward=True)
    with pytest.raises(ConfigError, match=r"grader\.function"):
        refuse_functions(settings)
