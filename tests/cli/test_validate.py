"""`graft validate`: every problem with its place, and what answers get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
ROWS = [{"messages": [{"role": "user", "content": f"{n} + 1?"}], "answer": str(n + 1)} for n in range(10)]

SETTINGS = 'run = "r"\nmodel.name = "m"\ndata.source = "rows.jsonl"\ntraining.steps = 1\n[grader]\n'

SLIDE_JUDGE = """{
    "type": "score_model",
    "name": "Example score model grader",
    "input": [
        {
            "role": "user",
            "content": (
                "Score how close the reference answer is\\n\\
                " Return just a floating point score\\n\\
                " Reference answer: {{item.label}}\\n\\n"
                " Model answer: {{sample.output_text}}"
            ),
        }
    ],
    "model": "gpt-4o-2024-08-06",
    "sampling_params": {
        "temperature": 1,
        "top_p": 1,
        "seed": 42,
    },
}
"""
"""As OpenAI's reference page and the slide print it: Python's string syntax and trailing commas."""

SLIDE_MULTI = """"type": "multi",
"name": "example multi grader",
"graders": [
  {
    "type": "text_similarity",
    "name": "example text similarity grader",
    "input": "The graded text",
    "reference": "The reference text",
    "evaluation_metric": "fuzzy_match"
  },
  {
    "type": "string_check",
    "name": "Example string check grader",
    "input": "{{sample.output_text}}",
    "reference": "{{item.label}}",
    "operation": "eq"
  }
],
"calculate_output": "0.5 * text_similarity_score + 0.5 * s"
"""
"""The slide begins after the opening brace and cuts the formula off."""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return path

    return write


def test_what_is_right(graft, write):
    result = graft("validate", write("g.json", CHECK), write("rows.jsonl", ROWS))
    assert (result.code, result.out) == (0, "")
    assert result.err == "no problems, 10 usable rows\n"


def test_every_problem_of_every_file(graft, write):
    grader = write("g.json", {**CHECK, "operation": "is", "nmae": 1})
    bad = [*ROWS, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}, {"answer": 3}]
    result = graft("validate", grader, write("rows.jsonl", bad))
    assert result.code == 5
    assert [line.partition(": got")[0] for line in result.out.splitlines()] == [
        "g.json:6: $.operation",
        "g.json:7: $.nmae",
        "rows.jsonl:11: $.messages",
        "rows.jsonl:12: $.messages[0].content",
        "rows.jsonl:13: $",
    ]
    assert "5 problems, 10 usable rows" in result.err


def test_rows_are_checked_against_the_grader_and_all_are_listed(graft, write):
    lacking = [{key: value for key, value in row.items() if key != "answer"} for row in ROWS] * 2
    result = graft("validate", write("rows.jsonl", lacking), write("g.json", CHECK))
    assert result.code == 3
    assert len(result.out.splitlines()) == 20
    assert all("$.answer: got nothing" in line for line in result.out.splitlines())


def test_few_rows_and_shared_questions_are_notes(graft, write):
    result = graft("validate", write("a.jsonl", ROWS), write("b.jsonl", ROWS[:2]))
    assert result.code == 0
    assert "note: b.jsonl:1: the same question as a.jsonl:1" in result.err
    assert "note: b.jsonl: 2 rows; OpenAI's service wanted 10" in result.err


@pytest.mark.parametrize("depth", ["body", "method", "reinforcement"])
def test_the_body_of_a_job(graft, write, depth):
    settings = {
        "grader": {**CHECK, "input": "{{sample.output_json.label}}"},
        "hyperparameters": {"n_epochs": 2},
    }
    schema = {"type": "object", "properties": {"label": {"type": "string"}}}
    settings["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "o", "strict": True, "schema": schema},
    }
    method = {"type": "reinforcement", "reinforcement": settings}
    body = {"body": {"model": "o4-mini", "method": method}, "method": method, "reinforcement": settings}[
        depth
    ]
    rows = write("rows.jsonl", ROWS)
    assert graft("validate", write("job.json", body), rows).code == 0
    settings["grader"]["operation"] = "is"
    result = graft("validate", write("job.json", body), rows)
    assert result.code == 5
    path = {
        "body": "method.reinforcement.grader",
        "method": "reinforcement.grader",
        "reinforcement": "grader",
    }[depth]
    line = {"body": 11, "method": 9, "reinforcement": 7}[depth]
    assert result.out.splitlines()[0].startswith(f'job.json:{line}: $.{path}.operation: got "is"; wants ')
    settings["response_format"] = "json"
    result = graft("validate", write("job.json", body))
    assert result.code == 5
    assert f'{path.removesuffix("grader")}response_format: got "json"; wants an object' in result.out
    settings["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "o", "schema": {"type": "objekt"}},
    }
    [problem] = [
        line for line in graft("validate", write("job.json", body)).out.splitlines() if "objekt" in line
    ]
    assert "response_format.json_schema.schema: got $.type: 'objekt' is not" in problem
    assert not problem.startswith("job.json:1:")
    del settings["response_format"]
    settings["grader"]["operation"] = "eq"
    result = graft("validate", write("job.json", body), rows)
    assert (result.code, len(result.out.splitlines())) == (3, 10)
    assert "wants a response_format" in result.out


def test_the_body_of_a_job_without_a_grader(graft, write):
    body = {"method": {"type": "reinforcement", "reinforcement": {"hyperparameters": {}}}}
    result = graft("validate", write("job.json", body))
    assert result.code == 5
    assert "$.method.reinforcement.grader: got nothing; wants a grader object" in result.out


def test_json_echoes_the_grader_as_it_was_understood(graft, write):
    spec = {"type": "multi", "graders": [CHECK], "calculate_output": "string_check_score"}
    found = json.loads(graft("validate", write("g.json", spec), "--json").out)
    assert found["grader"] == {
        "type": "multi",
        "name": "multi",
        "graders": {"string_check_score": CHECK},
        "calculate_output": "string_check_score",
    }


def test_settings_with_a_grader(graft, write):
    text = SETTINGS + 'type = "number"\nkey = "sum"\n'
    result = graft("validate", write("c.toml", text), write("rows.jsonl", ROWS))
    assert (result.code, len(result.out.splitlines())) == (3, 10)
    assert "$.sum" in result.out
    assert graft("validate", write("c.toml", text.replace('key = "sum"', "ky = 1"))).code == 2
    write("g.json", {**CHECK, "operation": "is"})
    result = graft("validate", write("c.toml", SETTINGS + 'file = "g.json"\n'))
    assert "g.json:6: $.operation" in result.out


def test_settings_that_do_not_fit_the_range_of_the_scores(graft, write):
    message = {"role": "user", "content": "{{item.answer}}"}
    write("g.json", {"type": "score_model", "model": "m", "input": [message], "range": [0, 10]})
    write("rows.jsonl", ROWS)
    result = graft("validate", write("c.toml", SETTINGS + 'file = "g.json"\n'))
    assert result.code == 0
    assert "note: c.toml: scores go to 10, and everything from 1 counts as solved" in result.err


@pytest.mark.parametrize("name", ["x.txt", "none.json", "none.jsonl", "none.toml"])
def test_files_that_are_none(graft, tmp_path, name):
    result = graft("validate", tmp_path / name)
    assert result.code == {"none.json": 5, "none.toml": 2}.get(name, 3)
    assert name in result.out


NUMBER = 'type = "number"\n'


def settings(*lines: str, grader: str = NUMBER) -> str:
    """A settings file whose `data.source` is rows.jsonl, with further lines."""
    return SETTINGS.replace("[grader]", "\n".join([*lines, "[grader]"])) + grader


def test_the_rows_that_settings_name_are_checked_and_counted(graft, write):
    write("rows.jsonl", ROWS)
    config = write("c.toml", settings())
    result = graft("validate", config)
    assert (result.code, result.out, result.err) == (0, "", "no problems, 10 usable rows\n")
    assert graft("validate", config, config.parent / "rows.jsonl").err == "no problems, 10 usable rows\n"
    write("rows.jsonl", [*ROWS[:3], {"messages": []}, {**ROWS[4], "answer": "five"}])
    result = graft("validate", config)
    assert (result.code, [line.partition(": got")[0] for line in result.out.splitlines()]) == (
        3,
        ["rows.jsonl:4: $.messages", "rows.jsonl:5: $.answer"],
    )
    limited = write("limited.toml", settings("data.rows = 3"))  # a run reads no further
    assert graft("validate", limited).err == "no problems, 3 usable rows\n"
    write("columns.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    text = settings('data.prompt_key = "question"').replace("rows.jsonl", "columns.jsonl")
    assert graft("validate", write("c.toml", text)).err == "no problems, 1 usable rows\n"


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (['data.held_out_source = "held.jsonl"'], 3, "2 questions are in both"),
        (["data.held_out = 10"], 3, "cannot hold out 10 of 10 rows"),
        (['data.held_out_source = "none.jsonl"'], 3, "none.jsonl"),
        (['data.held_out_source = "held.txt"'], 2, "held.txt"),
        (["data.options = { a = 1 }"], 2, "a file has no options"),
    ],
)
def test_rows_of_settings_that_a_run_would_refuse(graft, write, lines, code, said):
    write("rows.jsonl", ROWS)
    write("held.jsonl", ROWS[:2])
    result = graft("validate", write("c.toml", settings(*lines)))
    assert (result.code, said in result.out) == (code, True), result.out


def test_held_out_rows_of_settings_are_checked_and_counted(graft, write):
    write("rows.jsonl", ROWS[:7])
    write("held.jsonl", ROWS[7:])
    result = graft("validate", write("c.toml", settings('data.held_out_source = "held.jsonl"')))
    assert (result.code, result.err) == (0, "no problems, 10 usable rows\n")


def test_the_hub_is_not_asked(graft, write):
    text = settings().replace("rows.jsonl", "hub:some/set")
    result = graft("validate", write("c.toml", text))
    assert (result.code, "note: hub:some/set: not read here" in result.err) == (0, True)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nofile.py:critic", "nofile.py: cannot be read"),
        ("own.py:critc", "did you mean 'critic'?"),
        ("own.py:critic", None),
    ],
)
def test_functions_that_settings_name(graft, write, reference, said):
    write("rows.jsonl", ROWS)
    write("own.py", "def critic(chain):\n    return {}\n")
    critic = f'algorithm = {{ name = "rft", critic = {{ type = "function", function = "{reference}" }} }}'
    result = graft("validate", write("c.toml", settings(critic)))
    if said is None:
        assert (result.code, result.out) == (0, "")
    else:
        assert result.code == 2
        assert result.out.startswith("c.toml: algorithm.critic.function: ")
        assert said in result.out


# -- references -----------------------------------------------------------------------------------------------


def test_references_get_full_marks_and_others_less(graft, write):
    files = write("g.json", CHECK), write("rows.jsonl", ROWS)
    result = graft("validate", *files, "--reference-key", "answer")
    assert result.code == 0
    assert [line.split()[:2] for line in result.out.splitlines()] == [
        ["reference", "1.000"],
        ["empty", "0.000"],
        ["wrong", "0.000"],
        ["truncated", "0.000"],
    ]
    as_json = json.loads(graft("validate", *files, "--reference-key", "answer", "--json").out)
    assert [trial["kind"] for trial in as_json["trials"]] == ["reference", "empty", "wrong", "truncated"]
    assert as_json["trials"][0] == {"kind": "reference", "mean": 1.0, "failed": 0}


def test_a_reference_without_full_marks_is_a_problem(graft, write):
    rows = [*ROWS[:9], {**ROWS[9], "answer": "10 apples"}]
    spec = {"type": "regex", "pattern": r"^\d+$"}
    result = graft("validate", write("g.json", spec), write("rows.jsonl", rows), "--reference-key", "answer")
    assert result.code == 3
    [problem] = [line for line in result.out.splitlines() if line.startswith("rows.jsonl")]
    assert problem == "rows.jsonl:10: $: got the score 0 of 1; wants full marks for the reference"


@pytest.mark.parametrize("answer", [{"city": "S\u00e3o Paulo"}, ["a", 1], True, 3], ids=repr)
def test_a_reference_that_is_no_text_is_written_as_templates_write_it(graft, write, answer):
    rows = [{**row, "answer": answer} for row in ROWS]
    result = graft("validate", write("g.json", CHECK), write("rows.jsonl", rows), "--reference-key", "answer")
    assert result.code == 0, result.out


def test_a_reference_key_that_is_not_there(graft, write):
    files = write("g.json", CHECK), write("rows.jsonl", ROWS)
    result = graft("validate", *files, "--reference-key", "golden")
    assert result.code == 3
    assert "no key 'golden'" in result.err


def test_references_of_settings(graft, write):
    write("rows.jsonl", ROWS)
    result = graft("validate", write("c.toml", settings()), "--reference-key", "answer")
    assert result.code == 0
    assert result.out.splitlines()[0].split()[:2] == ["reference", "1.000"]


@pytest.mark.parametrize(("name", "lacks"), [("g.json", "needs rows"), ("rows.jsonl", "needs a grader")])
def test_references_need_grader_and_rows(graft, write, name, lacks):
    write("g.json", CHECK)
    write("rows.jsonl", ROWS)
    result = graft("validate", write(name, CHECK if name == "g.json" else ROWS), "--reference-key", "answer")
    assert (result.code, lacks in result.err) == (2, True)


# -- the slide's two examples ---------------------------------------------------------------------------------


def test_the_slides_judge_is_refused_where_its_json_ends(graft, write):
    result = graft("validate", write("judge.json", SLIDE_JUDGE))
    assert result.code == 5
    assert result.out.startswith('judge.json:7:24: $: got "(" in ')
    assert "JSON has no brackets around text: write one string" in result.out


def test_the_slides_judge_is_taken_when_mended(graft, write):
    mended = {
        "type": "score_model",
        "name": "Example score model grader",
        "input": [
            {
                "role": "user",
                "content": "Score how close the reference answer is\n Return just a floating point score\n"
                " Reference answer: {{item.label}}\n\n Model answer: {{sample.output_text}}",
            }
        ],
        "model": "gpt-4o-2024-08-06",
        "sampling_params": {"temperature": 1, "top_p": 1, "seed": 42},
    }
    rows = [{**row, "label": "x"} for row in ROWS]
    assert graft("validate", write("judge.json", mended), write("rows.jsonl", rows)).code == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (SLIDE_MULTI, 'multi.json:1:7: $: got ":"'),
        ("{" + SLIDE_MULTI, "multi.json:19:60: $: got the end"),
        ("{" + SLIDE_MULTI + "}", "multi.json:19: $.calculate_output: got the variable 's'"),
    ],
    ids=["as printed", "opened", "closed"],
)
def test_the_slides_multi_grader_is_refused_where_it_is_cut(graft, write, text, place):
    result = graft("validate", write("multi.json", text))
    assert result.code == 5
    assert result.out.startswith(place)


def test_the_slides_cut_off_name_is_guessed_in_the_message(graft, write):
    result = graft("validate", write("multi.json", "{" + SLIDE_MULTI + "}"))
    assert result.out.endswith("wants 'string_check_score'\n")


def test_the_slides_multi_grader_is_taken_when_mended(graft, write):
    mended = "{" + SLIDE_MULTI.replace("0.5 * s", "0.5 * string_check_score") + "}"
    rows = [{**row, "label": "x"} for row in ROWS]
    result = graft("validate", write("multi.json", mended), write("rows.jsonl", rows))
    assert (result.code, result.out) == (0, "")
