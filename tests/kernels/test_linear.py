"""bf16 products for training: what they round, their gradients, what is remembered."""

from __future__ import annotations

import pytest
import torch

from graft.kernels.linear import bf16_linear
from graft.kernels.products import (
    matmul_nn,
    matmul_nt,
    matmul_tn,
    pack_nt,
    sum_of_matmul_nn,
    training_kernels,
)

SHAPES = [(1, 1, 1), (16, 32, 32), (45, 31, 70), (300, 50, 111), (70, 33, 4100)]
"""(m, n, k); the last inner dimension is summed in three pieces."""


@pytest.fixture(autouse=True)
def _amx() -> None:
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    torch.manual_seed(0)


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.detach().bfloat16().double()


def assert_product(
    got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor | float = 0.0
) -> None:
    """That got = a b + plus, summed in fp32: an error of k eps sum |a b| at most, and of the sum's storage."""
    exact = a @ b + plus
    storage = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-23
    bound = (a.shape[1] + 1) * 2.0**-23 * (a.abs() @ b.abs()) + storage * (exact.abs() + abs(plus)) + 1e-30
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_round_their_factors_and_nothing_else(m, n, k, dtype):
    a, b = torch.randn(m, k), torch.randn(k, n)
    given_a, given_b = a.to(dtype), b.to(dtype)
    assert_product(matmul_nt(given_a, given_b.T.contiguous()), bf16(a), bf16(b))
    assert_product(matmul_nn(given_a, given_b), bf16(a), bf16(b))
    assert_product(matmul_tn(given_a.T.contiguous(), given_b), bf16(a), bf16(b))
    half = matmul_nn(given_a, given_b, out=torch.empty(m, n, dtype=torch.bfloat16))
    if k <= 2048:
        assert_product(half, bf16(a), bf16(b))
    start = torch.randn(m, n)
    total = start.clone()
    assert matmul_tn(given_a.T.contiguous(), given_b, add_to=total) is total
    assert_product(total, bf16(a), bf16(b), start.double())


def test_strided_and_sliced_factors():
    a, b = torch.randn(40, 70), torch.randn(33, 70)
    assert_product(matmul_nt(a[3:20, 5:60], b[:, 5:60]), bf16(a[3:20, 5:60]), bf16(b[:, 5:60]).T)
    assert_product(matmul_tn(a.T[5:60], b.T[5:60]), bf16(a[:, 5:60]), bf16(b[:, 5:60]).T)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "y_dtype"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)]
)
def test_linear_and_its_gradients(with_bias, x_dtype, y_dtype):
    x = torch.randn(2, 35, 40).to(x_dtype).requires_grad_()
    weight = torch.randn(50, 40).requires_grad_()
    bias = torch.randn(50).requires_grad_() if with_bias else None
    y = bf16_linear(x, weight, bias, dtype=y_dtype)
    assert y.shape == (2, 35, 50)
    assert y.dtype == (y_dtype or x_dtype)
    dy = torch.randn(2, 35, 50).to(y.dtype)
    y.backward(dy)

    flat_x, flat_dy = bf16(x).view(70, 40), bf16(dy).view(70, 50)
    assert_product(
        y.detach().view(70, 50), flat_x, bf16(weight).T, 0.0 if bias is None else bias.detach().double()
    )
    assert x.grad is not None
    assert x.grad.dtype == x_dtype
    assert_product(x.grad.view(70, 40), flat_dy, bf16(weight))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert_product(weight.grad, flat_dy.T, flat_x)
    if bias is not None:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad.double(), dy.double().sum((0, 1)), rtol=0, atol=1e-5)


def test_gradients_against_float64_within_bf16_rounding():
    """Rounding moves each factor by at most 2^-8 of it, so each product by 2^-7 + 2^-16 of its magnitude."""
    x, weight, dy = torch.randn(60, 80), torch.randn(48, 80), torch.randn(60, 48)
    given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    bf16_linear(*given).backward(dy)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    torch.nn.functional.linear(*exact).backward(dy.double())
    magnitudes = [dy.abs() @ weight.abs(), dy.abs().T @ x.abs()]
    for ours, theirs, magnitude in zip(given, exact, magnitudes, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad - theirs.grad).abs()
        assert (error <= (2.0**-7 + 2.0**-15) * magnitude).all()
        assert error.max() > 1e-4  # it does round


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weight = torch.randn(5, 8).requires_grad_(), torch.randn(6, 8)
    bf16_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    x, weight = torch.randn(5, 8), torch.randn(6, 8).requires_grad_()
    bf16_linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_the_same_to_the_bit_in_every_run_and_for_any_number_of_threads():
    x, weight, dy = torch.randn(333, 70), torch.randn(90, 70), torch.randn(333, 90)

    def run() -> list[torch.Tensor]:
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = bf16_linear(*given)
        y.backward(dy)
        return [y.detach(), *(tensor.grad for tensor in given if tensor.grad is not None)]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_products_follow_a_changed_weight():
    weight = torch.nn.Parameter(torch.randn(20, 30))
    x = torch.randn(7, 30)
    before = bf16_linear(x, weight).detach()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    bf16_linear(x, weight).square().sum().backward()
    optimizer.step()  # does not tell the weight's version counter
    after = bf16_linear(x, weight).detach()
    assert not after.equal(before)
    assert_product(after, bf16(x), bf16(weight).T)


def test_a_kept_pack_stays_and_another_does_not():
    first, second, x = torch.randn(70, 40), torch.randn(70, 40), torch.randn(5, 40)
    kept, passing = pack_nt(first, keep=True), pack_nt(first)
    pack_nt(second)
    assert_product(matmul_nt(x, kept), bf16(x), bf16(first).T)
    assert_product(matmul_nt(x, passing), bf16(x), bf16(second).T)


def test_a_sum_of_products():
    pairs = [(torch.randn(9, k), torch.randn(k, 33)) for k in (40, 7, 64)]
    a, b = (torch.cat([pair[i] for pair in pairs], dim=1 - i) for i in (0, 1))
    assert_product(sum_of_matmul_nn(pairs), bf16(a), bf16(b))


def test_a_remembered_input_is_rounded_again_after_a_change():
    x, weight = torch.randn(9, 8), torch.randn(6, 8)
    bf16_linear(x, weight)
    x.mul_(3)
    assert_product(bf16_linear(x, weight), bf16(x), bf16(weight).T)
    with torch.inference_mode():
        y = torch.randn(9, 8)
        bf16_linear(y, weight)
        y.mul_(3)
        assert_product(bf16_linear(y, weight), bf16(y), bf16(weight).T)
