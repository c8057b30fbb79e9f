from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.chat import PLAIN, ChatEncoder, end_of_turn_id, prompts_from_rows
from graft.data.rows import Row, key_of
from graft.errors import DataError

Make = Callable[..., Any]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def template(
    turn: str = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    opening: str = "<|im_start|>assistant\n",
) -> str:
    body = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    return f"{body}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


def test_encode_is_the_template(tiny_tokenizer: Any) -> None:
    encoder = ChatEncoder(tiny_tokenizer)
    tokens = encoder.encode([user("1+2?")])
    text = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(tokens.tolist()) == text
    assert tokens.tolist() == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.dtype == "int32"
    assert encoder.end_of_turn == end_of_turn_id(tiny_tokenizer) == 2
    assert encoder.opens_thinking is False


def test_text_parts_are_joined(tiny_tokenizer: Any) -> None:
    encoder = ChatEncoder(tiny_tokenizer)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encoder.encode([user(parts)]).tolist() == encoder.encode([user("a\nb")]).tolist()


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_completions_follow_the_prompt_as_the_template_renders_them(tiny_tokenizer: Any, text: str) -> None:
    encoder = ChatEncoder(tiny_tokenizer)
    question = [user("x")]
    if text[0].isspace():  # may merge with the prompt's last line end; the next test is about that
        text = f"a{text}"
    answered = [*question, {"role": "assistant", "content": text}]
    rendered = tiny_tokenizer.apply_chat_template(answered, tokenize=False)
    completion = encoder.encode_completion(text)
    whole = [*encoder.encode(question).tolist(), *completion.tolist()]
    assert whole == tiny_tokenizer(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert completion[-1] == 2
    assert encoder.decode(completion) == text


def test_an_answer_that_merges_with_the_prompt_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="merge with the end of the generation prompt"):
        ChatEncoder(tiny_tokenizer).encode_completion("\n4")


def test_developer_becomes_system_only_where_the_template_does_not_know_it(make_tiny_tokenizer: Make) -> None:
    conversation = [{"role": "developer", "content": "rules"}, user("x")]
    generic = make_tiny_tokenizer()
    encoder = ChatEncoder(generic)
    assert encoder.maps_developer
    assert "<|im_start|>system\nrules" in generic.decode(encoder.encode(conversation).tolist())

    knows = (
        "{% if m.role == 'developer' %}DEV {{ m.content }}{% else %}{{ m.role }} {{ m.content }}{% endif %}\n"
    )
    knowing = make_tiny_tokenizer(template(knows))
    encoder = ChatEncoder(knowing)
    assert not encoder.maps_developer
    assert "DEV rules" in knowing.decode(encoder.encode(conversation).tolist())

    drops = "{% if m.role in ['system', 'user', 'assistant'] %}{{ m.role }} {{ m.content }}{% endif %}\n"
    dropping = make_tiny_tokenizer(template(drops))
    encoder = ChatEncoder(dropping)
    assert encoder.maps_developer
    assert "system rules" in dropping.decode(encoder.encode(conversation).tolist())


def test_messages_that_the_template_refuses_or_drops_are_errors(make_tiny_tokenizer: Make) -> None:
    conversation = [{"role": "system", "content": "rules"}, user("x")]
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}"
    with pytest.raises(DataError, match=r"refuses a conversation of system, user: .*no system role"):
        ChatEncoder(make_tiny_tokenizer(template(refuses))).encode(conversation)
    drops = "{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    with pytest.raises(DataError, match="leaves the system message 'rules' out"):
        ChatEncoder(make_tiny_tokenizer(template(drops))).encode(conversation)


