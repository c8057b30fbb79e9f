"""Formulas by hand, against Python's own arithmetic, and whatever else stands in `calculate_output`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.grading.formula import FormulaError, FormulaValueError, parse_formula

VALUES = {"a": 2.0, "b": 0.5, "acc_1": 1.0, "min": 7.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        (" 1.5 ", 1.5),
        (".5", 0.5),
        ("2.", 2),
        ("1e-3", 0.001),
        ("2E2", 200),
        ("a", 2),
        ("acc_1", 1),
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7-2-1", 4),  # from the left
        ("8/2/2", 2),
        ("2^3^2", 512),  # from the right
        ("2*3^2", 18),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^-1", 0.5),
        ("--2", 2),
        ("2--2", 4),
        ("2*-3", -6),
        ("0.8*acc_1 + 0.2*b", 0.9),
        ("min(a, b)", 0.5),
        ("min(3)", 3),
        ("max(1, a, b, 1.5)", 2),
        ("abs(-3)", 3),
        ("floor(-1.5)", -2),
        ("ceil(1.2)", 2),
        ("exp(0)", 1),
        ("sqrt(9)", 3),
        ("log(exp(2))", 2),  # natural
        ("max(min(a, 1), 0)", 1),
        ("min * 2", 14),  # a grader may have a function's name
        ("min(min, 3)", 3),
        ("a\n+\tb", 2.5),
    ],
)
def test_values_by_hand(text, value):
    assert parse_formula(text, list(VALUES)).evaluate(VALUES) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends too early"),
        ("  ", "ends too early"),
        ("1 +", "ends too early"),
        ("(1", r"ends too early; want '\)'"),
        ("1)", r"'\)' at column 2; want an operator"),
        ("1 2", "'2' at column 3; want an operator"),
        ("a**2", r"column 3; .* a power is written \^"),
        ("+1", r"'\+' at column 1"),
        ("a % 2", "'%' at column 3"),
        ("a < b", "'<' at column 3"),
        ("a if b else 0", "'if' at column 3"),
        ("__import__('os')", r"""'"'"|'_'|"'" at column 12"""),
        ("eval(1)", "'eval' at column 1; want one of the functions min, max"),
        ("a.real", r"'\.' at column 2"),
        ("sqrt(1, 2)", "sqrt of 2 numbers; want one"),
        ("min()", r"'\)' at column 5"),
        ("1e999", "not too large"),
        ("a; b", "';' at column 2"),
        ("{{item.weight}}", r"'\{' at column 1"),
        ("x + 1", "variable 'x', which is no grader's key; want one of: a, b"),
        ("acc + 1", "variable 'acc'.*want 'acc_1'"),  # the slide's cut-off last word
    ],
)
def test_what_is_no_formula_is_refused_with_its_place(text, message):
    with pytest.raises(FormulaError, match=message):
        parse_formula(text, list(VALUES))


@pytest.mark.parametrize(
    "text",
    [
        "1/0",
        "0^-1",
        "log(0)",
        "sqrt(-1)",
        "(-1)^0.5",
        "exp(1000)",
        "10^400",
        "1e308*10",
        "floor(1e308*10)",
        "min(1, 1e308*10)",
        "max(a, 1e308*10 - 1e308*10)",
        "1/(1e308*10)",
    ],  # also where the rest is finite
)
def test_what_has_no_finite_value_says_so(text):
    with pytest.raises(FormulaValueError, match="a = 2"):
        parse_formula(text).evaluate({"a": 2.0})


def test_names():
    assert parse_formula("max(a, b) * a - min").names == {"a", "b", "min"}


def test_long_and_deep_formulas_end_in_an_error_or_a_value():
    assert parse_formula("+".join(["1"] * 4000)).evaluate({}) == 4000
    for text in (
        "(" * 500 + "1" + ")" * 500,
        "-" * 500 + "1",
        "2" + "^2" * 500,
        "abs(" * 500 + "1" + ")" * 500,
    ):
        with pytest.raises(FormulaError, match="levels of nesting"):
            parse_formula(text)
    with pytest.raises(FormulaError, match="10001 characters"):
        parse_formula("1" * 10_001)


numbers = st.floats(min_value=-100, max_value=100).map(lambda x: f"({x!r})")
expressions = st.recursive(
    numbers | st.sampled_from(["a", "b"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
        | st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})")
        | inner.map("abs({})".format)
    ),
    max_leaves=12,
)


@given(expressions)
def test_the_same_as_pythons_arithmetic(text):
    """Our grammar without powers is a part of Python's, so Python knows the answer."""
    wanted: float | None
    try:
        wanted = eval(text, {"__builtins__": {}}, {"a": 2.0, "b": 0.5, "max": max, "abs": abs})
    except ZeroDivisionError:
        wanted = None
    try:
        found = parse_formula(text).evaluate({"a": 2.0, "b": 0.5})
    except FormulaValueError:
        found = None
    if wanted is None or not math.isfinite(wanted):
        assert found is None
    else:
        assert found == wanted


@given(st.text(alphabet="ab1.e+-*/^(), minxqrt_²\n", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_formula_or_a_formula_error(text):
    try:
        formula = parse_formula(text)
    except FormulaError:
        return
    try:
        assert math.isfinite(formula.evaluate(dict.fromkeys(formula.names, 0.5)))
    except FormulaValueError:
        return
