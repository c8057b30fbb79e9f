"""Grader objects: what is taken, what it becomes, and every problem with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import GraderError
from graft.grading.check import (
    check_grader,
    check_grader_file,
    dump_grader,
    line_of,
    parse_grader,
    read_grader,
)
from graft.grading.schema import SOURCE_LIMIT, Multi, ScoreModel

CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
SIMILAR = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}
MESSAGE = {"role": "user", "content": "Rate {{sample.output_text}}"}
SCORE = {"type": "score_model", "name": "judge", "input": [MESSAGE], "model": "gpt-4o-2024-08-06"}
LABEL = {
    "type": "label_model",
    "name": "label",
    "input": [MESSAGE],
    "model": "m",
    "labels": ["good", "bad"],
    "passing_labels": ["good"],
}
PYTHON = {"type": "python", "name": "code", "source": "def grade(sample, item):\n    return 1.0\n"}
ENDPOINT = {"type": "endpoint", "name": "far", "url": "https://example.org/grade"}
MULTI = {
    "type": "multi",
    "name": "total",
    "graders": {"fmt": CHECK, "acc": SIMILAR},
    "calculate_output": "0.2*fmt + 0.8*acc",
}
OWN = [
    {"type": "number", "name": "last number", "key": "total"},
    {"type": "math", "name": "same"},
    {"type": "regex", "name": "form", "pattern": "^Answer: "},
    {"type": "json_schema", "name": "shape", "schema": {"type": "object"}},
    {"type": "function", "name": "mine", "function": "grader.py:grade"},
    {"type": "weighted", "name": "sum", "graders": {"a": CHECK, "b": SIMILAR}, "weights": {"a": 2, "b": 0.5}},
]
ALL = [CHECK, SIMILAR, SCORE, LABEL, PYTHON, ENDPOINT, MULTI, *OWN]


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def problems_of(data: Any) -> list[str]:
    spec, problems = check_grader(data)
    assert (spec is None) == bool(problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize("data", ALL, ids=lambda data: data["type"])
def test_every_type_is_taken_and_given_back(data):
    spec = parse_grader(data)
    echo = dump_grader(spec)
    assert parse_grader(echo) == spec
    assert json.loads(json.dumps(echo)) == echo
    for key, value in data.items():
        assert echo[key] == value


@pytest.mark.parametrize("data", ALL, ids=lambda data: data["type"])
def test_a_missing_name_is_filled_in(data):
    assert parse_grader(without(data, "name")).name == data["type"]
    inside = parse_grader({**MULTI, "graders": {"key": without(CHECK, "name")}, "calculate_output": "key"})
    assert isinstance(inside, Multi)
    assert inside.graders["key"].name == "key"


@pytest.mark.parametrize("data", ALL, ids=lambda data: data["type"])
def test_every_required_key_is_missed_by_name(data):
    optional = {"name", "key", "range", "whole"}
    for key in set(data) - optional:
        [problem] = problems_of(without(data, key))
        assert problem.startswith(f"grader: $.{key}: got nothing; wants a")


@pytest.mark.parametrize("data", ALL, ids=lambda data: data["type"])
def test_an_unknown_key_is_refused_and_a_threshold_is_kept(data):
    [problem] = problems_of({**data, "nmae": "x"})
    assert (
        problem
        == "grader: $.nmae: got a key that this grader does not have; wants none. Did you mean 'name'?"
    )
    assert dump_grader(parse_grader({**data, "pass_threshold": 0.5}))["pass_threshold"] == 0.5


def test_defaults_are_written_out():
    assert dump_grader(parse_grader(SCORE))["range"] == [0.0, 1.0]
    assert "sampling_params" not in dump_grader(parse_grader(SCORE))


def test_null_is_the_default_where_openai_echoes_it():
    image = {"type": "input_image", "image_url": "x", "detail": None}
    with_nulls = {**SCORE, "range": None, "input": [{"role": "user", "content": image, "type": None}]}
    echo = dump_grader(parse_grader(with_nulls))
    assert echo["range"] == [0.0, 1.0]
    assert echo["input"][0]["content"]["detail"] == "auto"


@pytest.mark.parametrize("key", ["max_completions_tokens", "max_completion_tokens", "max_tokens"])
def test_the_token_limit_of_a_judge_has_three_spellings(key):
    spec = parse_grader({**SCORE, "sampling_params": {key: 5, "temperature": 1, "seed": 42, "top_p": 1}})
    assert isinstance(spec, ScoreModel)
    assert dump_grader(spec)["sampling_params"] == {
        "max_completions_tokens": 5,
        "temperature": 1.0,
        "seed": 42,
        "top_p": 1.0,
    }


@pytest.mark.parametrize(
    "content",
    [
        "text",
        {"type": "input_text", "text": "{{item.answer}}"},
        {"type": "output_text", "text": "x"},
        {"type": "input_image", "image_url": "https://example.org/{{item.picture}}.png", "detail": "low"},
        {"type": "input_image", "image_url": "https://example.org/x.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        ["text", {"type": "input_text", "text": "more"}],
    ],
    ids=str,
)
def test_every_form_of_content(content):
    spec = parse_grader({**SCORE, "input": [{"type": "message", "role": "developer", "content": content}]})
    assert parse_grader(dump_grader(spec)) == spec


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "$: got []; wants a grader object"),
        ({}, "$.type: got nothing; wants a type. There are: string_check, text_similarity"),
        ({"type": 3}, "$.type: got 3; wants a type. There are"),
        ({"type": "stringcheck"}, "$.type: got \"stringcheck\"; wants a type. Did you mean 'string_check'?"),
        (
            {**CHECK, "operation": "neq"},
            '$.operation: got "neq", which one of OpenAI\'s guides prints; wants "ne"',
        ),
        (
            {**CHECK, "operation": "equals"},
            "$.operation: got \"equals\"; wants 'eq', 'ne', 'like' or 'ilike'",
        ),
        ({**CHECK, "reference": 4}, "$.reference: got 4; wants text"),
        (
            {**CHECK, "input": "{{sampel.output_text}}"},
            "$.input: got '{{sampel.output_text}}' at line 1, column 1: no",
        ),
        (
            {**CHECK, "input": "{{item.x"},
            "$.input: got '{{' at line 1, column 1 is not closed; wants {{ item.key }}",
        ),
        (
            {**SIMILAR, "evaluation_metric": "rouge_6"},
            "$.evaluation_metric: got \"rouge_6\"; wants 'cosine', ",
        ),
        ({**SCORE, "range": [1, 0]}, "$.range: got [1.0, 0.0]; wants [smallest, largest]"),
        ({**SCORE, "range": [0]}, "$.range: got [0]; wants at least 2 entries"),
        ({**SCORE, "range": [0, 1, 2]}, "$.range: got [0, 1, 2]; wants at most 2 entries"),
        ({**SCORE, "range": {"min": 0}}, '$.range: got {"min": 0}; wants a list'),
        ({**SCORE, "model": ""}, '$.model: got ""; wants text that is not empty'),
        (
            {**SCORE, "sampling_params": {"seed": "4"}},
            '$.sampling_params.seed: got "4"; wants a whole number',
        ),
        ({**SCORE, "sampling_params": {"top_p": "1"}}, '$.sampling_params.top_p: got "1"; wants a number'),
        ({**SCORE, "sampling_params": 1}, "$.sampling_params: got 1; wants an object"),
        ({**SCORE, "input": []}, "$.input: got []; wants at least 1 entry"),
        (
            {**SCORE, "input": [{"role": "tool", "content": "x"}]},
            "$.input[0].role: got \"tool\"; wants 'user', ",
        ),
        (
            {**SCORE, "input": [{"role": "user", "content": ["{{x}}"]}]},
            "$.input[0].content[0]: got '{{x}}' at line 1",
        ),
        (
            {**SCORE, "input": [{"role": "user", "content": {"type": "text", "text": "x"}}]},
            '$.input[0].content.type: got "text"; wants a type. There are: input_audio, input_image, input_text',
        ),
        (
            {**SCORE, "sampling_params": {"temp": 1}},
            "$.sampling_params.temp: got a key that this grader does not have",
        ),
        ({**LABEL, "labels": ["a", "a"]}, "$.labels: got a label twice; wants labels that differ"),
        ({**LABEL, "passing_labels": ["fine"]}, "$.passing_labels: got 'fine'; wants only what is in labels"),
        (
            {**PYTHON, "source": "x = 1"},
            "$.source: got no function grade in the source; wants grade(sample",
        ),
        ({**PYTHON, "source": "async def grade(s, i): ..."}, "$.source: got no function grade in the source"),
        (
            {**PYTHON, "source": "x = 1\0"},
            "$.source: got a source with an error: source code string cannot contain null bytes; w",
        ),
        (
            {**PYTHON, "source": "def grade(s, i): ...\ndef grade(s): ..."},
            "$.source: got other arguments in line 2 of the source",
        ),
        (
            {**PYTHON, "source": "def grade(s):\n  return 1"},
            "$.source: got other arguments in line 1 of the source",
        ),
        ({**PYTHON, "source": "def grade(s, i, x): ..."}, "$.source: got other arguments in line 1"),
        (
            {**PYTHON, "source": "def grade(sample, item)\n  return 1"},
            "$.source: got a source with an error: expected",
        ),
        ({**PYTHON, "source": "#" * (SOURCE_LIMIT + 1)}, f"$.source: got more than {SOURCE_LIMIT} bytes"),
        ({**ENDPOINT, "url": "ftp://x"}, '$.url: got "ftp://x"; wants an address such as https://'),
        ({**ENDPOINT, "url": "http://[::1"}, '$.url: got "http://[::1"; wants an address such as https://'),
        (
            {**ENDPOINT, "url": "http://x:99999/"},
            '$.url: got "http://x:99999/"; wants an address such as https://',
        ),
        ({**ENDPOINT, "url": "http://a b/"}, '$.url: got "http://a b/"; wants an address such as https://'),
        ({**ENDPOINT, "headers": {"a b": "x"}}, "$.headers: got the name 'a b'; wants a header's name"),
        ({**ENDPOINT, "headers": {"": "x"}}, "$.headers: got the name ''; wants a header's name"),
        (
            {**ENDPOINT, "headers": {"a": "x\r\nb: y"}},
            "$.headers: got a value of 'a' that no header can have; wants",
        ),
        (
            {**ENDPOINT, "headers": {"a": "\u00e9"}},
            "$.headers: got a value of 'a' that no header can have; wants",
        ),
        (
            {**ENDPOINT, "headers": {"Content-Length": "3"}},
            "$.headers: got 'Content-Length', which is set by graft; w",
        ),
        ({**ENDPOINT, "rate_limit": 0}, "$.rate_limit: got 0; wants greater than 0"),
        ({**MULTI, "graders": {}}, "$.graders: got {}; wants at least 1 entry"),
        ({**MULTI, "graders": None}, "$.graders: got null; wants an object"),
        (
            {**MULTI, "graders": {"a b": CHECK}},
            "$.graders.a b: got the key 'a b'; wants names of letters, digits and _",
        ),
        (
            {**CHECK, "input": "{{ sample.output_txt }}"},
            "$.input: got '{{sample.output_txt}}', which no sample has; wants one of sample.output_text",
        ),
        ({**CHECK, "reference": "{{sample[0]}}"}, "$.reference: got '{{sample[0]}}', which no sample has"),
        (
            {**MULTI, "graders": {"a": MULTI}},
            "$.graders.a: got a grader of type 'multi' inside another; wants none",
        ),
        (
            {**MULTI, "graders": CHECK},
            '$.graders: got one grader; wants an object: key -> grader, e.g. {"first": {...}}',
        ),
        (
            {**MULTI, "calculate_output": "fmt + ac"},
            "$.calculate_output: got the variable 'ac', which is no grader's",
        ),
        (
            {**MULTI, "calculate_output": "fmt ** 2"},
            "$.calculate_output: got '*' at column 6; wants a number, a",
        ),
        (
            {**MULTI, "graders": {"fmt": {**CHECK, "operation": "is"}, "acc": SIMILAR}},
            "$.graders.fmt.operation: got \"is\"; wants 'eq'",
        ),
        ({**OWN[2], "pattern": "("}, "$.pattern: got missing ) at position 1; wants a regular"),
        ({**OWN[4], "function": "grade"}, "$.function: got 'grade'; wants 'package.module:function'"),
        ({**OWN[5], "weights": {"a": 1}}, "$: got weights for a; wants one for each of a, b"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(data, problem):
    found = problems_of(data)
    assert found[0].startswith(f"grader: {problem}"), found
    with pytest.raises(GraderError):
        parse_grader(data)


def test_all_problems_are_listed():
    found = problems_of({**CHECK, "operation": "is", "input": "{{", "extra": 1})
    assert len(found) == 3


@pytest.mark.parametrize(
    "source",
    [
        "def grade(sample, item): return 1",
        "def grade(a, b, c=1): return 1",
        "def grade(*arguments): return 1",
        "grade = lambda sample, item: 1",
        "from math import pow as grade",
        "try:\n  import x\nexcept ImportError:\n  pass\ndef helper(): ...\ndef grade(sample, item, /): return 1",
        "if True:\n  def grade(sample, item): return 1",
        "def grade(a): return 0\ndef grade(sample, item): return 1",
        "def grade(a): return 0\ngrade = lambda sample, item: 1",
        "def with_c(f): return lambda a, b: f(a, b, 1)\n@with_c\ndef grade(a, b, c): return 1",
    ],
)
def test_sources_that_define_grade(source):
    assert problems_of({**PYTHON, "source": source}) == []


# -- multi as a list ------------------------------------------------------------------------------------------


def test_a_list_is_keyed_by_type():
    spec = parse_grader(
        {
            **MULTI,
            "graders": [SIMILAR, CHECK],
            "calculate_output": "text_similarity_score + string_check_score",
        }
    )
    echo = dump_grader(spec)
    assert list(echo["graders"]) == ["text_similarity_score", "string_check_score"]
    assert echo["graders"]["string_check_score"] == CHECK


def test_a_list_is_keyed_by_name_where_the_formula_says_so():
    spec = parse_grader({**MULTI, "graders": [CHECK, SIMILAR], "calculate_output": "exact * near"})
    assert list(dump_grader(spec)["graders"]) == ["exact", "near"]
    twice = {**CHECK, "name": "again"}
    spec = parse_grader({**MULTI, "graders": [CHECK, twice], "calculate_output": "exact + again"})
    assert list(dump_grader(spec)["graders"]) == ["exact", "again"]


def test_a_list_without_possible_keys_is_refused():
    [problem] = problems_of({**MULTI, "graders": [without(CHECK, "name"), without(CHECK, "name")]})
    assert "a list in which string_check_score would be ambiguous; wants an object: key -> grader" in problem


def test_problems_in_a_list_keep_its_positions():
    members = [SIMILAR, {**CHECK, "operation": "is"}]
    found = problems_of({**MULTI, "graders": members, "calculate_output": "string_check_score"})
    assert found[0].startswith("grader: $.graders[1].operation")
    [problem] = problems_of({**MULTI, "graders": members[:1], "calculate_output": "0.5 * t"})
    assert problem.startswith("grader: $.calculate_output: got the variable 't'")


# -- files ----------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "grader.json"
    path.write_text(text, encoding="utf-8")
    return path


def file_problems(folder: Path, text: str) -> list[str]:
    return [str(problem) for problem in check_grader_file(write(folder, text))[1]]


def test_a_file_with_a_byte_order_mark(tmp_path):
    assert read_grader(write(tmp_path, "\ufeff" + json.dumps(CHECK))) == parse_grader(CHECK)


def test_problems_in_a_file_name_their_line(tmp_path):
    text = json.dumps({**MULTI, "graders": {"fmt": {**CHECK, "operation": "is"}, "acc": SIMILAR}}, indent=2)
    line = next(n for n, line in enumerate(text.splitlines(), start=1) if '"is"' in line)
    [problem] = file_problems(tmp_path, text)
    assert problem.startswith(f"grader.json:{line}: $.graders.fmt.operation: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n "a": 1,\n}', 'grader.json:3:1: $: got "}" in "}"; wants no comma before it'),
        (
            '{\n "a": (\n "b"\n )}',
            'grader.json:2:7: $: got "(" in "\\"a\\": ("; wants JSON has no brackets around',
        ),
        ("{'a': 1}", 'grader.json:1:2: $: got "\'"'),
        ('{"a": True}', 'grader.json:1:7: $: got "T"'),
        ('{"a": 1} # note', 'grader.json:1:10: $: got "#"'),
        ('{"a": 1', "grader.json:1:8: $: got the end; wants the end of the object: something is not closed"),
        ("", "grader.json:1:1: $: got the end"),
        (
            '"type": "multi"',
            'grader.json:1:7: $: got ":" in "\\"type\\": \\"multi\\""; wants one value: put { before it',
        ),
        (
            '{"a": 1} {"b": 2}',
            'grader.json:1:10: $: got "{" in "{\\"a\\": 1} {\\"b\\": 2}"; wants one object and no more',
        ),
        ('{"a": NaN}', "grader.json: $: got NaN; wants finite numbers"),
        ('{"a": 1, "a": 2}', 'grader.json: $: got the key "a" twice in one object'),
        ("[" * 100_000, "grader.json: $: got objects nested too deeply"),
    ],
)
def test_slips_in_json_are_shown_where_they_are(tmp_path, text, problem):
    [found] = file_problems(tmp_path, text)
    assert found.startswith(problem)
    with pytest.raises(GraderError):
        read_grader(tmp_path / "grader.json")


def test_no_file(tmp_path):
    with pytest.raises(GraderError, match=r"none\.json: .*cannot be read: No such file"):
        read_grader(tmp_path / "none.json")


def test_the_line_of_a_path():
    text = '{\n "a": [1,\n {"b": "}\\"{",\n  "c": 2}],\n "d": {}\n}'
    paths = [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "c"), ("d",), ("a", 7), ("a", "x"), ("none", "deeper")]
    assert [line_of(text, steps) for steps in paths] == [1, 2, 2, 3, 4, 5, 2, 2, 1]


# -- whatever people write ------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ALL)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
keys = st.sampled_from(sorted({key for data in ALL for key in data}))


@given(st.sampled_from(ALL), st.dictionaries(keys, anything, max_size=3))
def test_any_change_gives_a_grader_or_problems(data, changes):
    spec, problems = check_grader({**data, **changes})
    assert (spec is None) == bool(problems)
    if spec is not None:
        assert parse_grader(dump_grader(spec)) == spec


@given(anything)
def test_anything_gives_a_grader_or_problems(data):
    spec, problems = check_grader(data)
    assert (spec is None) == bool(problems)


@given(st.text(max_size=60) | st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")))
def test_any_file_gives_a_grader_or_problems(text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grader.json"
        path.write_bytes(text.encode("utf-8", "replace"))
        spec, problems = check_grader_file(path)
        assert (spec is None) == bool(problems)


def test_a_bad_key_hides_no_problem_of_the_members():
    """Every problem at once: keys, members, and the grammar of the formula."""
    found = problems_of(
        {
            **MULTI,
            "graders": {"a-b": {**CHECK, "operation": "neq"}, "c d": CHECK, "e": {**CHECK, "input": "{{x"}},
            "calculate_output": "1 +",
        }
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "$.graders.a-b",
        "$.graders.a-b.operation",
        "$.graders.c d",
        "$.graders.e.input",
        "$.calculate_output",
    ]
