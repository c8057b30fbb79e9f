"""Gradients that are added to in place are those that autograd would have added up itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from graft.assemble import build_forward
from graft.kernels.products import training_kernels
from graft.model import AdapterSettings, _enable_checkpointing, load_model, trainable
from graft.update.gradients import embed_in_place, gradient_place, make_gradients
from graft.update.head import NativeHead, TorchHead, score_tokens
from graft.update.packing import MicroBatch
from graft.update.policy import PolicyForward, Precision
from tests.update.test_step import make_batches

CPU = torch.device("cpu")


def embedding(padding: int | None = None) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(20, 3, padding_idx=padding, dtype=torch.float64)


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("made", [False, True])
def test_an_embedding_gets_the_gradient_of_torch(padding, made):
    """Tokens that occur twice, the padding token, two backward passes."""
    theirs = embedding(padding)
    ours = copy.deepcopy(theirs)
    embed_in_place(ours)
    if made:
        make_gradients(ours.parameters())
    for tokens in (torch.tensor([[1, 5, 1, 7]]), torch.tensor([[5, 7, 0, 19]])):
        direction = torch.randn(1, 4, 3, dtype=torch.float64)
        for layer in (ours, theirs):
            layer(tokens).backward(direction)
        assert torch.equal(ours(tokens), theirs(tokens))
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-14, atol=1e-14)
    assert (ours.weight.grad[5] == 0).all() == (padding == 5)


def test_an_embedding_adds_where_the_gradient_is():
    layer = embedding()
    embed_in_place(layer)
    make_gradients(layer.parameters())
    assert layer.weight.grad is not None
    place, seen = layer.weight.grad.data_ptr(), []
    layer.weight.register_hook(lambda gradient: seen.append(gradient))
    for _ in range(2):
        layer(torch.tensor([3, 3, 4])).sum().backward()
    assert layer.weight.grad.data_ptr() == place
    assert seen == [None, None]  # no tensor of its own was handed over
    assert layer.weight.grad.sum(1).tolist() == [0, 0, 0, 12, 6, *[0] * 15]


@pytest.mark.parametrize(
    "layer", [nn.Embedding(9, 2, max_norm=1.0), nn.Embedding(9, 2, scale_grad_by_freq=True)]
)
def test_other_embeddings_stay_as_they_are(layer):
    embed_in_place(layer)
    assert "forward" not in vars(layer)


def test_where_a_gradient_may_be_added():
    weight = nn.Parameter(torch.ones(2))
    assert gradient_place(weight) is None
    make_gradients([weight])
    assert gradient_place(weight) is weight.grad
    assert gradient_place(weight * 2) is None
    narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    make_gradients([narrow])
    assert gradient_place(narrow) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_head_adds_where_the_gradient_is(dtype):
    """bf16 weights have no such place; theirs comes by autograd, once as well."""
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(torch.randn(100, 8, dtype=dtype))
    directions, targets = torch.randn(2, 11), torch.randint(0, 100, (11,))

    def add(direction: torch.Tensor) -> None:
        scores = score_tokens(
            hidden, weight, targets, temperature=0.8, entropy_gradient=False, kernels=TorchHead(dtype)
        )
        (scores.logprobs * direction).sum().backward()

    parts = []
    for direction in directions:
        hidden.grad = weight.grad = None
        add(direction)
        parts.append((hidden.grad, weight.grad))
    expected = [a + b for a, b in zip(*parts, strict=True)]
    hidden.grad = None
    make_gradients([weight])
    assert weight.grad is not None
    place = weight.grad.data_ptr()
    for direction in directions:
        add(direction)
    torch.testing.assert_close([hidden.grad, weight.grad], expected)
    assert weight.grad.data_ptr() == place


def test_the_native_head_adds_where_the_gradient_is():
    """One block, one sum of products: the same to the bit as adding afterwards."""
    reason = training_kernels()
    if isinstance(reason, str):
        pytest.skip(reason)
    torch.manual_seed(0)
    hidden, targets = torch.randn(45, 48), torch.randint(0, 150, (45,))
    weight = nn.Parameter(torch.randn(150, 48))
    directions = torch.randn(2, 45)

    def add(direction: torch.Tensor) -> None:
        scores = score_tokens(
            hidden, weight, targets, temperature=1.3, entropy_gradient=False, kernels=NativeHead()
        )
        (scores.logprobs * direction).sum().backward()

    parts = []
    for direction in directions:
        weight.grad = None
        add(direction)
        parts.append(weight.grad)
    make_gradients([weight])
    for direction in directions:
        add(direction)
    assert weight.grad is not None
    assert torch.equal(weight.grad, parts[0] + parts[1])


def tiny(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        pad_token_id=7,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def sum_of_gradients(forward: PolicyForward, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Of all micro-batches, each with gradients of its own."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        forward.model.zero_grad(set_to_none=True)
        loss_of(forward, batch).backward()
        for name, parameter in forward.model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad
    forward.model.zero_grad(set_to_none=True)
    return total


def loss_of(forward: PolicyForward, batch: MicroBatch) -> torch.Tensor:
    return (forward(batch, temperature=0.8).logprobs * batch.advantages * batch.weights).sum()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_add_up(native, tied, checkpointing):
    """Head and embedding, one weight or two, with and without layers that are computed again."""
    reason = training_kernels()
    if native and isinstance(reason, str):
        pytest.skip(reason)
    model = tiny(tied)
    forward = build_forward(model, Precision("bf16" if native else "exact", CPU, native=native))
    if checkpointing:
        _enable_checkpointing(model)
    batches = make_batches(40)
    assert len(batches) > 2
    expected = sum_of_gradients(forward, batches)
    make_gradients(model.parameters())
    for batch in batches:
        loss_of(forward, batch).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None
        assert gradient.norm() > 0
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max())
        )


def test_an_adapter_alone_gets_gradients(tiny_model_folder):
    policy = load_model(str(tiny_model_folder), adapter=AdapterSettings(rank=2))
    forward = PolicyForward(policy.plain, Precision("exact", CPU))
    make_gradients(trainable(policy).values())
    for batch in make_batches(40):
        loss_of(forward, batch).backward()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        if name.endswith("lora_B.default.weight"):
            assert parameter.grad is not None
            assert parameter.grad.norm() > 0
