"""Template strings by hand, and whatever else people write between braces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.grading.template import MissingVariableError, TemplateError, as_text, parse_template

NAMESPACES = {
    "item": {
        "answer": "4",
        "n": 4,
        "half": 0.5,
        "yes": True,
        "nothing": None,
        "meta": {"deep": [{"key-1": "x"}, "é"]},
        "schlüssel": "ü",
    },
    "sample": {"output_text": "four", "choices": [{"message": {"content": "four"}}]},
}


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("", ""),
        ("no reference", "no reference"),
        ("{{item.answer}}", "4"),
        ("{{ item.answer }}", "4"),
        ("{{\n\titem.answer\n}}", "4"),
        ("a{{item.answer}}b{{sample.output_text}}c", "a4bfourc"),
        ("{{item.answer}}{{item.answer}}", "44"),
        ("{{item.meta.deep[0].key-1}}", "x"),
        ("{{item.meta.deep[1]}}", "é"),
        ("{{sample.choices[0].message.content}}", "four"),
        ("{{item.schlüssel}}", "ü"),
        # what is not text
        ("{{item.n}}", "4"),
        ("{{item.half}}", "0.5"),
        ("{{item.yes}}", "true"),
        ("{{item.nothing}}", "null"),
        ("{{item.meta.deep}}", '[{"key-1":"x"},"é"]'),
        # braces that are no reference
        ("{item.answer}", "{item.answer}"),
        ('{"a": {"b": 1}}', '{"a": {"b": 1}}'),
        ("}} {", "}} {"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("{{item.answer}}}", "4}"),
    ],
)
def test_rendering(template, rendered):
    assert parse_template(template).render(NAMESPACES) == rendered


@pytest.mark.parametrize("namespace", ["item", "sample"])
def test_a_namespace_alone_is_its_whole_content_as_json(namespace):
    assert json.loads(parse_template(f"{{{{{namespace}}}}}").render(NAMESPACES)) == NAMESPACES[namespace]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{item.answer", r"line 1, column 1 is not closed"),
        ("a\nb {{", r"line 2, column 3 is not closed"),
        ("{{}}", "is no path"),
        ("{{ }}", "is no path"),
        ("{{row.answer}}", "no namespace 'row'; want item"),
        ("{{answer}}", "no namespace 'answer'"),
        ("{{item.}}", "is no path"),
        ("{{item..a}}", "is no path"),
        ("{{item.a | upper}}", "is no path"),
        ("{{item.a + 1}}", "is no path"),
        ("{{item['a']}}", "is no path"),
        ('{{item["a"]}}', "is no path"),
        ("{{item.a[-1]}}", "is no path"),
        ("{{item.a[*]}}", "is no path"),
        ("{{item.*}}", "is no path"),
        ("{{item.a[]}}", "is no path"),
        ("{{item.a b}}", "is no path"),
        ("{{{item.a}}}", "is no path"),
    ],
)
def test_what_is_no_template_is_refused_with_its_place(template, message):
    with pytest.raises(TemplateError, match=message):
        parse_template(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{item.anwser}}", r"\{\{item\.anwser\}\}: no key 'anwser'; there are: answer, n"),
        ("{{item.answer.x}}", "of what is no object"),
        ("{{item.answer[0]}}", "of what is no list"),
        ("{{item.meta.deep[2]}}", "of a list of 2"),
        ("{{item.nothing.x}}", "of what is no object"),
    ],
)
def test_what_leads_nowhere_is_named(template, message):
    with pytest.raises(MissingVariableError, match=message):
        parse_template(template).render(NAMESPACES)


def test_what_is_inserted_is_not_a_template():
    values = {"item": {"a": "{{item.b}}", "b": "secret"}, "sample": {}}
    assert parse_template("{{item.a}}").render(values) == "{{item.b}}"


@given(st.text(alphabet="{}item.sample[0] |\nx", max_size=60))
def test_any_text_is_a_template_or_a_template_error(text):
    try:
        template = parse_template(text)
    except TemplateError:
        return
    try:
        template.render(NAMESPACES)
    except MissingVariableError:
        return


@given(st.text())
def test_text_without_two_opening_braces_is_itself(text):
    text = text.replace("{{", "")
    assert "{{" in text or parse_template(text).render(NAMESPACES) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_a_value_that_is_not_text_prints_as_json_that_reads_back(value):
    assert as_text(value) == value if isinstance(value, str) else json.loads(as_text(value)) == value


def test_a_long_row_is_not_listed_whole():
    namespaces = {"item": {f"key{number}": 1 for number in range(5000)}, "sample": {}}
    with pytest.raises(MissingVariableError) as caught:
        parse_template("{{item.k}}").render(namespaces)
    assert len(str(caught.value)) < 500
    assert "key0, key1" in str(caught.value)
    assert "and 4980 more" in str(caught.value)
