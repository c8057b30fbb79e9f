"""How well does the critic `equations` read worked answers, and which injected errors does it find?

    python -m benchmarks.critic [--json] [--rows N] train.jsonl

Takes GSM8K's worked answers (https://github.com/openai/grade-school-math, `grade_school_math/data/train.jsonl`) with
their calculator spans (`<<48/2=24>>`) removed; the spans say what a line computes. Three questions: how many of the
lines with an equals sign are read (an equation found; every span's result found); how many right lines are called
wrong; and, with a single error put into one step of an answer, how often that step is the first whose score falls.
Errors: a wrong result; a wrong operand; a wrong operator. The last two once with the result kept, so that the equation
no longer holds, and once `carried`: the result is recomputed, and the equation holds.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from graft.critics.arithmetic import equations_in
from graft.critics.equations import EquationsCritic
from graft.critics.symbols import show
from graft.data.rows import Row, read_rows
from graft.types import Chain, Prompt

SPAN = re.compile(r"<<([^<>]*)>>")
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
SIMPLE = re.compile(
    rf"(?P<a>{NUMBER})(?P<gap>[^\d=+*/×÷–−-]*)(?P<op> x |[-+*/×÷–−])"
    rf"(?P<behind>[^\d=]*)(?P<b>{NUMBER})(?P<end>[^=\d]*=\s*\$?)$"
)
"""The end of a text before its span: two numbers and an operator."""

WHERE = "GSM8K's train.jsonl or test.jsonl, from https://github.com/openai/grade-school-math, grade_school_math/data"

OPERATORS = {"+": "+", "-": "-", "–": "-", "−": "-", "*": "*", "×": "*", "x": "*", "/": "/", "÷": "/"}
ERRORS = (
    "wrong_result",
    "wrong_operand",
    "wrong_operator",
    "wrong_operand_carried",
    "wrong_operator_carried",
)
TARGETS = {
    "lines_parsed": ">= 0.90",
    "equations_called_wrong": "<= 0.01",
    "wrong_result": ">= 0.95",
}


@dataclass(frozen=True)
class Step:
    """A line with one span of the form `a op b`, and the places of its parts in the text without spans."""

    line: int
    before: str
    after: str
    parts: re.Match[str]
    result: str
    """As written behind the span."""

    def line_with(self, a: str, operator: str, b: str, result: str) -> str:
        """The line with other parts."""
        parts = self.parts
        expression = f"{a}{parts['gap']}{operator}{parts['behind']}{b}{parts['end']}"
        return f"{self.before[: parts.start()]}{expression}{result}{self.after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "python -m benchmarks.critic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, nargs="?", help=WHERE)
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON; the table goes to standard error")
    options = parser.parse_args(given)
    if options.path is None or not options.path.is_file():
        got = "no file was named" if options.path is None else f"{options.path} is no file"
        parser.error(
            f"{got}; wants {WHERE}. Download it and give its path: python -m benchmarks.critic train.jsonl"
        )
    rows = read_rows(
        str(options.path.resolve()),
        options={},
        limit=options.rows,
        seed=0,
        prompt_key="question",
        base=Path(),
    )
    began = time.perf_counter()
    figures = {**measure_reading(rows), "errors": measure_errors(rows, options.seed)}
    report = harness.report_of(
        "critic",
        [options.path.name if each == str(options.path) else each for each in given],
        machine=harness.machine(),
        settings={"rows": len(rows), "seed": options.seed, "scale": 10, "unknown_operand_factor": 0.5},
        notes=["Errors that keep an equation right can only be found by an operand from nowhere."],
        figures={"targets": TARGETS, **figures, "seconds": round(time.perf_counter() - began, 1)},
    )
    harness.publish(report, as_text(report), as_json=options.json)


def measure_reading(rows: Sequence[Row]) -> dict[str, Any]:
    """What is read of right answers, and what is held against them."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {"not_parsed": [], "called_wrong": [], "unknown_operand": []}
    for row in rows:
        raw = str(row.item["answer"]).split("\n")[:-1]
        lines = [SPAN.sub("", line) for line in raw]
        [critique] = critic()([chain_of_lines(row, lines)])
        counts["answers"] += 1
        counts["answers_with_all_numbers_used"] += critique.progress[-1] == 10 if critique.progress else 0
        for before, line, reason in zip(raw, lines, critique.reasons, strict=True):
            spans = SPAN.findall(before)
            if not spans or "=" not in line:
                continue
            found = equations_in(line)
            results = {value for each in found for value in (each.claimed.value, each.claimed.plain)}
            counts["lines"] += 1
            counts["lines_parsed"] += bool(found)
            counts["lines_with_every_result"] += all(as_fraction(span) in results for span in spans)
            counts["equations"] += len(found)
            counts["equations_called_wrong"] += sum(not each.holds for each in found)
            counts["lines_with_unknown_operand"] += "neither in the question" in reason
            for key, happened in (
                ("not_parsed", not found),
                ("called_wrong", any(not each.holds for each in found)),
                ("unknown_operand", "neither in the question" in reason),
            ):
                if happened and len(examples[key]) < 10:
                    examples[key].append(line)
    shares = {
        "lines_parsed": counts["lines_parsed"] / counts["lines"],
        "lines_with_every_result": counts["lines_with_every_result"] / counts["lines"],
        "equations_called_wrong": counts["equations_called_wrong"] / counts["equations"],
        "lines_with_unknown_operand": counts["lines_with_unknown_operand"] / counts["lines"],
        "answers_with_all_numbers_used": counts["answers_with_all_numbers_used"] / counts["answers"],
    }
    return {"counts": dict(counts), "shares": shares, "examples": examples}


