"""What all critics share: G from the grade, critiques of failures, clocks."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import Any, TypeVar

from graft.grading.beside import LOOK_EVERY_S
from graft.types import Chain, Critique, Grade, Grader, Outcome, Sample, TokenUsage

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


def overall_score(grade: Grade | None, scale: float) -> float | None:
    """G = B x the grade's score; None without a score. Scores outside 0..1 give a G outside 0..B."""
    return None if grade is None or grade.score is None else scale * grade.score


def clipped(score: float, scale: float) -> float:
    """A score of 0..1 as one of 0..B; what lies outside counts as the nearer end."""
    return scale * min(1.0, max(0.0, score))


def failed(outcome: Outcome, problem: str, **cost: Any) -> Critique:
    """The critique of a critic that could not judge; `cost` as far as it is known."""
    return replace(Critique(outcome=outcome, problem=problem[:1000]), **cost)


def each_timed(
    judge: Callable[[Chain], Critique],
    chains: Sequence[Chain],
    *,
    calls_at_once: int = 1,
    waiting: Callable[[], None] | None = None,
) -> list[Critique]:
    """Judge chains one by one, or so many side by side, each with the seconds that it took; `waiting` as in
    `side_by_side`."""

    def timed(chain: Chain) -> Critique:
        began = time.perf_counter()
        critique = judge(chain)
        return replace(critique, seconds=time.perf_counter() - began)

    return side_by_side(timed, chains, calls_at_once=calls_at_once, waiting=waiting)


def side_by_side(
    ask: Callable[[Asked], Answered],
    items: Sequence[Asked],
    *,
    calls_at_once: int,
    waiting: Callable[[], None] | None = None,
) -> list[Answered]:
    """Answers in the order of the items.

    Args:
        ask: may wait for a server.
        items: what is asked about.
        calls_at_once: so many are asked about at the same time, on threads that are daemons: a hanging service keeps
            nobody.
        waiting: called now and then; raises if the user wants to stop, and then nothing more is asked.

    Raises:
        Exception: what `ask` or `waiting` raises.
    """
    if waiting is None and (calls_at_once == 1 or len(items) < 2):
        return [ask(item) for item in items]
    places: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(items)):
        places.put(place)
    answers: list[Future[Answered]] = [Future() for _ in items]

    def work() -> None:
        while (place := _next(places)) is not None:
            try:
                answers[place].set_result(ask(items[place]))
            except BaseException as error:
                answers[place].set_exception(error)

    for _ in range(min(calls_at_once, len(items))):
        threading.Thread(target=work, daemon=True, name="graft-critic").start()
    pending = set(answers)
    try:
        while pending:
            if waiting is not None:
                waiting()
            done, pending = wait(pending, timeout=LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
            for answer in done:
                answer.result()
    finally:
        while _next(places) is not None:
            pass  # nobody asks about what is left
    return [answer.result() for answer in answers]


def _next(places: queue.SimpleQueue[int]) -> int | None:
    try:
        return places.get_nowait()
    except queue.Empty:
        return None


def share_of_time(critiques: Sequence[Critique], began: float) -> list[Critique]:
    """The time since `began`, an equal share for each of the critiques that came of it together."""
    seconds = (time.perf_counter() - began) / max(1, len(critiques))
    return [replace(critique, seconds=seconds) for critique in critiques]


def total_usage(grades: Sequence[Grade]) -> Mapping[str, TokenUsage]:
    """Tokens that several grades took together, by model."""
    total: dict[str, TokenUsage] = {}
    for grade in grades:
        for model, usage in grade.usage.items():
            total[model] = total.get(model, TokenUsage()) + usage
    return total


def checked(critique: Critique, chain: Chain, scale: float) -> Critique:
    """The same critique if it fits the chain, else one that says what is wrong with it.

    Thoughts and progress must have one finite score of 0..B for each thought, and reasons one text each or none at all.
    """
    if not critique.scored:
        return critique
    count = len(chain.thoughts)
    critique = critique if critique.reasons else replace(critique, reasons=("",) * count)
    misfit = _misfit(critique, count, scale)
    if misfit is None:
        return critique
    outcome, problem = misfit
    cost = {name: getattr(critique, name) for name in ("calls", "usage", "sampled_tokens")}
    return failed(outcome, problem, **cost)


def _misfit(critique: Critique, count: int, scale: float) -> tuple[Outcome, str] | None:
    for name in ("thoughts", "progress", "reasons"):
        entries = getattr(critique, name)
        if len(entries) != count:
            return Outcome.CRASHED, (
                f"{len(entries)} entries in '{name}' for a chain of {count} thoughts; want one for each thought"
            )
    scores = (*critique.thoughts, *critique.progress)
    overall = () if critique.overall is None else (critique.overall,)
    if not all(map(math.isfinite, (*scores, *overall))):
        return Outcome.NOT_FINITE, f"scores of {(*scores, *overall)}; they must be finite"
    if not all(0 <= score <= scale for score in scores):
        return Outcome.CRASHED, f"scores of {scores}; want 0 to {scale:g}"
    return None


def grade_each(
    grader: Grader, samples: Sequence[Sample], *, waiting: Callable[[], None] | None = None
) -> list[Grade]:
    """Grades in the order of the samples, as many side by side as the grader allows (`calls_at_once`); `waiting` as in
    `side_by_side`."""
    calls_at_once = getattr(grader, "calls_at_once", 1)
    if waiting is None and (calls_at_once == 1 or len(samples) < 2):
        return list(grader(samples))
    return side_by_side(
        lambda sample: grader([sample])[0], samples, calls_at_once=calls_at_once, waiting=waiting
    )
