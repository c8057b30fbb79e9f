"""The critic `equations` on chains worked by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from graft.critics.equations import EquationsCritic
from graft.critics.question import numbers_given
from graft.types import Critique, Outcome
from tests.critics.chains import behind, make_chain


def judge(*thoughts: str, scale: float = 10.0, factor: float = 0.5, **chain: Any) -> Critique:
    critic = EquationsCritic(scale=scale, unknown_operand_factor=factor)
    [critique] = critic([make_chain(*thoughts, **chain)])
    return critique


def test_the_chain_of_the_deck():
    critique = judge(
        "Sarah had $50 initially",
        "She bought a book for 15 dollars, leaving her with $50 - 15 = 35$ dollars",
        "The book was about mermaids and knights ...",
        "She then bought a toy for 10 dollars, leaving her with $35 - 10 = 25$ dollars.",
        "Finally, she earned 25 dollars, bringing her total to $25 + 25 = 40$ dollars but then she got another $10",
    )
    assert critique.outcome is Outcome.GRADED
    assert critique.overall == 10
    assert critique.thoughts == (5, 10, 5, 10, 0)
    assert critique.progress == (0, 5, 5, 7.5, 7.5)  # of 50, 15, 10, 25; a wrong equation uses none
    assert critique.reasons == (
        "no equation",
        "",
        "no equation",
        "",
        "$25 + 25 = 40 is wrong: $25 + 25 = 50",
    )


def test_the_last_number_is_used_once():
    critique = judge("50 - 15 = 35", "35 - 10 = 25", "25 + 25 = 50", "25 + 25 = 50")
    assert critique.progress == (5, 7.5, 10, 10)


def test_shares_of_right_equations():
    assert judge("50 - 15 = 35 and 15 + 10 = 26").thoughts == (5,)
    assert judge("50 - 15 = 35, 15 + 10 = 26, 10 + 10 = 21", scale=3).thoughts == (pytest.approx(1),)


def test_operands_from_nowhere():
    critique = judge("50 - 17 = 33", "33 - 10 = 23", "33 - 11 = 21", factor=0.25)
    assert critique.thoughts == (2.5, 10, 0)
    assert critique.reasons[0] == "17 is neither in the question nor a result before"
    assert critique.reasons[1] == ""
    assert "33 - 11 = 22; 11 is neither" in critique.reasons[2]


def test_wrong_results_may_be_used_on():
    """The error is charged where it was made."""
    assert judge("50 - 15 = 36", "36 - 10 = 26").thoughts == (0, 10)


def test_words_of_the_question():
    question = "Ann has three dozen eggs and sells half of them for 25% more. Twice a week she rests."
    given = numbers_given(question)
    assert given.numbers == {Fraction(3): 1, Fraction(25): 1}
    for implied in (12, 2, Fraction(1, 2), Fraction(1, 4), Fraction(5, 4), 125, 7, 1):
        assert Fraction(implied) in given.implied
    critique = judge("3 * 12 = 36", "36 / 2 = 18", "18 * 125% = 22.5", "22.5 * 9 = 202.5", question=question)
    assert critique.thoughts == (10, 10, 10, 5)
    assert critique.progress == (5, 5, 5, 5)


def test_cardinals():
    numbers = numbers_given("One of twenty-five men, two boys and ninety girls; sixteen 16").numbers
    assert numbers == {Fraction(25): 1, Fraction(2): 1, Fraction(90): 1, Fraction(16): 2}
    assert Fraction(120_000_000) in numbers_given("It made $120 million").implied


def test_numbers_of_earlier_messages_are_known_but_need_not_be_used():
    chain = make_chain("5 * 12 = 60", "60 + 7 = 67", question="What do 5 tickets cost?")
    system = ("developer", "A ticket costs 12 euros.")
    [alone], [told] = (
        EquationsCritic(scale=10, unknown_operand_factor=0.5)([chain]),
        EquationsCritic(scale=10, unknown_operand_factor=0.5)([behind(chain, system)]),
    )
    assert alone.thoughts == (5, 5)
    assert told.thoughts == (10, 5)  # 7 comes from nowhere
    assert told.progress == alone.progress == (10, 10)


def test_examples_before_the_question_state_no_sum_of_it():
    chain = make_chain("1 + 2 = 3", "3 + 3 = 6", question="Add up: 1 + 2\n+ 3")
    [critique] = EquationsCritic(scale=10, unknown_operand_factor=0.5)(
        [behind(chain, ("user", "4 + 4 + 1?"), ("assistant", "9"))]
    )
    assert critique.thoughts == (10, 10)
    assert critique.progress == (pytest.approx(20 / 3), 10)


def test_repeated_numbers_count_as_often_as_they_stand():
    critique = judge("5 + 5 = 10", "10 - 5 = 5", question="5 boys with 5 apples lose 5.")
    assert critique.progress == (pytest.approx(20 / 3), 10)


def test_questions_without_numbers():
    assert judge("1 + 1 = 2", question="How many?").progress == (5,)


def test_the_answer_is_no_thought():
    assert judge(answer="2 + 2 = 5").thoughts == ()


@pytest.mark.parametrize(("score", "overall"), [(None, None), (0.0, 0.0), (0.25, 2.5)])
def test_overall(score, overall):
    assert judge("1 + 1 = 2", score=score).overall == overall


def test_many_chains_in_order():
    critic = EquationsCritic(scale=1, unknown_operand_factor=1)
    critiques = critic([make_chain("1 + 1 = 2"), make_chain(), make_chain("1 + 1 = 3", "1 + 1 = 2")])
    assert [critique.thoughts for critique in critiques] == [(1,), (), (0, 1)]
    assert all(critique.seconds >= 0 and critique.calls == 0 for critique in critiques)
