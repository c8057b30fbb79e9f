"""bf16 products for training: what they round, their gradients, their caches, and accelerating a model."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.kernels import linear
from graft.kernels.linear import (
    accelerate_linears,
    bf16_linear,
    matmul_nn,
    matmul_nt,
    matmul_tn,
    packed_pair,
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


def test_packed_weights_follow_the_weight():
    weight = torch.nn.Parameter(torch.randn(20, 30))
    x = torch.randn(7, 30)
    pair = packed_pair(weight)
    assert packed_pair(weight) is pair
    first = pair.for_nt(weight)
    assert pair.for_nt(weight) is first
    before = bf16_linear(x, weight).detach()
    for fused, foreach in ((True, False), (False, True), (False, False)):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused, foreach=foreach)
        bf16_linear(x, weight).square().sum().backward()
        optimizer.step()
        after = bf16_linear(x, weight).detach()
        assert not after.equal(before)
        assert_product(after, bf16(x), bf16(weight).T)
        before = after
    with torch.no_grad():
        weight.mul_(2)
    assert_product(matmul_nn(torch.eye(20), weight), bf16(torch.eye(20)), bf16(weight))
    bf16_linear(x, weight)
    weight.data = torch.randn(20, 30)  # another address, the same version
    assert_product(bf16_linear(x, weight).detach(), bf16(x), bf16(weight).T)


def test_packed_weights_die_with_the_weight_or_on_request():
    gc.collect()
    before = len(linear._pairs)
    weight = torch.randn(20, 30)
    packed_pair(weight)
    assert len(linear._pairs) == before + 1
    del weight
    gc.collect()
    assert len(linear._pairs) == before
    kept = torch.randn(20, 30)
    pair = packed_pair(kept)
    linear.forget_packed_weights()
    assert packed_pair(kept) is not pair


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


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def loss_and_gradients(model: LlamaForCausalLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.arange(40).view(2, 20) % 100
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


def test_a_model_trains_the_same_up_to_rounding_and_can_go_back(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    exact_loss, exact = loss_and_gradients(model)
    accelerated = accelerate_linears(model)
    assert not isinstance(accelerated, str)
    with accelerated:
        assert len(accelerated.modules) == 2 * 7 + 1
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == list(state)
        loss, rounded = loss_and_gradients(model)
        repeated_loss, repeated = loss_and_gradients(model)
    assert loss.equal(repeated_loss)
    assert all(a.equal(b) for a, b in zip(rounded, repeated, strict=True))
    assert 0 < abs(loss - exact_loss) < 1e-2
    errors = [
        ((a - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True) if b.norm() > 1e-4
    ]
    assert max(errors) < 0.05
    assert min(errors) > 1e-5
    after_loss, after = loss_and_gradients(model)
    assert after_loss.equal(exact_loss)
    assert all(a.equal(b) for a, b in zip(after, exact, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_exclude_autocast_and_copies(model):
    accelerated = accelerate_linears(model, exclude={"lm_head"})
    assert not isinstance(accelerated, str)
    with accelerated:
        assert model.lm_head not in accelerated.modules
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(3, 48)
        assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.zero_()
        assert twin.model.layers[0].mlp.up_proj(x).eq(0).all()
        assert not layer(x).eq(0).all()


def test_without_amx_it_says_so(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_KERNELS", "off")
    training_kernels.cache_clear()
    try:
        assert accelerate_linears(model) == "switched off by GRAFT_KERNELS"
        with pytest.raises(RuntimeError, match="no bf16 products: switched off"):
            matmul_nt(torch.ones(1, 1), torch.ones(1, 1))
    finally:
        training_kernels.cache_clear()
    assert not any("forward" in vars(module) for module in model.modules())
