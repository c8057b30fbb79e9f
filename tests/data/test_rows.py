from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.rows import Row, read_rows
from graft.errors import ConfigError, DataError


def read(source: Any, base: Path, **changes: Any) -> list[Row]:
    return read_rows(source, **{"options": {}, "limit": None, "seed": 0, "base": base, **changes})


def read_text(text: str | bytes, tmp_path: Path, name: str = "rows.jsonl", **changes: Any) -> list[Row]:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read(name, tmp_path, **changes)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_openai_rows(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("What is  2+2?\n"),
        user([{"type": "text", "text": "Now"}]),
    ]
    rows = read_text(json.dumps({"messages": messages, "answer": "4", "meta": {"difficulty": 2}}), tmp_path)
    assert rows == [
        Row(
            index=0,
            messages=tuple(messages),
            item={"messages": messages, "answer": "4", "meta": {"difficulty": 2}},
            question="Now",
            key="What is 2+2? Now",
            where="rows.jsonl:1",
        )
    ]


def test_prompt_column_system_and_suffix(tmp_path: Path) -> None:
    asked = '{"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}'
    lines = f'{{"question": "1+1?", "answer": "2"}}\n{asked}\n'
    first, second = read_text(
        lines, tmp_path, prompt_key="question", system="Think.", suffix="\nEnd with ####."
    )
    assert list(first.messages) == [{"role": "system", "content": "Think."}, user("1+1?\nEnd with ####.")]
    assert first.question == "1+1?"
    assert first.item == {"question": "1+1?", "answer": "2"}
    assert list(second.messages) == [{"role": "system", "content": "Think."}, user("2+2?")]


def test_a_row_keeps_its_own_system_message(tmp_path: Path) -> None:
    own = [{"role": "developer", "content": "Mine."}, user("hi")]
    assert list(read_text(json.dumps({"messages": own}), tmp_path, system="Other.")[0].messages) == own


def test_the_question_is_the_last_user_message_as_it_stands(tmp_path: Path) -> None:
    """White space is meaning to a judge of code; `data.suffix` is none of the row's."""
    code = "Mend this:\n    if  a:\n"
    [row] = read_text(json.dumps({"prompt": code}), tmp_path, suffix="\nThink.")
    assert (row.question, row.key) == (code, "Mend this: if a:")
    turns = [user("a?"), {"role": "assistant", "content": "b"}, user("c\n?")]
    [row] = read_text(json.dumps({"messages": turns}), tmp_path)
    assert (row.question, row.key) == ("c\n?", "a? c ?")


def test_prompt_column_may_hold_messages(tmp_path: Path) -> None:
    assert read_text(json.dumps({"prompt": [user("hi")]}), tmp_path)[0].question == "hi"


def test_mark_windows_line_ends_blank_lines_and_exotic_separators(tmp_path: Path) -> None:
    text = '\ufeff{"prompt": "a\u2028b"}\r\n\r\n   \n{"prompt": "c"}\r\n'
    rows = read_text(text, tmp_path)
    assert [row.where for row in rows] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert rows[0].messages[0]["content"] == "a\u2028b"
    assert [row.index for row in rows] == [0, 1]


