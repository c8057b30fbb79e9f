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
        DataError: `worked` fails on a row or returns no text, or the text cannot be templated; names the row.
    """
    return [_worked_tree(prompt, worked, encoder) for prompt in prompts]


def _worked_tree(prompt: Prompt, worked: Callable[[Mapping[str, Any]], str], encoder: ChatEncoder) -> Tree:
    where = f"worked completion of row {prompt.row}"
    try:
        text = worked(prompt.item)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"want text, got {text!r}")
        tokens = encoder.encode_completion(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:
        raise DataError(f"{where}: {type(error).__name__}: {error}") from error
    tree = Tree(prompt)
    tree.add(ROOT, tokens, group=tree.new_group(), kind=Kind.COMPLETION, stop=None)
    return tree
