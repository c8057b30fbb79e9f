"""The blocked head against the plain one: values and gradients in float64."""

from __future__ import annotations

import pytest
import torch

from graft.kept import KeptTokens, entry_of
from graft.kernels.products import training_kernels
from graft.objective.kl import exact_kl
from graft.update import head
from graft.update.head import AnchorHead, NativeHead, TorchHead, score_tokens
from graft.update.kept_rows import KeptRows


def plain(hidden, weight, targets, temperature, mask=None):
    """Over the kept tokens alone: each row's own logits, picked out."""
    z = hidden @ weight.T / temperature
    mask = torch.ones_like(z, dtype=torch.bool) if mask is None else mask
    rows = [own[keep].log_softmax(-1) for own, keep in zip(z, mask, strict=True)]
    places = [int(keep[:target].sum()) for keep, target in zip(mask, targets, strict=True)]
    logprobs = torch.stack([row[place] for row, place in zip(rows, places, strict=True)])
    return logprobs, torch.stack([-(row.exp() * row).sum() for row in rows])


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(100, 5, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 100, (11,))


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(case, block, temperature, truncated, monkeypatch):
    monkeypatch.setattr(head, "BLOCK", block)
    hidden, weight, targets = case
    mask, kept = None, None
    if truncated:  # from the target alone to the whole vocabulary
        mask = torch.rand(11, 100) < torch.linspace(0, 1, 11)[:, None]
        mask[torch.arange(11), targets] = True
        kept = KeptRows.of(KeptTokens.of([entry_of(own.numpy()) for own in mask], 100))
    ours = score_tokens(
        hidden,
        weight,
        targets,
        temperature=temperature,
        entropy_gradient=True,
        kernels=TorchHead(torch.float64),
        kept=kept,
    )
    logprobs, entropies = plain(hidden, weight, targets, temperature, mask)
    torch.testing.assert_close(ours.logprobs, logprobs)
    torch.testing.assert_close(ours.entropies, entropies)
    a, b = torch.randn(2, 11, dtype=torch.float64)
    mine = torch.autograd.grad((a * ours.logprobs + b * ours.entropies).sum(), (hidden, weight))
    reference = torch.autograd.grad((a * logprobs + b * entropies).sum(), (hidden, weight))
    torch.testing.assert_close(mine, reference)


def kept_by(mask):
    return KeptRows.of(KeptTokens.of([entry_of(own.numpy()) for own in mask], mask.shape[1]))


def slow_kl(hidden, weight, anchor, temperature, mask):
    """Row by row over the kept tokens' own logits, all of them in memory."""
    z, y = hidden @ weight.T / temperature, anchor.hidden @ anchor.weight.T / temperature
    rows = [
        exact_kl(a[keep].log_softmax(-1)[None], b[keep].log_softmax(-1)[None])
        for a, b, keep in zip(z, y, mask, strict=True)
    ]
    return torch.cat(rows)


