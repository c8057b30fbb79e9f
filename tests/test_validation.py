"""Whatever people hand to `graft validate` and to graders: problems and grades, never a crash."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from graft.grading.build import Services, build_grader
from graft.grading.check import dump_grader, parse_grader
from graft.grading.observe import Observer
from graft.grading.response import run_response
from graft.types import Grade
from graft.validation import check_files
from tests.grading.samples import sample

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "answer", "tools", "type", "text"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": json_values}
    ),
    max_size=3,
)
rows = st.fixed_dictionaries(
    {"messages": messages | json_values}, optional={"answer": json_values, "tools": json_values}
)

GRADER = parse_grader(
    {
        "type": "multi",
        "graders": {
            "exact": {
                "type": "string_check",
                "input": "{{sample.output_text}}",
                "reference": "{{item.answer}}",
                "operation": "ilike",
            },
            "near": {
                "type": "text_similarity",
                "input": "{{sample.output_json.x[0]}}",
                "reference": "{{item.meta.a}}",
                "evaluation_metric": "rouge_l",
            },
            "form": {"type": "regex", "pattern": r"(\d+|[a-z]+)*$"},
        },
        "calculate_output": "exact / (near + form)",
    }
)


def problems_of(name: str, raw: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        found = check_files([path])
        return [*found.problems, *found.notes]


@given(st.lists(rows | json_values, max_size=4))
def test_any_rows_give_rows_or_problems(values):
    raw = "\n".join(json.dumps(value) for value in values).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(raw)
        found = check_files([path])
    lines = sum(bool(line.strip()) for line in raw.splitlines())
    bad = {problem.partition(": ")[0] for problem in found.row_problems}
    assert len(found.rows) + len(bad) == max(lines, 1)


@given(st.binary(max_size=60), st.sampled_from(["x.jsonl", "x.csv", "x.json", "x.toml"]))
def test_any_bytes_give_problems(raw, name):
    assert problems_of(name, raw)


FILES = {
    "grader.json": json.dumps(dump_grader(GRADER), indent=1),
    "rows.jsonl": '{"messages": [{"role": "user", "content": "q"}], "answer": "4"}\n{"prompt": "p"}\n',
    "rows.csv": 'prompt,answer\nq,1\n"a,b",2\n',
}
SLIPS = [
    *'"{}[]:,\\\n',
    "{{",
    "}}",
    "\\ud800",
    "\x00",
    "1e999",
    "NaN",
    "9" * 400,
    "null",
    "\ufeff",
    '"type":',
]


@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_slip_in_a_good_file_gives_problems_that_can_be_printed(name, data):
    text = FILES[name]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        text = text[:place] + data.draw(st.sampled_from(["", *SLIPS])) + text[place + cut :]
    for problem in problems_of(name, text.encode()):
        assert problem.encode()


def test_half_a_character_in_a_grader_is_a_problem():
    spec = {"type": "string_check", "input": "{{ \ud800 }}", "reference": "", "operation": "eq"}
    [problem] = problems_of("grader.json", json.dumps(spec).encode())
    assert "half of a character, '\\ud800'" in problem


@given(json_values)
def test_any_job_body_gives_problems(value):
    body: Any = {
        "method": {"type": "reinforcement", "reinforcement": {"grader": value, "response_format": value}}
    }
    assert problems_of("job.json", json.dumps(body).encode())


@given(st.text(max_size=30), st.dictionaries(st.sampled_from(["answer", "meta"]), json_values, max_size=2))
def test_any_sample_of_any_row_gets_a_grade_and_a_response(text, item):
    for options in ({"zero": True}, {"zero": False}):
        for observe in (Observer(any_json=True), Observer({"type": "json_object"})):
            [grade] = build_grader(GRADER, Services(), observe, **options)([sample(text, **item)])
            assert isinstance(grade, Grade)
            assert grade.scored or (grade.failed and not options["zero"])
            json.dumps(run_response(GRADER, grade, seconds=0.0), allow_nan=False)