@pytest.mark.parametrize(
    ("opening", "opens"),
    [("assistant\n<think>\n", True), ("assistant\n<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_templates_that_open_a_thought(make_tiny_tokenizer: Make, opening: str, opens: bool) -> None:
    assert ChatEncoder(make_tiny_tokenizer(template(opening=opening))).opens_thinking is opens


def test_template_kwargs_reach_the_template(make_tiny_tokenizer: Make) -> None:
    opening = "assistant\n{% if not thinking %}<think></think>{% endif %}"
    tokenizer = make_tiny_tokenizer(template(opening=opening))
    silent = ChatEncoder(tokenizer, {"thinking": False}).encode([user("x")])
    assert tokenizer.decode(silent.tolist()).endswith("<think></think>")
    assert "<think>" not in tokenizer.decode(
        ChatEncoder(tokenizer, {"thinking": True}).encode([user("x")]).tolist()
    )


def test_answers_rendered_unlike_they_are_generated_are_errors(make_tiny_tokenizer: Make) -> None:
    thinks = (
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
        "<|im_end|>\n"
    )
    with pytest.raises(DataError, match="not what the model would emit"):
        ChatEncoder(make_tiny_tokenizer(template(thinks))).encode_completion("4")
    with pytest.raises(DataError, match="not what the model would emit"):
        ChatEncoder(
            make_tiny_tokenizer(template(opening="<|im_start|>assistant\n<think>"))
        ).encode_completion("4")
    with pytest.raises(DataError, match="which ends an answer"):
        ChatEncoder(make_tiny_tokenizer()).encode_completion("4<|im_end|>")


def test_white_space_around_an_answer_is_the_templates(make_tiny_tokenizer: Make) -> None:
    trims = "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    encoder = ChatEncoder(make_tiny_tokenizer(template(trims)))
    assert encoder.encode_completion("4\n").tolist() == encoder.encode_completion("4").tolist()


def test_tokenizers_without_a_template(make_tiny_tokenizer: Make) -> None:
    bare = make_tiny_tokenizer(None)
    assert end_of_turn_id(bare) is None
    with pytest.raises(DataError, match=r"no chat template.*'plain'"):
        ChatEncoder(bare)
    encoder = ChatEncoder(bare, template=PLAIN)
    assert bare.decode(encoder.encode([{"role": "system", "content": "S"}, user("Q")]).tolist()) == "S\nQ\n"
    assert bare.decode(encoder.encode_completion("A").tolist()) == "A<|im_end|>"
    with pytest.raises(DataError, match="refuses a conversation of user: TemplateSyntaxError"):
        ChatEncoder(bare, template="{% for %}")


def test_a_template_without_end_of_turn_ends_with_the_tokenizers_eos(make_tiny_tokenizer: Make) -> None:
    tokenizer = make_tiny_tokenizer(template("{{ m.content }}\n", opening=""))
    encoder = ChatEncoder(tokenizer)
    assert encoder.end_of_turn is None
    assert encoder.encode_completion("4")[-1] == 2
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence token"):
        ChatEncoder(tokenizer).encode_completion("4")


def rows_of(*texts: str) -> list[Row]:
    return [
        Row(index, (user(text),), {"answer": index}, text, key_of([user(text)]), f"rows.jsonl:{index + 1}")
        for index, text in enumerate(texts)
    ]


def test_prompts_keep_what_belongs_to_the_row(tiny_tokenizer: Any) -> None:
    encoder = ChatEncoder(tiny_tokenizer)
    rows = rows_of("a  b", "c")
    first, second = prompts_from_rows(rows, encoder, 256)
    assert (first.row, first.question, first.item, first.messages) == (
        0,
        "a  b",
        {"answer": 0},
        rows[0].messages,
    )
    assert second.tokens.tolist() == encoder.encode(rows[1].messages).tolist()
    assert prompts_from_rows([], encoder, 256) == []


def test_long_prompts_are_refused_or_dropped(tiny_tokenizer: Any) -> None:
    encoder = ChatEncoder(tiny_tokenizer)
    rows = rows_of("short", "long " * 50, "brief")
    limit = len(encoder.encode(rows[0].messages))  # exactly the first fits; so does the equally short third
    with pytest.raises(
        DataError, match=rf"1 of 3 rows .* at most {limit} tokens[^$]*rows.jsonl:2: \d+ tokens"
    ):
        prompts_from_rows(rows, encoder, limit)
    kept = prompts_from_rows(rows, encoder, limit, long_prompts="drop")
    assert 0 in [prompt.row for prompt in kept]
    assert 1 not in [prompt.row for prompt in kept]
    with pytest.raises(DataError, match="all 3 prompts are longer than 2 tokens"):
        prompts_from_rows(rows, encoder, 2, long_prompts="drop")


def test_rows_that_the_template_refuses_are_all_named(make_tiny_tokenizer: Make) -> None:
    refuses = "{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    encoder = ChatEncoder(make_tiny_tokenizer(template(refuses)))
    with pytest.raises(
        DataError, match=r"(?s)12 of 13 rows.*rows.jsonl:2: the chat.*rows.jsonl:11:.*and 2 more"
    ):
        prompts_from_rows(rows_of("good", *["bad"] * 12), encoder, 256, long_prompts="drop")


def test_embedded_models_tokenizer(embedded_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder)
    encoder = ChatEncoder(tokenizer)
    tokens = encoder.encode([user("Hi")])
    assert tokenizer.decode(tokens.tolist()) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens[0] == 1
    assert encoder.end_of_turn == tokenizer.eos_token_id == 2
    assert encoder.maps_developer
    assert encoder.encode_completion("It is 4.\n#### 4").tolist() == [
        1589,
        314,
        216,
        36,
        30,
        198,
        1229,
        216,
        36,
        2,
    ]
    # SmolLM cuts digits out before anything else, so white space before a number stays in one piece
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("x =  12\n\n34")["input_ids"])
    assert pieces == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĊ", "3", "4"]
