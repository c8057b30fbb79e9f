"""Building the parts of a run: what is refused before anything is computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import MistralConfig

from graft.assemble import refuse_short_window
from graft.config_file import check_config
from graft.errors import ModelError


@pytest.mark.parametrize(("window", "refused"), [(99, True), (100, False), (None, False)])
def test_a_window_shorter_than_the_longest_path_is_refused(window, refused):
    config = check_config(
        {
            "run": "r",
            "model": {"name": "m"},
            "data": {"source": "a.jsonl", "max_prompt_tokens": 60},
            "grader": {"type": "number"},
            "sampling": {"max_new_tokens": 40},
            "training": {"steps": 1},
        },
        where="test",
    )
    policy = SimpleNamespace(plain=SimpleNamespace(config=MistralConfig(sliding_window=window)))
    if refused:
        with pytest.raises(ModelError, match="see 99 tokens back, but a path may have 100"):
            refuse_short_window(config, policy)  # pyright: ignore[reportArgumentType] - a double
    else:
        refuse_short_window(config, policy)  # pyright: ignore[reportArgumentType]
