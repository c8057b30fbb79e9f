"""What is said at the start where scores do not lie between 0 and 1: nothing is wrong silently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graft.config_file import check_config, dump_config, load_config
from graft.score_notes import score_notes
from tests.grading.test_ranges import NUMBER, formula, judge

SOLVED = "scores go to 10, and everything from 1 counts as solved: set evaluation.threshold"
WHOLE = "the critic's G is algorithm.critic.scale x score: from 0 to 100, where S and P go from 0 to 10."
SERVER = {"type": "judge", "model": "m"}


def config_of(grader: dict[str, Any] | None, **sections: Any):
    minimal = {"run": "r", "model": {"name": "m"}, "data": {"source": "a.jsonl"}, "training": {"steps": 1}}
    settings = {**minimal, **({} if grader is None else {"grader": grader}), **sections}
    return check_config(settings, where="here")


@pytest.mark.parametrize(
    ("grader", "sections", "said"),
    [
        (None, {}, []),
        (NUMBER, {}, []),
        (NUMBER, {"algorithm": {"name": "rft"}}, []),
        (judge(0, 10), {}, [SOLVED]),
        (formula("x / 10", x=judge(0, 10)), {"algorithm": {"name": "rft"}}, []),
        (formula("x", x=judge(0, 10)), {}, [SOLVED]),
        (judge(0, 10), {"evaluation": {"threshold": 8}}, []),
        (judge(0, 10), {"evaluation": {"threshold": 1.0}}, []),
        (judge(0, 10), {"evaluation": {"threshold": 11}}, ["so that nothing counts as solved: lower it"]),
        (judge(0, 10), {"evaluation": {"threshold": 8}, "algorithm": {"name": "rft"}}, [WHOLE]),
        (judge(0, 10), {"evaluation": {"threshold": 8}, "algorithm": {"name": "process_grpo"}}, [WHOLE]),
        (judge(0, 10), {"evaluation": {"threshold": 8}, "algorithm": {"name": "grft"}}, [WHOLE]),
        (
            judge(0, 10),
            {
                "evaluation": {"threshold": 8},
                "algorithm": {"name": "grft", "score": "outcome", "shape": "tree"},
            },
            [],
        ),
        (
            judge(0, 10),
            {
                "evaluation": {"threshold": 8},
                "algorithm": {"name": "rft", "critic": {**SERVER, "overall": "judge"}},
            },
            [],
        ),
        (
            judge(1, 5),
            {"evaluation": {"threshold": 4}, "algorithm": {"name": "rft"}},
            ['calculate_output = "(score - 1) / 4"'],
        ),
        (
            judge(0, 10),
            {"evaluation": {"threshold": 8}, "algorithm": {"name": "vineppo"}},
            ["everything from 1 counts as solved: set algorithm.critic.threshold"],
        ),
    ],
)
def test_what_is_said(grader, sections, said):
    notes = score_notes(config_of(grader, **sections))
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))


def test_the_graders_threshold_counts_where_the_settings_have_none(tmp_path):
    grader = {**judge(0, 10), "pass_threshold": 7}
    config = config_of(grader)
    assert config.evaluation.threshold == 7
    assert score_notes(config) == ["rows count as solved from a score of 7, the grader's pass_threshold"]
    assert config_of(grader, evaluation={"samples": 2}).evaluation.threshold == 7
    assert config_of(grader, evaluation={"threshold": 9}).evaluation.threshold == 9
    assert score_notes(config_of(grader, evaluation={"threshold": 9})) == []
    inside = formula("x", x=grader)
    assert config_of(inside).evaluation.threshold == 1.0
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.toml").evaluation.threshold == 7


@pytest.mark.parametrize("in_job", [True, False])
def test_the_threshold_of_a_grader_in_a_file(tmp_path, in_job):
    grader = {**judge(0, 10), "pass_threshold": 7}
    (tmp_path / "g.json").write_text(json.dumps({"grader": grader} if in_job else grader))
    config = config_of({"file": "g.json"}, base=str(tmp_path))
    assert config.evaluation.threshold == 7
    assert len(score_notes(config)) == 1
