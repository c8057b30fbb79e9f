"""Do `number` and `math` give every reference of GSM8K full marks?

    python -m benchmarks.gsm8k_references train.jsonl

Reads the rows through the importer. The completion is the row's own worked answer, the reference what stands after its
last `####`. Ends with status 1 if any row is not given full marks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

from graft.config import Grading
from graft.data.rows import read_rows
from graft.graders import open_grader
from graft.grading.check import parse_grader
from graft.grading.number import numbers_in
from graft.grading.offline import grade_all, sample_of_text

PLAIN = re.compile(r"-?\d+(\.\d+)?")


def main() -> None:
    """Print the agreement and what the rows needed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="GSM8K's train.jsonl or test.jsonl")
    arguments = parser.parse_args()
    rows = read_rows(
        str(arguments.rows.resolve()), options={}, limit=None, seed=0, prompt_key="question", base=Path()
    )
    references = [str(row.item["answer"]).rpartition("####")[2].strip() for row in rows]
    samples = [
        sample_of_text(str(row.item["answer"]), {**row.item, "reference": reference}, row=row.index)
        for row, reference in zip(rows, references, strict=True)
    ]
    report: dict[str, object] = {
        "rows": len(rows),
        "references_with_thousands_commas": sum("," in reference for reference in references),
        "references_otherwise_not_plain_numbers": sum(
            PLAIN.fullmatch(reference.replace(",", "")) is None for reference in references
        ),
        "worked_answers_without_a_number": sum(not numbers_in(str(row.item["answer"])) for row in rows),
    }
    missed = 0
    for name, spec in {
        "number": {"type": "number", "key": "reference"},
        "math": {"type": "math", "reference": "{{item.reference}}"},
    }.items():
        grader = open_grader(parse_grader(spec), Grading(), base=Path())
        began = time.perf_counter()
        graded = [grade for grade, _ in grade_all(grader, samples)]
        seconds = time.perf_counter() - began
        grader.close()
        wrong = [row.where for row, grade in zip(rows, graded, strict=True) if grade.score != 1.0]
        missed += len(wrong)
        report[name] = {
            "agree": len(rows) - len(wrong),
            "share": (len(rows) - len(wrong)) / len(rows),
            "disagree": wrong[:20],
            "samples_per_s": round(len(rows) / seconds, 1),
        }
    print(json.dumps(report, indent=2))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
