"""A critic of one's own: `function(chain)` returns scores. It may raise, return nonsense or hang without harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from traceback import extract_tb
from typing import Any

from graft.critics.scores import checked, each_timed, failed, overall_score
from graft.grading.function import TimedFunction
from graft.types import Chain, Critique, Outcome

KEYS = ("thoughts", "progress", "overall", "reasons")


def _place(error: BaseException) -> str:
    """Where it was raised, for people."""
    frames = extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


class FunctionCritic:
    """Calls a function with each chain.

    It returns a `Critique`, or a mapping with `thoughts` and `progress` (a number of 0..B for each thought) and, if it
    likes, `overall` (default: the grade's) and `reasons`.
    """

    def __init__(self, function: Callable[[Chain], Any], *, scale: float, timeout_s: float) -> None:
        """
        Args:
            function: takes a chain.
            scale: B, the highest score.
            timeout_s: longest time for one call, seconds.
        """
        self._call = TimedFunction(function, timeout_s=timeout_s, what="critic")
        self._scale = scale

    def __call__(self, chains: Sequence[Chain]) -> list[Critique]:
        """Critiques in the order of the chains.

        Raises:
            GraderError: too many calls hang.
        """
        return each_timed(self._judge, chains)

    def _judge(self, chain: Chain) -> Critique:
        name = self._call.name
        try:
            value = self._call(chain)
        except TimeoutError as error:
            return failed(Outcome.TIMED_OUT, str(error), calls=1)
        if isinstance(value, BaseException):
            problem = f"{name} raised {type(value).__name__}: {value}{_place(value)}"
            return failed(Outcome.CRASHED, problem, calls=1)
        try:
            critique = value if isinstance(value, Critique) else self._read(value, chain)
        except Exception as error:  # anybody's object
            return failed(Outcome.CRASHED, f"{name} returned {value!r}: {error}", calls=1)
        critique = checked(replace(critique, calls=max(1, critique.calls)), chain, self._scale)
        return critique if critique.scored else replace(critique, problem=f"{name}: {critique.problem}")

    def _read(self, value: Any, chain: Chain) -> Critique:
        if not isinstance(value, Mapping) or not {"thoughts", "progress"} <= set(value) <= set(KEYS):
            raise ValueError(
                f"want a Critique, or a mapping with thoughts and progress out of {', '.join(KEYS)}"
            )
        overall = value.get("overall")
        return Critique(
            overall=overall_score(chain.grade, self._scale) if overall is None else float(overall),
            thoughts=tuple(float(score) for score in value["thoughts"]),
            progress=tuple(float(score) for score in value["progress"]),
            reasons=tuple(str(reason) for reason in value.get("reasons", ())),
        )
