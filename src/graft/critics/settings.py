"""Which critic scores the thoughts, as a section of the settings; `type` chooses. `build.py` makes critics of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from graft.grading.check import check_grader, dump_grader
from graft.section import Section


class CriticSection(Section):
    """What all critics have."""

    scale: float = Field(default=10.0, gt=0)
    """B, the highest score of a thought (S), of progress (P) and of the whole (G)."""


class Equations(CriticSection):
    """Checks every equation of a thought in exact arithmetic. Needs no model."""

    type: Literal["equations"] = "equations"

    unknown_operand_factor: float = Field(default=0.5, ge=0, le=1)
    """What a thought keeps of its score when it computes with a number that is neither in the question nor an earlier
    result; where the question states a sum of three or more numbers, when it does not add up what is left of it."""

    sum_order: Literal["any", "left_to_right"] = "any"
    """Of a stated sum: a step adds up any terms that are left, or the first of them."""


class Judge(CriticSection):
    """A judge model scores all thoughts of a completion in one call. Servers and keys: `[grading.judge]`."""

    type: Literal["judge"] = "judge"

    model: str = Field(min_length=1)
    """The judge, as `[grading.judge.models]` names it, or as its server does."""

    form: Literal["scores", "earliest_error"] = "scores"
    """`scores`: two numbers for each thought; `earliest_error`: the first wrong thought, from which scores follow."""

    overall: Literal["grade", "judge"] = "grade"
    """Where G comes from: the grader's score, or the judge."""

    instructions: str = ""
    """Further instructions to the judge, e.g. a rubric."""

    reference_key: str | None = None
    """Key of the row whose value the judge is shown as the right answer; none: it sees none."""

    sampling: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the request, e.g. `{ temperature = 0 }`."""


class ProcessRewardModel(CriticSection):
    """A token-classification model on disk judges each thought at its end."""

    type: Literal["prm"] = "prm"

    model: str = Field(min_length=1)
    """Its folder, or hub id."""

    separator: str = "\n"
    """Text behind each thought, at whose last token the judgement is read: TRL's default. Models with a marker for the
    end of a step name it here."""

    template: Literal["plain", "chat"] = "plain"
    """The row's messages up to the question as plain text, or in the model's chat template."""

    progress: Literal["same", "minimum", "product"] = "minimum"
    """P of a thought: its own judgement, the lowest so far, or the product of all so far."""

    label: int = Field(default=1, ge=0)
    """Index of the label that means right."""

    batch_size: int = Field(default=8, ge=1)
    """Completions that go through the model at once."""


class AnyGrader(CriticSection):
    """Any grader judges each thought by itself (S) and all thoughts up to it (P)."""

    type: Literal["grader"] = "grader"

    grader: dict[str, Any]
    """As in `[grader]`; its scores are meant to be from 0 to 1."""

    @field_validator("grader", mode="before")
    @classmethod
    def _is_a_grader(cls, value: Any) -> Any:
        spec, problems = check_grader(value)
        if spec is None:
            lines = [
                f"critic.grader{p.path.removeprefix('$')}: got {p.got}; wants {p.wants}" for p in problems
            ]
            raise ValueError("\n".join(lines))
        return dump_grader(spec)


class Function(CriticSection):
    """A Python function of one's own, called with each chain; see `docs/critics.md`."""

    type: Literal["function"] = "function"

    function: str
    """`package.module:function` or `file.py:function`."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time for one call."""


class MonteCarlo(CriticSection):
    """How often continuations from the end of a thought are solved, drawn with the policy itself."""

    type: Literal["monte_carlo"] = "monte_carlo"
    """The kind of critic."""

    continuations: int = Field(default=4, ge=1)
    """n, drawn from the prompt and from the end of every thought. Their tokens are counted."""

    threshold: float = 1.0
    """A score of at least this counts as solved."""


CriticSettings = Annotated[
    Equations | Judge | ProcessRewardModel | AnyGrader | Function | MonteCarlo, Field(discriminator="type")
]