def test_limit_stops_reading(tmp_path: Path) -> None:
    assert len(read_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken', tmp_path, limit=2)) == 2
    with pytest.raises(ConfigError, match="at least 1"):
        read_text('{"prompt": "a"}\n', tmp_path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl:1: \$: got .* at column"),
        ("[1]", r"\$: got \[1\]; wants a JSON object"),
        ('{"prompt": NaN}', "got NaN; wants finite"),
        ('{"prompt": "a", "x": -Infinity}', "got -Infinity"),
        ('{"prompt": "a", "x": 1e999}', "not JSON: Out of range"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "fewer digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "prompt": "b"}', 'got the key "prompt" twice'),
        ('{"prompt": "a", "meta": {"k": 1, "k": 2}}', 'got the key "k" twice'),
        (r'{"prompt": "\ud800"}', "surrogates not allowed"),
        (r'{"prompt": "a", "tags": [["\udc00"]]}', "surrogates not allowed"),
        ('{"prompt": "a", "tools": [{"type": "function"}]}', r"\$.tools: .*cannot call tools"),
        (
            '{"promt": "a"}',
            r"keys \[\"promt\"\]; wants 'messages' or the prompt column 'prompt'.*Did you mean 'promt'",
        ),
        ('{"prompt": "  "}', r"\$.prompt: got empty text"),
        ('{"prompt": 3}', r"\$.prompt: got 3; wants a list of messages"),
        ('{"messages": []}', r"\$.messages: got \[\]"),
        ('{"messages": "hi"}', r'\$.messages: got "hi"'),
        ('{"messages": ["hi"]}', r"\$.messages\[0\]: got \"hi\"; wants an object"),
        ('{"messages": [{"content": "hi"}]}', r"\$.messages\[0\].role: got nothing; wants one of developer"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', r"role: got \"bot\""),
        ('{"messages": [{"role": ["user"], "content": "hi"}]}', r"role: got \[\"user\"\]"),
        ('{"messages": [{"role": "tool", "content": "hi"}]}', r"role: got \"tool\".*cannot call tools"),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hi"}]}',
            r"\$.messages\[1\].role: got \"assistant\"; wants user or developer in the last",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, '
            '{"role": "user", "content": "q"}]}',
            r"\$.messages\[0\].tool_calls",
        ),
        ('{"messages": [{"role": "user"}]}', r"content: got nothing; wants text"),
        ('{"messages": [{"role": "user", "content": null}]}', r"content: got null; wants text"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"content: got empty text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}', "got empty text"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"\$.messages\[0\].content\[0\].type: got \"image_url\"; wants \"text\": images",
        ),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', r"content\[0\]: got \"x\""),
    ],
)
def test_bad_rows_are_described(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_text(line + "\n", tmp_path)


def test_invalid_utf8_names_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: \$: got byte 0xff at byte 13; wants UTF-8"):
        read_text(b'{"prompt": "a"}\n{"prompt": "\xff"}\n', tmp_path)


def test_several_bad_rows_are_listed_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_text('{"prompt": "good"}\n' + '{"prompt": ""}\n' * 13, tmp_path)
    text = str(caught.value)
    assert "13 rows cannot be used" in text
    assert "rows.jsonl:2:" in text
    assert "rows.jsonl:11:" in text
    assert "rows.jsonl:12:" not in text
    assert "and 3 more problems" in text


@pytest.mark.parametrize("contents", ["", "\n \n", "\ufeff"])
def test_empty_files_are_refused(contents: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_text(contents, tmp_path)


def test_missing_files_and_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file. Did you mean 'train.jsonl'"):
        read("trian.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=r"wants FILE.jsonl, FILE.csv"):
        read("rows.parquet", tmp_path)
    with pytest.raises(ConfigError, match="a file has no options"):
        read("train.jsonl", tmp_path, options={"split": "train"})
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read("folder.jsonl", tmp_path)


def test_rows_in_memory(tmp_path: Path) -> None:
    given_rows = [{"prompt": "a", "answer": 1}, {"messages": [user("b")]}]
    rows = read(given_rows, tmp_path)
    assert [row.question for row in rows] == ["a", "b"]
    assert [row.where for row in rows] == ["rows[0]", "rows[1]"]
    assert rows[0].item == given_rows[0]
    with pytest.raises(
        DataError, match=r"rows: 2 rows .*\n  rows\[0\]: .*not JSON.*\n  rows\[1\]: .*a mapping"
    ):
        read([{"prompt": "a", "answer": {1, 2}}, "b"], tmp_path)
    with pytest.raises(DataError, match="rows: no rows"):
        read([], tmp_path)
    with pytest.raises(ConfigError, match="no options"):
        read(given_rows, tmp_path, options={"split": "train"})


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffprompt,answer\r\n"What, then,\nis 2+2?",4\r\n\r\nb,5\r\n'
    rows = read_text(text, tmp_path, "rows.csv")
    assert [row.where for row in rows] == ["rows.csv:2", "rows.csv:5"]
    assert rows[0].item == {"prompt": "What, then,\nis 2+2?", "answer": "4"}
    assert rows[0].question == "What, then,\nis 2+2?"
    assert rows[0].key == "What, then, is 2+2?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"prompt,answer\na\n", "rows.csv:2: .*got 1 fields; wants 2"),
        (b"prompt,prompt\na,b\n", "repeats a column name"),
        (b"prompt,\na,b\n", "leaves one empty"),
        (b"question\na\n", "wants 'messages' or the prompt column 'prompt'"),
        (b'prompt\n"a\n', "rows.csv:2: not a CSV file"),
        (b"prompt\n\xff\n", "rows.csv:2: not UTF-8"),
        (b"prompt\n", "no rows"),
        (b"", "no rows"),
    ],
)
def test_bad_csv(text: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_text(text, tmp_path, "rows.csv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "messages", "prompt", "tools"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
almost_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "developer", "tool", 1]), "content": json_values}
    ),
    max_size=3,
)
almost_rows = st.fixed_dictionaries(
    {}, optional={"messages": almost_messages | json_values, "prompt": json_values}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80)
    | st.lists(almost_rows | json_values, max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_any_bytes_give_rows_or_a_data_error(name: str, data: bytes, tmp_path: Path) -> None:
    try:
        rows = read_text(data, tmp_path, name)
    except DataError:
        return
    assert rows
    for row in rows:
        assert row.messages[-1]["role"] != "assistant"
        json.dumps(row.item, allow_nan=False)
        row.question.encode()


SMALL = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
}  # 10 * 10 * 2 operators = 200 questions


