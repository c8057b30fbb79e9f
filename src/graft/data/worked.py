"""Worked completions of rows, as trees: what supervised training learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.data.chat import ChatEncoder
from graft.errors import DataError
from graft.tree import ROOT, Kind, Tree
from graft.types import Prompt


def worked_trees(
    prompts: Sequence[Prompt], worked: Callable[[Mapping[str, Any]], str], encoder: ChatEncoder
) -> list[Tree]:
    """One tree a prompt, with its worked completion as the only sample.

    Args:
        prompts: the rows.
        worked: item of a row -> text of its completion.
        encoder: turns the text into the ids that the model would emit, its end-of-turn token last.

    Raises:
        DataError: `worked` fails on a row or returns no text.
    """
    return [_worked_tree(prompt, worked, encoder) for prompt in prompts]


def _worked_tree(prompt: Prompt, worked: Callable[[Mapping[str, Any]], str], encoder: ChatEncoder) -> Tree:
    try:
        text = worked(prompt.item)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"worked completion of row {prompt.row}: {type(error).__name__}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"worked completion of row {prompt.row}: want text, got {text!r}")
    tree = Tree(prompt)
    tree.add(ROOT, encoder.encode_completion(text), group=tree.new_group(), kind=Kind.COMPLETION, stop=None)
    return tree
