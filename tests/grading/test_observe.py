"""What graders see of a sample, and whose fault it is when something is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.observe import Observer
from graft.types import Fault, Grade, Outcome, StopReason
from tests.grading.samples import sample

SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string"}},
    "required": ["label"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "out", "strict": True, "schema": SCHEMA}}
LOOSE = {"type": "json_schema", "json_schema": {"name": "out", "schema": SCHEMA}}


def check(input_: str, reference: str = "x", *, observe: Observer | None = None, **options):
    spec = {"type": "string_check", "input": input_, "reference": reference, "operation": "eq"}
    return build_grader(parse_grader(spec), Services(), observe or Observer(), **options)


def test_all_keys_of_the_sample_are_there():
    seen = Observer()(sample("four", answer="4"))
    assert seen.sample == {
        "output_text": "four",
        "output_json": None,
        "output_tools": [],
        "output_audio": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "four", "refusal": None},
                "finish_reason": "stop",
            }
        ],
    }
    assert seen.item == {"answer": "4"}
    assert seen.faults == {}


def test_a_sample_that_is_empty_or_cut_off_says_so_and_is_graded():
    [empty] = check("{{sample.output_text}}", "")([sample("")])
    assert (empty.score, list(empty.faults)) == (1.0, [Fault.UNRESPONSIVE_REWARD])
    [cut] = check("{{sample.output_text}}", "fo")([sample("fo", stop=StopReason.LENGTH)])
    assert (cut.score, list(cut.faults)) == (1.0, [Fault.TRUNCATED_OBSERVATION])
    assert Observer()(sample("fo", stop=StopReason.LENGTH)).sample["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("text", "declared", "value"),
    [
        ('{"label": "x"}', FORMAT, {"label": "x"}),
        (' \n{"label": "x"}\n', FORMAT, {"label": "x"}),
        ('{"label": 3}', FORMAT, None),
        ('{"label": "x", "more": 1}', FORMAT, None),
        ('{"label": 3}', LOOSE, {"label": 3}),  # not strict: JSON is enough
        ("label: x", FORMAT, None),
        ('{"label": "x"', FORMAT, None),
        ('```json\n{"label": "x"}\n```', FORMAT, None),
        ('{"label": "x", "label": "y"}', LOOSE, None),
        ("[1]", {"type": "json_object"}, None),
        ('{"a": 1}', {"type": "json_object"}, {"a": 1}),
    ],
)
def test_the_declared_form(text, declared, value):
    for seen in (
        Observer(declared)(sample(text)),
        Observer()(sample(text, response_format=declared)),
        Observer({"type": "json_object"})(
            sample(text, response_format=declared)
        ),  # the row's own comes first
    ):
        assert seen.sample["output_json"] == value
        assert (Fault.SAMPLE_PARSE in seen.faults) == (value is None)


def test_text_is_a_form_too():
    seen = Observer({"type": "text"})(sample('{"a": 1}'))
    assert (seen.sample["output_json"], seen.faults) == (None, {})


@pytest.mark.parametrize("value", ["short", 3, {"type": "poem"}, {"style": "x"}, None])
def test_a_row_may_use_the_key_for_something_else(value):
    seen = Observer()(sample("text", response_format=value))
    assert (seen.faults, seen.item["response_format"]) == ({}, value)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"type": "json_schema"}, r"row 3: response_format: \$\.json_schema: got null; wants"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}},
            r"\$\.type: 'objekt' is not valid",
        ),
    ],
)
def test_a_malformed_form_is_the_rows_fault(declared, message):
    with pytest.raises(DataError, match=message):
        Observer()(sample("{}", response_format=declared))


def test_any_json_is_read_where_graders_are_run_by_hand():
    observe = Observer(any_json=True)
    assert observe(sample('{"a": [1]}')).sample["output_json"] == {"a": [1]}
    assert observe(sample("[1]")).sample["output_json"] == [1]
    assert (observe(sample("four")).sample["output_json"], observe(sample("four")).faults) == (None, {})
    assert Observer()(sample('{"a": 1}')).sample["output_json"] is None


@pytest.mark.parametrize("text", ["[]", "null", "false", "0", '""', "{}"])
def test_json_that_is_empty_is_there(text):
    wanted = "" if text == '""' else text
    for observe in (
        Observer(any_json=True),
        Observer({"type": "json_schema", "json_schema": {"schema": True}}),
    ):
        [graded] = check("{{sample.output_json}}", wanted, observe=observe)([sample(text)])
        assert (graded.score, graded.faults) == (1.0, {})


# -- what is missing ------------------------------------------------------------------------------------------


def test_a_key_that_the_row_lacks_is_no_score():
    [grade] = check("{{item.anwser}}")([sample("x", answer="x")])
    assert (grade.score, grade.outcome) == (None, Outcome.CRASHED)
    assert list(grade.faults) == [Fault.INVALID_VARIABLE]
    assert "no key 'anwser'; there are: answer" in grade.reason


def test_a_key_that_the_output_lacks_is_the_models_fault():
    grader = check("{{sample.output_json.label}}", observe=Observer(LOOSE))
    assert grader([sample('{"label": "x"}')]) == [Grade(1.0)]
    [lacks] = grader([sample('{"lable": "x"}')])
    assert (lacks.score, lacks.outcome, list(lacks.faults)) == (
        0.0,
        Outcome.UNPARSEABLE,
        [Fault.INVALID_VARIABLE],
    )
    [no_json] = grader([sample("x")])
    assert (no_json.score, no_json.outcome) == (0.0, Outcome.UNPARSEABLE)
    assert set(no_json.faults) == {Fault.SAMPLE_PARSE, Fault.INVALID_VARIABLE}


def test_a_bad_form_fails_only_what_reads_it():
    [grade] = check("{{sample.output_text}}", observe=Observer(FORMAT))([sample("x")])
    assert (grade.score, list(grade.faults)) == (1.0, [Fault.SAMPLE_PARSE])


def test_output_json_without_a_form_is_the_graders_fault():
    [grade] = check("{{sample.output_json.label}}")([sample('{"label": "x"}')])
    assert (grade.score, grade.outcome, list(grade.faults)) == (
        None,
        Outcome.CRASHED,
        [Fault.INVALID_VARIABLE],
    )
    assert "needs a response_format" in grade.reason


@pytest.mark.parametrize("path", ["output_tools", "output_tools[0].function.name", "output_audio"])
def test_what_a_text_model_does_not_make(path):
    [grade] = check(f"{{{{sample.{path}}}}}")([sample("x")])
    assert (grade.score, list(grade.faults)) == (None, [Fault.INVALID_VARIABLE])


def test_failures_score_0_where_that_is_wanted():
    [grade] = check("{{item.anwser}}", zero=True)([sample("x")])
    assert (grade.score, grade.outcome, grade.failed) == (0.0, Outcome.CRASHED, True)


@given(st.text(max_size=40) | st.text(alphabet='{}[]",:0e-1tn \\u', max_size=30))
def test_any_completion_can_be_seen(text):
    for observe in (Observer(FORMAT), Observer(any_json=True), Observer({"type": "json_object"})):
        seen = observe(sample(text))
        assert seen.text == text
        [grade] = check("{{sample.output_json}}", observe=observe)([sample(text)])
        assert grade.score in (0.0, 1.0)
