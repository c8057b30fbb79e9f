"""The embedded model's tokenizer, where it is in the cache already."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from graft.pull import default_cache


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Any:
    """SmolLM2's byte-level tokenizer; its weights are not loaded."""
    folder = default_cache() / "models" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("smollm2-135m-instruct is not in the cache: `graft model pull smollm2-135m-instruct`")
    return AutoTokenizer.from_pretrained(folder)
