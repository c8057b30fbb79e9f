"""Norm and sampler against float64. Attention is tested through the decoder that uses it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graft.kernels.library import Kernels, activations, load_kernels


@pytest.fixture
def kernels() -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    return found


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [1, 16, 40, 577])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
def test_rms_norm(kernels, width, dtype, tolerance):
    x = torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]
    out = activations(7, width, dtype)
    kernels.rms_norm(x, out, 5, 1e-5)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out[:5].double(), expected[:5], rtol=tolerance, atol=1e-7)
    assert out[5:].eq(0).all()


def reference_sample(
    logits: torch.Tensor, uniforms: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    z = logits.double() / temperature
    below = z.softmax(-1).cumsum(-1) <= torch.from_numpy(uniforms)[:, None]
    tokens = below.sum(-1)
    return tokens.numpy(), z.log_softmax(-1).gather(1, tokens[:, None])[:, 0].numpy()


@pytest.mark.parametrize("vocabulary", [1, 15, 256, 257, 1000, 49152])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampler_inverts_the_cumulative_distribution(kernels, vocabulary, temperature):
    generator = np.random.default_rng(vocabulary)
    logits = torch.from_numpy(generator.normal(0, 3, (30, vocabulary)).astype(np.float32))
    uniforms = generator.random(30)
    tokens, logprobs = kernels.sample(logits, uniforms, temperature)
    expected_tokens, expected_logprobs = reference_sample(logits, uniforms, temperature)
    # fp32 weights move a boundary by 1e-6 at most: a draw that close to one may fall on its other side.
    same = tokens == expected_tokens
    assert same.mean() >= 0.96
    np.testing.assert_allclose(logprobs[same], expected_logprobs[same], atol=2e-5)
    assert tokens.dtype == np.int32
    assert logprobs.dtype == np.float32


def test_sampler_by_hand(kernels):
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]])).expand(6, -1).contiguous()
    uniforms = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53])
    tokens, logprobs = kernels.sample(logits, uniforms, 1.0)
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4]
    np.testing.assert_allclose(logprobs, np.log([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]), atol=1e-6)


def test_temperature_flattens(kernels):
    logits = torch.tensor([[0.0, math.log(9.0)]])
    _, sharp = kernels.sample(logits, np.array([0.999]), 0.5)
    _, flat = kernels.sample(logits, np.array([0.999]), 2.0)
    np.testing.assert_allclose(np.exp([sharp[0], flat[0]]), [81 / 82, 3 / 4], rtol=1e-6)


def test_draws_follow_the_distribution(kernels):
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    count = 20000
    tokens, _ = kernels.sample(
        probability.log().expand(count, -1).contiguous(), (np.arange(count) + 0.5) / count, 1.0
    )
    np.testing.assert_allclose(np.bincount(tokens) / count, probability, atol=2 / count)


def test_rows_with_a_stride_and_alone(kernels):
    logits = torch.randn(9, 700)
    uniforms = np.random.default_rng(0).random(9)
    tokens, logprobs = kernels.sample(logits[:, 3:603], uniforms, 1.0)
    for row in range(9):
        alone = kernels.sample(logits[row : row + 1, 3:603].clone(), uniforms[row : row + 1], 1.0)
        assert (alone[0][0], alone[1][0]) == (tokens[row], logprobs[row])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_log_probability(kernels, bad):
    logits = torch.zeros(3, 50)
    logits[1, 7] = bad
    tokens, logprobs = kernels.sample(logits, np.full(3, 0.5), 1.0)
    assert np.isnan(logprobs).tolist() == [False, True, False]
    assert tokens[1] == 0


def test_wrong_arguments_are_refused(kernels):
    with pytest.raises(ValueError, match="float64"):
        kernels.sample(torch.zeros(2, 5), np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="temperature"):
        kernels.sample(torch.zeros(2, 5), np.zeros(2), 0.0)
    with pytest.raises(ValueError, match="fp32"):
        kernels.sample(torch.zeros(2, 5, dtype=torch.bfloat16), np.zeros(2), 1.0)