def test_gym_rows_are_distinct_repeatable_and_seeded(tmp_path: Path) -> None:
    rows = read("gym:chain_sum", tmp_path, options=SMALL, limit=150)
    assert len({row.question for row in rows}) == 150
    assert rows[0].messages[0]["content"] == rows[0].item["question"]
    assert set(rows[0].item) == {"question", "answer", "metadata"}
    assert read("gym:chain_sum", tmp_path, options=SMALL, limit=150) == rows
    neighbour = read("gym:chain_sum", tmp_path, options=SMALL, limit=150, seed=1)
    drawn, next_drawn = ([row.question for row in some] for some in (rows, neighbour))
    assert all(drawn[shift:20] != next_drawn[: 20 - shift] for shift in range(5))


def test_gym_delivers_all_there_is_and_says_when_it_is_dry(tmp_path: Path) -> None:
    assert len(read("gym:chain_sum", tmp_path, options=SMALL, limit=200)) == 200
    with pytest.raises(DataError, match=r"only 200 distinct questions .*; 201 are wanted"):
        read("gym:chain_sum", tmp_path, options=SMALL, limit=201)


def test_gym_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no end"):
        read("gym:chain_sum", tmp_path)
    with pytest.raises(DataError, match="Did you mean 'chain_sum'"):
        read("gym:chain_sums", tmp_path, limit=1)
    with pytest.raises(DataError, match=r"refuses the options.*min_term"):
        read("gym:chain_sum", tmp_path, limit=1, options={"min_term": 2})
    with pytest.raises(DataError, match="max_terms must be"):
        read("gym:chain_sum", tmp_path, limit=1, options={"min_terms": 9, "max_terms": 3})
    with pytest.raises(DataError, match="fails to make row 0 with the options"):
        read("gym:chain_sum", tmp_path, limit=1, options={"min_digits": 1.5})
    with pytest.raises(DataError, match=r"options.seed is set by graft"):
        read("gym:chain_sum", tmp_path, limit=1, options={"seed": 2})


def test_hub_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": "4"}\n'
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = read(f"hub:{tmp_path}/set", tmp_path, prompt_key="question", limit=1)
    assert rows[0].item == {"question": "1+1?", "answer": "2"}
    assert rows[0].where.endswith("[train]#0")
    with pytest.raises(DataError, match="cannot be loaded"):
        read(f"hub:{tmp_path}/set", tmp_path, options={"split": "nosuch"})
    with pytest.raises(DataError, match=r"unknown option 'splt'. Did you mean 'split'"):
        read(f"hub:{tmp_path}/set", tmp_path, options={"splt": "train"})
