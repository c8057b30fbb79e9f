"""`python -m benchmarks.critic`: what it measures of answers with known errors, and what it says without a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.critic import main

ROWS = [
    {"question": "Ann has 2 and 3 pears. How many?", "answer": "She has 2 + 3 = <<2+3=5>>5 pears.\n#### 5"},
    {
        "question": "Bob takes 4 of 9 nuts. What is left?",
        "answer": "He leaves 9 - 4 = <<9-4=5>>5 nuts.\n#### 5",
    },
]


def test_worked_answers_are_read_and_wrong_results_found(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main(["--json", str(path)])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "python -m benchmarks.critic --json train.jsonl"
    assert (report["shares"]["lines_parsed"], report["shares"]["equations_called_wrong"]) == (1, 0)
    wrong = report["errors"]["wrong_result"]
    assert (wrong["injected"], wrong["found_at_the_step"]) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [(["--json"], "no file was named"), (["--json", "none.jsonl"], "none.jsonl is no file")],
)
def test_without_its_file_it_says_which_and_where_to_get_it(
    arguments: list[str], got: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{got}; wants GSM8K's train.jsonl" in said
    assert "https://github.com/openai/grade-school-math" in said
