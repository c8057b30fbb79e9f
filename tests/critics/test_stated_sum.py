"""Sums that a question states, and lines that are, or are not, steps of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.critics.arithmetic import equations_in
from graft.critics.equations import EquationsCritic
from graft.critics.stated_sum import TermsLeft, stated_sum
from tests.critics.chains import SARAH, make_chain

SUM = "State the final answer to the following arithmetic problem: 5 - 8 - 1 + 6 =\nOne operation a line, please."


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (SUM, (5, -8, -1, 6)),
        ("What is -2 + 7 − 3?", (-2, 7, -3)),
        ("What is 17 + 25?", None),  # two numbers, as in `2-3 days`
        ("Sam had 5 - 3 - 1 apples and ate 4.", None),  # a number outside it
        ("5 - 8 - 1 or 6 + 2 + 3?", None),
        ("What is 2 * 3 + 4 + 5?", None),
        ("What is 9 - (3 + 4) - 1?", None),
        (SARAH, None),
        ("", None),
    ],
)
def test_the_terms_that_a_question_states(question, expected):
    assert stated_sum(question) == expected


def judge(*lines: str):
    critic = EquationsCritic(scale=10.0, unknown_operand_factor=0.25)
    [critique] = critic([make_chain(*lines, question=SUM)])
    return critique


def test_right_steps_use_the_terms_up():
    critique = judge("5 - 8 = -3", "-3 - 1 = -4", "-4 + 6 = 2")
    assert critique.thoughts == (10, 10, 10)
    assert critique.progress == (5, 7.5, 10)
    assert critique.reasons == ("", "", "")
    assert judge("5 - 8 - 1 = -4", "6 - 4 = 2").progress == (7.5, 10)  # any terms, in any order


@pytest.mark.parametrize(
    "line",
    [
        "3 - 1 = 2",  # the sign of the result is lost
        "-3 + 1 = -2",  # another operator
        "5 - 1 = 4",  # 5 is used up
        "-3 + 7 = 4",  # from nowhere
        "3 * 1 = 3",
    ],
)
def test_a_true_line_that_is_no_step(line):
    critique = judge("5 - 8 = -3", line, "-3 - 1 = -4")
    assert critique.thoughts == (10, 2.5, 10)  # it took nothing away either
    assert critique.progress == (5, 5, 7.5)
    assert critique.reasons[1].endswith("does not add up the terms that are left: -3, -1, 6")


def test_from_left_to_right():
    lines = ("5 - 8 = -3", "-3 + 6 = 3", "-1 - 3 = -4", "-4 + 6 = 1", "1 + 1 = 2")
    critic = EquationsCritic(scale=10.0, unknown_operand_factor=0.0, sum_order="left_to_right")
    [critique] = critic([make_chain(*lines, question=SUM)])
    assert critique.thoughts == (
        10,
        0,
        10,
        0,
        0,
    )  # 6 before 1; then the first two, in either order; then a wrong one
    assert critique.progress == (5, 5, 7.5, 7.5, 7.5)
    assert critique.reasons[1] == "-3 + 6 does not add up the first of the terms that are left: -3, -1, 6"


def test_after_a_wrong_result_the_chain_goes_on_from_it():
    critique = judge("5 - 8 = -2", "-2 - 1 = -3", "-3 + 6 = 3", "3 - 1 = 2")
    assert critique.thoughts == (0, 10, 10, 2.5)
    assert critique.progress == (0, 2.5, 5, 5)  # a wrong line uses nothing, and its terms are gone
    assert critique.reasons[0] == "5 - 8 = -2 is wrong: 5 - 8 = -3"


@given(st.lists(st.integers(-20, 20), min_size=3, max_size=8), st.randoms(use_true_random=False))
def test_adding_up_in_any_order_uses_every_term(terms, random):
    question = " ".join(f"{'-' if term < 0 else '+'} {abs(term)}" for term in terms).removeprefix("+ ")
    question = f"What is {question.replace('- ', '-', 1) if terms[0] < 0 else question}?"
    assert stated_sum(question) == tuple(terms)
    record, left = TermsLeft(terms), list(terms)
    while len(left) > 1:
        first, second = (left.pop(random.randrange(len(left))) for _ in range(2))
        [equation] = equations_in(f"{first} {'-' if second < 0 else '+'} {abs(second)} = {first + second}")
        assert record.take(equation) == []
        left.append(first + second)
    assert record.share_used == 1
