"""The overlong penalty."""

from __future__ import annotations

import torch

from graft.credit.length import overlong_penalty


def test_by_hand():
    lengths = torch.tensor([1, 60, 61, 70, 100, 130])
    got = overlong_penalty(lengths, max_new_tokens=100, buffer=40)
    assert got.tolist() == [0, 0, -0.025, -0.25, -1, -1]


def test_the_papers_numbers():
    lengths = torch.tensor([16384, 18432, 20480])
    assert overlong_penalty(lengths, max_new_tokens=20480, buffer=4096).tolist() == [0, -0.5, -1]


def test_a_buffer_of_the_whole_length_charges_from_the_first_token():
    assert overlong_penalty(torch.tensor([1, 4]), max_new_tokens=4, buffer=4).tolist() == [-0.25, -1]