@pytest.fixture
def anchor():
    generator = torch.Generator().manual_seed(1)
    return AnchorHead(
        torch.randn(11, 5, dtype=torch.float64, generator=generator),
        torch.randn(100, 5, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_exact_kl(case, anchor, block, temperature, truncated, monkeypatch):
    monkeypatch.setattr(head, "BLOCK", block)
    hidden, weight, targets = case
    mask = torch.ones(11, 100, dtype=torch.bool)
    if truncated:
        mask = torch.rand(11, 100) < torch.linspace(0, 1, 11)[:, None]
        mask[torch.arange(11), targets] = True
    ours = score_tokens(
        hidden,
        weight,
        targets,
        temperature=temperature,
        entropy_gradient=True,
        kernels=TorchHead(torch.float64),
        kept=kept_by(mask) if truncated else None,
        anchor=anchor,
    )
    logprobs, entropies = plain(hidden, weight, targets, temperature, mask)
    slow = slow_kl(hidden, weight, anchor, temperature, mask)
    assert ours.kl is not None
    torch.testing.assert_close(ours.kl, slow)
    torch.testing.assert_close(ours.logprobs, logprobs)
    torch.testing.assert_close(ours.entropies, entropies)
    a, b, c = torch.randn(3, 11, dtype=torch.float64)
    mine = torch.autograd.grad((a * ours.logprobs + b * ours.entropies + c * ours.kl).sum(), (hidden, weight))
    reference = torch.autograd.grad((a * logprobs + b * entropies + c * slow).sum(), (hidden, weight))
    torch.testing.assert_close(mine, reference)


def test_the_gradient_of_the_exact_kl_against_finite_differences(case, anchor, monkeypatch):
    monkeypatch.setattr(head, "BLOCK", 32)
    hidden, weight, targets = case

    def kl(hidden, weight):
        scores = score_tokens(
            hidden,
            weight,
            targets,
            temperature=0.7,
            entropy_gradient=False,
            kernels=TorchHead(torch.float64),
            anchor=anchor,
        )
        assert scores.kl is not None
        return scores.kl

    assert torch.autograd.gradcheck(kl, (hidden, weight))


def test_the_kl_to_itself_is_exactly_zero(case):
    hidden, weight, targets = (t.detach() for t in case)
    scores = score_tokens(
        hidden.float(),
        weight.float(),
        targets,
        temperature=0.7,
        entropy_gradient=False,
        kernels=TorchHead(torch.float32),
        anchor=AnchorHead(hidden.float(), weight.float()),
    )
    assert scores.kl is not None
    assert not scores.kl.any()


def test_the_mean_of_k1_over_all_tokens_is_the_exact_kl(case, anchor):
    """The same state with every token of the vocabulary as its target, weighted by its probability."""
    hidden, weight, _ = case
    every = torch.arange(100)

    def scores(states, head_weight, beside=None):
        return score_tokens(
            states[:1].expand(100, -1),
            head_weight,
            every,
            temperature=0.7,
            entropy_gradient=False,
            kernels=TorchHead(torch.float64),
            anchor=beside,
        )

    beside = AnchorHead(anchor.hidden[:1].expand(100, -1), anchor.weight)
    ours, theirs = scores(hidden, weight, beside), scores(anchor.hidden, anchor.weight)
    expectation = (ours.logprobs.exp() * (ours.logprobs - theirs.logprobs)).sum()
    assert ours.kl is not None
    torch.testing.assert_close(ours.kl, expectation.expand(100))


def test_entropies_carry_no_gradient_unless_asked(case):
    hidden, weight, targets = case
    scores = score_tokens(
        hidden,
        weight,
        targets,
        temperature=1.0,
        entropy_gradient=False,
        kernels=TorchHead(torch.float64),
    )
    assert not scores.entropies.requires_grad
    logprobs, _ = plain(hidden, weight, targets, 1.0)
    mine = torch.autograd.grad(scores.logprobs.sum(), (hidden, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(logprobs.sum(), (hidden, weight)))


def test_a_frozen_head_gets_no_gradient(case):
    hidden, weight, targets = case
    scores = score_tokens(
        hidden,
        weight.detach(),
        targets,
        temperature=1.0,
        entropy_gradient=False,
        kernels=TorchHead(torch.float64),
    )
    scores.logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[300.0, 0.0], [-300.0, 1.0]])
    scores = score_tokens(
        hidden,
        weight,
        torch.tensor([1]),
        temperature=1.0,
        entropy_gradient=True,
        kernels=TorchHead(torch.float32),
    )
    assert scores.logprobs.item() == pytest.approx(-600)
    assert scores.entropies.item() == pytest.approx(0)
    (scores.logprobs + scores.entropies).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("block", [32, 4096])
def test_the_native_head(block, truncated, monkeypatch):
    """Against float64 on the rounded factors; only the logits' gradient is rounded besides."""
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    monkeypatch.setattr(head, "BLOCK", block)
    torch.manual_seed(0)
    hidden = (3 * torch.randn(45, 48)).bfloat16().float().requires_grad_()
    weight = torch.randn(150, 48).bfloat16().float().requires_grad_()
    targets = torch.randint(0, 150, (45,))
    mask, kept = None, None
    if truncated:
        mask = torch.rand(45, 150) < torch.linspace(0, 1, 45)[:, None]
        mask[torch.arange(45), targets] = True
        kept = KeptRows.of(KeptTokens.of([entry_of(own.numpy()) for own in mask], 150))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = plain(exact[0], exact[1], targets, 1.3, mask)
    settings = {"temperature": 1.3, "entropy_gradient": True, "kernels": NativeHead(), "kept": kept}
    scattered = torch.stack([targets, targets], 1)[:, 1]
    ours = score_tokens(hidden, weight, scattered, **settings)
    for a, b in zip(ours[:2], wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
    a, b = torch.randn(2, 45)
    mine = torch.autograd.grad((a * ours.logprobs + b * ours.entropies).sum(), (hidden, weight))
    theirs = torch.autograd.grad((a.double() * wanted[0] + b.double() * wanted[1]).sum(), exact)
    for x, y in zip(mine, theirs, strict=True):
        assert (x - y).norm() < 2**-8 * y.norm()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("truncated", [False, True])
def test_the_exact_kl_with_bf16_products(native, truncated, monkeypatch):
    """Against float64 on the rounded factors. The logits' gradient is rounded, natively twice."""
    reason = training_kernels()
    if native and isinstance(reason, str):
        pytest.skip(reason)
    monkeypatch.setattr(head, "BLOCK", 32)
    torch.manual_seed(0)
    hidden = (3 * torch.randn(45, 48)).bfloat16().float().requires_grad_()
    weight = torch.randn(150, 48).bfloat16().float().requires_grad_()
    anchor = AnchorHead(
        (hidden + torch.randn(45, 48)).detach().bfloat16().float(), weight.detach().flip(0).contiguous()
    )
    targets = torch.randint(0, 150, (45,))
    mask = torch.ones(45, 150, dtype=torch.bool)
    if truncated:
        mask = torch.rand(45, 150) < torch.linspace(0, 1, 45)[:, None]
        mask[torch.arange(45), targets] = True
    ours = score_tokens(
        hidden,
        weight,
        targets,
        temperature=1.3,
        entropy_gradient=True,
        kernels=NativeHead() if native else TorchHead(torch.bfloat16),
        kept=kept_by(mask) if truncated else None,
        anchor=anchor,
    )
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logprobs, entropies = plain(exact[0], exact[1], targets, 1.3, mask)
    slow = slow_kl(exact[0], exact[1], AnchorHead(anchor.hidden.double(), anchor.weight.double()), 1.3, mask)
    assert ours.kl is not None
    if native:
        torch.testing.assert_close(ours.kl.double(), slow, rtol=1e-5, atol=2e-5)
    assert (ours.kl - slow).norm() < 2**-6 * slow.norm()  # torch rounds the logits, too
    a, b, c = torch.randn(3, 45)
    mine = torch.autograd.grad((a * ours.logprobs + b * ours.entropies + c * ours.kl).sum(), (hidden, weight))
    theirs = torch.autograd.grad((a * logprobs + b * entropies + c * slow).sum(), exact)
    for x, y in zip(mine, theirs, strict=True):
        assert (x - y).norm() < 2**-5 * y.norm()
