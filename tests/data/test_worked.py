"""Worked completions: trees as the model would have written them, and rows that give none."""

from __future__ import annotations

import numpy as np
import pytest

from graft.data.chat import ChatEncoder
from graft.data.worked import worked_trees
from graft.errors import DataError
from graft.tree import ROOT, Kind
from graft.types import Prompt


@pytest.fixture
def encoder(tiny_tokenizer) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer)


def prompts(encoder: ChatEncoder, *answers) -> list[Prompt]:
    made = []
    for row, answer in enumerate(answers):
        messages = [{"role": "user", "content": f"question {row}"}]
        tokens = encoder.encode(messages)
        made.append(Prompt(row=row, messages=messages, item={"a": answer}, tokens=tokens, question=str(row)))
    return made


def test_one_sample_a_prompt_that_nothing_drew(encoder):
    rows = prompts(encoder, "4", "the sum is 5")
    trees = worked_trees(rows, lambda item: item["a"], encoder)
    assert [tree.prompt for tree in trees] == rows
    for tree, text in zip(trees, ("4", "the sum is 5"), strict=True):
        [leaf] = tree.leaves()
        node = tree.nodes[leaf]
        assert (node.parent, node.kind, node.stop, node.sampled) == (ROOT, Kind.COMPLETION, None, False)
        assert encoder.decode(node.tokens) == text
        assert tree.groups() == [0]


def test_prompt_and_completion_are_the_templates_rendering_of_the_whole_conversation(encoder, tiny_tokenizer):
    [tree] = worked_trees(prompts(encoder, "4"), lambda item: item["a"], encoder)
    conversation = [*tree.prompt.messages, {"role": "assistant", "content": "4"}]
    rendered = tiny_tokenizer.apply_chat_template(conversation, tokenize=False)
    whole = tiny_tokenizer(rendered, add_special_tokens=False)["input_ids"]
    path = np.concatenate([node.tokens for node in tree.nodes]).tolist()
    assert path == whole[: len(path)]
    assert path[-1] == tiny_tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "worked completion of row 1: want text, got None"),
        (4, "row 1: want text, got 4"),
        ("  \n", r"row 1: want text, got '  \n'"),
        ("4<|im_end|>", "row 1: the answer '4<|im_end|>' contains '<|im_end|>'"),
    ],
)
def test_rows_without_a_worked_completion_are_named(encoder, answer, message):
    with pytest.raises(DataError) as refused:
        worked_trees(prompts(encoder, "4", answer), lambda item: item["a"], encoder)
    assert message in str(refused.value)


def test_a_function_that_fails_is_named_with_its_row(encoder):
    with pytest.raises(DataError, match="worked completion of row 0: KeyError: 'solution'"):
        worked_trees(prompts(encoder, "4"), lambda item: item["solution"], encoder)
