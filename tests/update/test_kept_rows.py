"""Masks of the LM head against the sets that they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.kept import KeptTokens, entry_of
from graft.update.kept_rows import NEVER, KeptRows, forbid_


@given(st.integers(0, 10**6), st.sampled_from([1, 20, 32, 33, 70, 300]))
def test_what_could_not_be_drawn_is_forbidden_whatever_the_block(seed, vocabulary):
    rng = np.random.default_rng(seed)
    masks = rng.random((7, vocabulary)) < rng.choice([0.01, 0.05, 0.5, 1.0], size=(7, 1))
    masks[np.arange(7), rng.integers(0, vocabulary, 7)] = True  # one token at least is always kept
    kept = KeptRows.of(KeptTokens.of([entry_of(mask) for mask in masks], vocabulary))
    bitmaps = kept.to(torch.device("cpu")).bitmaps()
    first = 32 * int(rng.integers(0, -(-vocabulary // 32)))
    last = min(first + 32 * int(rng.integers(1, 5)), vocabulary)
    logits = forbid_(torch.ones(7, last - first), bitmaps, first)
    assert torch.equal(logits == 1, torch.from_numpy(masks[:, first:last]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_could_not_be_drawn_has_probability_zero(dtype):
    kept = KeptRows.of(KeptTokens.of([np.array([1, 60], np.int32), np.array([], np.int32)], 100))
    logits = torch.zeros(2, 100, dtype=dtype)
    log_p = forbid_(logits, kept.bitmaps(), 0).log_softmax(-1)
    p = log_p.exp()
    assert p[0].nonzero()[:, 0].tolist() == [1, 60]
    assert float(p[0, 1]) == 0.5
    assert torch.isfinite(p * log_p).all()
    assert logits[0].min() == NEVER  # in place
    assert torch.equal(logits[1], torch.zeros(100, dtype=dtype))
