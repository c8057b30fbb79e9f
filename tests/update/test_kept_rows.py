"""Masks of the LM head against the sets that they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.kept import KeptTokens, entry_of
from graft.update.kept_rows import NEVER, KeptRows


@given(st.integers(0, 10**6), st.sampled_from([1, 20, 32, 33, 70, 300]))
def test_masks_are_the_sets_whatever_the_window(seed, vocabulary):
    rng = np.random.default_rng(seed)
    masks = rng.random((7, vocabulary)) < rng.choice([0.01, 0.05, 0.5, 1.0], size=(7, 1))
    masks[np.arange(7), rng.integers(0, vocabulary, 7)] = True  # one token at least is always kept
    kept = KeptRows.of(KeptTokens.of([entry_of(mask) for mask in masks], vocabulary))
    first, last = sorted(rng.integers(0, 8, 2).tolist())
    if first < last:
        assert torch.equal(kept.masks(first, last), torch.from_numpy(masks[first:last]))
    assert torch.equal(kept.to(torch.device("cpu")).masks(0, 7), torch.from_numpy(masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_could_not_be_drawn_has_probability_zero(dtype):
    kept = KeptRows.of(KeptTokens.of([np.array([1, 60], np.int32), np.array([], np.int32)], 100))
    logits = torch.zeros(1, 100, dtype=dtype)
    log_p = kept.forbid_(logits, 0).log_softmax(-1)
    p = log_p.exp()
    assert p.nonzero()[:, 1].tolist() == [1, 60]
    assert float(p[0, 1]) == 0.5
    assert torch.isfinite(p * log_p).all()
    assert logits.min() == NEVER  # in place
    untouched = torch.ones(1, 100, dtype=dtype)
    assert torch.equal(kept.forbid_(untouched, 1), torch.ones(1, 100, dtype=dtype))
