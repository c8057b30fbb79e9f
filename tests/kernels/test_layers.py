"""RMS norm and gated MLP against torch, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from graft.kernels.layers import GatedMlp, RmsNorm
from graft.kernels.products import training_kernels


@pytest.fixture(autouse=True)
def _amx() -> None:
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    torch.manual_seed(0)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, direction)]


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 70, 48), (3, 45), (200, 33)])
def test_norm(shape):
    x, weight = 3 * torch.randn(shape), torch.randn(shape[-1])
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    got = gradients(RmsNorm.apply(*ours, 1e-3), ours)
    want = gradients(functional.rms_norm(exact[0], (shape[-1],), exact[1], 1e-3), exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))


def test_norm_does_not_depend_on_the_number_of_threads():
    x, weight = torch.randn(333, 48), torch.randn(48)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            results.append(gradients(RmsNorm.apply(*given, 1e-5), given))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def rounded_mlp(x, gate_weight, up_weight, down_weight):
    """The same in float64 with the roundings that the kernel promises; straight through in the backward pass."""

    def bf16(t):
        return t + (t.bfloat16().double() - t).detach()

    x, gate_weight, up_weight, down_weight = map(bf16, (x, gate_weight, up_weight, down_weight))
    gate, up = bf16(x @ gate_weight.T), bf16(x @ up_weight.T)
    return bf16(functional.silu(gate) * up) @ down_weight.T


@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 32, 64), (45, 48, 80), (70, 33, 50)])
def test_mlp(rows, width, inner):
    shapes = [(2, rows, width), (inner, width), (inner, width), (width, inner)]
    tensors = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    tensors[0] *= 4
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    got = gradients(GatedMlp.apply(*ours), ours)
    want = gradients(rounded_mlp(*exact), exact)
    assert (got[0] - want[0]).abs().max() < 0.01 * want[0].abs().max()  # a bf16 tie may round the other way
    for a, b in zip(got[1:], want[1:], strict=True):  # these also round the gradients between the products
        assert (a - b).norm() < 0.01 * b.norm()


def test_mlp_gives_gradients_only_where_asked():
    tensors = [torch.randn(s) for s in ((5, 32), (64, 32), (64, 32), (32, 64))]
    tensors[2].requires_grad_()
    GatedMlp.apply(*tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [False, False, True, False]