def measure_errors(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """One error of each kind in each answer that has a simple step: where the score first falls."""
    injected: Counter[str] = Counter()
    found: Counter[str] = Counter()
    lowered: Counter[str] = Counter()
    missed: dict[str, list[str]] = {error: [] for error in ERRORS}
    for row in rows:
        rng = random.Random(f"{seed}:{row.index}")
        raw = str(row.item["answer"]).split("\n")[:-1]
        lines = [SPAN.sub("", line) for line in raw]
        steps = list(simple_steps(raw))
        if not steps:
            continue
        [clean] = critic()([chain_of_lines(row, lines)])
        for error in ERRORS:
            step = rng.choice(steps)
            changed = inject(step, error, rng)
            if changed is None:
                continue
            injected[error] += 1
            [critique] = critic()(
                [chain_of_lines(row, [*lines[: step.line], changed, *lines[step.line + 1 :]])]
            )
            pairs = zip(critique.thoughts, clean.thoughts, strict=True)
            first = next((i for i, (now, before) in enumerate(pairs) if now < before), None)
            found[error] += first == step.line
            lowered[error] += first is not None
            if first != step.line and len(missed[error]) < 5:
                missed[error].append(f"{lines[step.line]} -> {changed}")
    return {
        error: {
            "injected": injected[error],
            "found_at_the_step": found[error] / max(1, injected[error]),
            "found_anywhere": lowered[error] / max(1, injected[error]),
            "missed": missed[error],
        }
        for error in ERRORS
    }


def simple_steps(raw: Sequence[str]) -> Iterator[Step]:
    """Lines in which an error can be put: one span, `a op b` before it, its result behind."""
    for place, line in enumerate(raw):
        spans = list(SPAN.finditer(line))
        if len(spans) != 1:
            continue
        before, after = line[: spans[0].start()], line[spans[0].end() :]
        parts, result = SIMPLE.search(before), re.match(NUMBER, after)
        if parts and result and compute(parts["a"], parts["op"], parts["b"]) == as_number(result[0]):
            yield Step(place, before, after[result.end() :], parts, result[0])


def inject(step: Step, error: str, rng: random.Random) -> str | None:
    """The line with the error in it; None where none of a hundred tries makes one (`0 * 0`)."""
    a, operator, b, right = step.parts["a"], step.parts["op"], step.parts["b"], as_number(step.result)
    if error == "wrong_result":
        wrong_result = rng.choice([right + rng.randint(1, 9), right - rng.randint(1, 9), right * 10 + 1])
        return step.line_with(a, operator, b, show(wrong_result))
    for _ in range(100):
        wrong = [a, operator, b]
        if error.startswith("wrong_operator"):
            wrong[1] = rng.choice([each for each in "+-*/" if each != OPERATORS[operator.strip()]])
        else:
            place = rng.choice([0, 2])
            wrong[place] = show(as_number(wrong[place]) + rng.choice([-1, 1]) * rng.randint(1, 9))
        value = compute(wrong[0], wrong[1], wrong[2])
        if value is None or value == right or wrong[0].startswith("-") or wrong[2].startswith("-"):
            continue
        if not error.endswith("carried"):
            return step.line_with(wrong[0], wrong[1], wrong[2], step.result)
        ends = as_number(show(value)) == value
        written = show(value) if ends else f"{float(value):.2f}"
        return step.line_with(wrong[0], wrong[1], wrong[2], written)
    return None


def compute(a: str, operator: str, b: str) -> Fraction | None:
    """The value; None where it divides by zero."""
    left, right = as_number(a), as_number(b)
    sign = OPERATORS[operator.strip()]
    if sign == "/":
        return left / right if right else None
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def as_number(text: str) -> Fraction:
    """A number as written."""
    return Fraction(text.replace(",", "").rstrip("."))


def as_fraction(span: str) -> Fraction | None:
    """The result of a span; None where it is no number."""
    try:
        return as_number(span.rpartition("=")[2].strip().strip("$%"))
    except (ValueError, ZeroDivisionError):
        return None


def critic() -> EquationsCritic:
    """With its defaults."""
    return EquationsCritic(scale=10, unknown_operand_factor=0.5)


def chain_of_lines(row: Row, lines: Sequence[str]) -> Chain:
    """A worked answer, a thought a line."""
    prompt = Prompt(row.index, row.messages, row.item, np.zeros(1, np.int32), row.question)
    return Chain(prompt, tuple(lines), None, ())


def as_text(report: Mapping[str, Any]) -> str:
    """The shares as a table."""
    rows = [[name, f"{share:.4f}", TARGETS.get(name, "")] for name, share in report["shares"].items()]
    rows += [
        [f"{name}, found at the step", f"{entry['found_at_the_step']:.4f}", TARGETS.get(name, "")]
        for name, entry in report["errors"].items()
    ]
    return f"{harness.header(report)}\n{harness.table(['share', 'value', 'target'], rows)}"


if __name__ == "__main__":
    main()
