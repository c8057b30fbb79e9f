"""Memory that runs out, in earnest: allocations that no machine can serve."""

from __future__ import annotations

import pytest
import torch

from graft.errors import ResourceError
from graft.memory import memory_errors, peak_memory_gb

TOO_MUCH = 2**50  # bytes


def from_torch() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def from_python() -> None:
    bytearray(TOO_MUCH)


def from_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")


def without_words() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (from_torch, "can't allocate memory"),
        (from_python, "MemoryError"),
        (from_cuda, "CUDA out of memory. Tried to allocate 2 GiB"),
        (without_words, "MemoryError"),
    ],
)
def test_an_allocation_that_fails_names_the_setting(fail, words):
    with pytest.raises(ResourceError) as caught, memory_errors("sampling", "rollout.slots"):
        fail()
    said = str(caught.value)
    assert said.startswith("memory ran out during sampling (")
    assert words in said
    assert said.endswith("Lower rollout.slots; `graft resume` goes on.")
    assert "\n" not in said
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("not enough memory")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, memory_errors("sampling", "rollout.slots"):
        raise error
    assert caught.value is error


def test_nothing_happens_when_memory_lasts():
    with memory_errors("sampling", "rollout.slots"):
        value = torch.ones(3).sum().item()
    assert value == 3.0


def test_the_peak_is_in_gigabytes_and_never_falls():
    before = peak_memory_gb(torch.device("cpu"))
    block = torch.ones(60_000_000, dtype=torch.uint8)
    after = peak_memory_gb(torch.device("cpu"))
    assert 0.05 < before <= after < 500  # python and torch alone take more than 50 MB
    del block
    assert peak_memory_gb(torch.device("cpu")) > after - 0.02  # the kernel counts pages in batches
