"""The code_tests grader: what is taken for code, the rows' tests, and scores from the real sandbox."""

from __future__ import annotations

import pytest

from graft.data.rows import Row
from graft.errors import DataError
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.code_tests import code_in, read_tests
from graft.grading.observe import Observer
from graft.grading.row_checks import check_rows
from graft.grading.sandbox import AssertionTest, ProgramTest
from graft.types import Fault, Outcome
from tests.grading.samples import sample, sandbox_result
from tests.grading.sandbox.sandboxes import open_sandbox

DOUBLE = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        (DOUBLE, "def double(x):\n    return 2 * x\n"),
        ("```py\nfirst\n```\nand\n```\nsecond\n```", "second\n"),
        ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("```python title=a.py\ncut off", "cut off"),
        ("  ```Python3\n  x\n  ```", "  x\n"),
    ],
)
def test_what_is_taken_for_code(text, code):
    assert code_in(text) == code


def test_tests_of_a_row():
    tests = read_tests(["assert f(1) == 2", {"stdin": "1", "stdout": "2"}])
    assert tests == [AssertionTest("assert f(1) == 2"), ProgramTest("1", "2")]


@pytest.mark.parametrize(
    "value", [None, [], "assert True", [""], [3], [{"stdin": "1"}], [{"stdin": 1, "stdout": "2"}]]
)
def test_other_things_are_no_tests(value):
    with pytest.raises(ValueError, match="want a"):
        read_tests(value)


def test_rows_without_tests_are_found_before_the_run():
    spec = parse_grader({"type": "code_tests", "key": "checks"})
    rows = [
        Row(index, [], item, "", "", f"rows.jsonl:{index + 1}")
        for index, item in enumerate([{"checks": ["assert f(1)"]}, {"checks": [{"stdin": "1"}]}, {}])
    ]
    problems = list(check_rows(spec, rows))
    assert [(p.where, p.path) for p in problems] == [
        ("rows.jsonl:2", "$.checks"),
        ("rows.jsonl:3", "$.checks"),
    ]
    assert problems[1].got == "nothing"


@pytest.mark.parametrize("every", [False, True])
def test_the_share_that_passes(every):
    spec = parse_grader({"type": "code_tests", "every": every})
    tests = ["assert double(2) == 4", "assert double(0) == 1", "assert double(3) == 6"]
    with open_sandbox() as sandbox:
        grader = build_grader(spec, Services(run_tests=sandbox.run_tests), Observer())
        some, none, whole, program = grader(
            [
                sample(DOUBLE, tests=tests),
                sample("no code at all", tests=tests),
                sample(DOUBLE, tests=tests[::2]),
                sample("```python\nprint(2 * int(input()))\n```", tests=[{"stdin": "4", "stdout": "8"}]),
            ]
        )
        assert some.score == (0.0 if every else pytest.approx(2 / 3))
        assert none.score == 0.0
        assert whole.score == program.score == 1.0
        assert some.outcome is Outcome.GRADED
        with pytest.raises(DataError, match=r"row \d: item\.tests: want a list of tests"):
            grader([sample(DOUBLE)])


def test_a_sandbox_that_breaks_is_no_zero():
    with open_sandbox() as sandbox:
        grader = build_grader(
            parse_grader({"type": "code_tests"}), Services(run_tests=sandbox.run_tests), Observer()
        )
    [grade] = grader([sample(DOUBLE, tests=["assert double(2) == 4"])])  # it is closed now
    assert grade.score is None
    assert grade.outcome is Outcome.SANDBOX_FAILED
    assert Fault.PYTHON_GRADER_SERVER in grade.faults


@pytest.mark.parametrize(
    ("input_", "score", "outcome"),
    [("{{sample.output_json.code}}", 0.0, Outcome.UNPARSEABLE), ("{{item.code}}", None, Outcome.CRASHED)],
)
def test_a_template_that_leads_to_nothing_fails_its_sample_alone(input_, score, outcome):
    spec = parse_grader({"type": "code_tests", "input": input_})
    asked = []

    def run_tests(calls):
        asked.append(len(calls))
        return [sandbox_result(1.0) for _ in calls]

    grader = build_grader(spec, Services(run_tests=run_tests), Observer(any_json=True))
    good = sample('{"code": "x = 1"}', tests=["assert x"], code="x = 1")
    lost, found = grader([sample("no JSON", tests=["assert x"]), good])
    assert (lost.score, lost.outcome, list(lost.faults)) == (score, outcome, [Fault.INVALID_VARIABLE])
    assert found.score == 1.0
    assert asked == [1]
