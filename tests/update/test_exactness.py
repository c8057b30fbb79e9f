"""Methods, section 10: padded, packed, tree-packed, any micro-batching give the same loss and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graft.algorithm_settings import GRPO, TokenClip
from graft.algorithms import ALGORITHMS
from graft.losses import TokenBatch
from graft.tree import Kind, Tree
from graft.types import Credit, Prompt
from graft.update.packing import MicroBatch, pack
from graft.update.policy import PolicyForward, Precision, check_packed_forward
from tests.trees import kept_masks, random_credit, random_deep_tree, random_group, truncated

CPU = torch.device("cpu")


def load(folder, dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if dtype == torch.float64:  # transformers' RMSNorm rounds to float32 inside, whatever the weights' type
        for name, module in list(model.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                exact = torch.nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=dtype)
                exact.weight = module.weight
                model.set_submodule(name, exact)
    return model


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def packed_loss(model, batches: list[MicroBatch], *, old) -> tuple[float, Tensor]:
    """Clipped loss over micro-batches with the given old log-probabilities (by tree and node)."""
    model.zero_grad()
    forward = PolicyForward(model, Precision("exact", CPU))
    total = 0.0
    for batch in batches:
        scores = forward(batch, temperature=0.8, entropy_gradient=True)
        before = torch.cat([old[w.tree, w.node] for w in batch.slices])
        tokens = TokenBatch(
            scores.logprobs, scores.entropies, before, before, None, batch.advantages, batch.nodes
        )
        settings = GRPO(clip=TokenClip(low=0.2, high=0.3))
        loss = (ALGORITHMS["grpo"].loss(tokens, settings).per_token * batch.weights).sum()
        loss = loss - 0.01 * (scores.entropies * batch.weights).sum()
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def padded_loss(model, trees, credits, *, old) -> tuple[float, Tensor]:
    """The same, written out: each trained span in a padded row of its own with its whole path, full logits."""
    model.zero_grad()
    model.set_attn_implementation("sdpa")  # eager's softmax is float32 inside
    spans = [(t, n) for t, credit in enumerate(credits) for n in credit.weights]
    paths = [np.concatenate([trees[t].nodes[i].tokens for i in trees[t].path(n)]) for t, n in spans]
    width = max(map(len, paths))
    tokens = torch.full((len(paths), width), 2)  # padded with the end-of-sequence id
    mask = torch.zeros_like(tokens)
    for row, path in enumerate(paths):
        tokens[row, : len(path)] = torch.tensor(path)
        mask[row, : len(path)] = 1
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits / 0.8
    log_p = logits.log_softmax(-1)
    loss = torch.zeros((), dtype=log_p.dtype)
    for row, (t, n) in enumerate(spans):
        own = len(trees[t].nodes[n])
        start = len(paths[row]) - own - 1
        rows = log_p[row, start : start + own]
        kept = trees[t].nodes[n].kept
        if kept is not None:
            allowed = torch.from_numpy(kept_masks(kept))
            rows = logits[row, start : start + own].masked_fill(~allowed, -1e6).log_softmax(-1)
        logprobs = rows.gather(1, torch.tensor(trees[t].nodes[n].tokens).long()[:, None])[:, 0]
        ratio = (logprobs - old[t, n]).exp()
        advantage = torch.tensor(credits[t].advantages[n])
        clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))
        entropy = -(rows.exp() * rows).sum(-1)
        loss = loss + ((clipped - 0.01 * entropy) * torch.tensor(credits[t].weights[n])).sum()
    loss.backward()
    return float(loss.detach()), gradients(model)


def old_logprobs(trees: list[Tree], credits: list[Credit], rng, dtype) -> dict[tuple[int, int], Tensor]:
    """Made up, near -5: random weights give about -5.7, so ratios fall on both sides of the clip."""
    return {
        (t, n): torch.tensor(-5.5 + 0.5 * rng.normal(size=len(trees[t].nodes[n])), dtype=dtype)
        for t, credit in enumerate(credits)
        for n in credit.weights
    }


def whole(tree: Tree, rng: np.random.Generator) -> Tree:
    """Drawn from the whole distribution."""
    return tree


@pytest.mark.parametrize("cut", [whole, truncated], ids=["whole", "truncated"])
@pytest.mark.parametrize("shape", [random_group, random_deep_tree])
@pytest.mark.parametrize("budget", [10_000, 40, 12])
def test_tiny_model_in_float64(tiny_model_folder, shape, budget, cut):
    rng = np.random.default_rng(1)
    model = load(tiny_model_folder, torch.float64)
    trees = [cut(shape(rng, row=i), rng) for i in range(4)]
    credits = [random_credit(tree, rng, share=0.8) for tree in trees]
    old = old_logprobs(trees, credits, rng, torch.float64)

    loss, gradient = packed_loss(model, pack(trees, credits, token_budget=budget), old=old)
    expected, reference = padded_loss(model, trees, credits, old=old)

    assert loss == pytest.approx(expected, rel=1e-12)
    assert relative(gradient, reference) <= 1e-10


@pytest.mark.parametrize("shape", [random_group, random_deep_tree])
@pytest.mark.parametrize("budget", [10_000, 20])
def test_samples_that_begin_alike(tiny_model_folder, shape, budget):
    """Three different tokens: many beginnings are shared, and merged, with other advantages for the same token."""
    rng = np.random.default_rng(2)
    model = load(tiny_model_folder, torch.float64)
    trees = [shape(rng, row=i, vocabulary=6) for i in range(4)]
    credits = [random_credit(tree, rng, share=0.9) for tree in trees]
    old = old_logprobs(trees, credits, rng, torch.float64)
    batches = pack(trees, credits, token_budget=budget)
    assert sum(len(b.targets) for b in batches) < sum(len(b.predictions) for b in batches)

    loss, gradient = packed_loss(model, batches, old=old)
    expected, reference = padded_loss(model, trees, credits, old=old)

    assert loss == pytest.approx(expected, rel=1e-12)
    assert relative(gradient, reference) <= 1e-10


def written_tree(tokenizer, row: int, question: str, *paths: tuple[str, ...]) -> Tree:
    """A tree of texts; paths that begin alike share their spans."""

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)

    tree = Tree(Prompt(row=row, messages=(), item={}, tokens=ids(question), question=question))
    nodes: dict[tuple[str, ...], int] = {(): 0}
    for path in paths:
        for depth in range(1, len(path) + 1):
            if path[:depth] not in nodes:
                parent, group = nodes[path[: depth - 1]], tree.new_group()
                nodes[path[:depth]] = tree.add(
                    parent, ids(path[depth - 1]), group=group, kind=Kind.THOUGHT, stop=None
                )
    return tree


def test_real_model_in_float32_against_float64(embedded_model_folder):
    rng = np.random.default_rng(2)
    model = load(embedded_model_folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder)
    trees = [
        written_tree(
            tokenizer,
            0,
            "<|im_start|>user\nWhat is 4 - 1 - 7?<|im_end|>\n<|im_start|>assistant\n",
            ("4 - 1 = 3\n3 - 7 = -4\nAnswer: -4<|im_end|>",),
            ("4 - 1 = 3, so the answer is 3.<|im_end|>",),
            ("4",),
        ),
        written_tree(
            tokenizer,
            1,
            "<|im_start|>user\nWhich city is the capital of France, and why?<|im_end|>\n<|im_start|>assistant\n",
            ("The capital of France is", " Paris, where its government", " has its seat.<|im_end|>"),
            ("The capital of France is", " Paris, where its government", " meets.<|im_end|>"),
            ("The capital of France is", " Lyon.<|im_end|>"),
            ("I do not know.<|im_end|>",),
        ),
    ]
    credits = [  # one advantage a span, as every method gives; noise on single tokens would cancel in the sum
        Credit(
            {n: np.full(len(tree.nodes[n]), (-1.0) ** n, dtype=np.float32) for n in range(1, len(tree))},
            {n: np.full(len(tree.nodes[n]), 1 / len(tree.nodes[n])) for n in range(1, len(tree))},
        )
        for tree in trees
    ]
    [batch] = pack(trees, credits, token_budget=10_000)
    with torch.no_grad():
        now = PolicyForward(model, Precision("exact", CPU))(batch, temperature=0.8).logprobs
    near = now + 0.2 * torch.tensor(
        rng.normal(size=len(now)), dtype=torch.float32
    )  # some ratios clipped, some not
    old = {(w.tree, w.node): near[w.start : w.end] for w in batch.slices}
    in_float64 = load(embedded_model_folder, torch.float64)
    expected, truth = padded_loss(in_float64, trees, credits, old={k: v.double() for k, v in old.items()})
    _, padded = padded_loss(model, trees, credits, old=old)
    for budget in (10_000, 16):
        loss, gradient = packed_loss(model, pack(trees, credits, token_budget=budget), old=old)
        assert loss == pytest.approx(expected, rel=1e-5)
        # float32 itself is off by about 1e-5 here, differently on each processor; packing must not add to it
        assert relative(gradient, truth) <= max(1e-5, 1.25 * relative(padded, truth))


def test_the_order_of_trees_and_their_packing_changes_nothing(tiny_model_folder):
    rng = np.random.default_rng(4)
    model = load(tiny_model_folder, torch.float64)
    trees = [random_group(rng, row=i) for i in range(5)]
    credits = [random_credit(tree, rng) for tree in trees]
    old = old_logprobs(trees, credits, rng, torch.float64)
    _, reference = packed_loss(model, pack(trees, credits, token_budget=10_000), old=old)
    order = [3, 0, 4, 1, 2]
    shuffled = {(order.index(t), n): x for (t, n), x in old.items()}
    batches = pack([trees[i] for i in order], [credits[i] for i in order], token_budget=25)
    assert relative(packed_loss(model, batches, old=shuffled)[1], reference) <= 1e-10


def test_padding_with_the_end_of_sequence_id_changes_nothing(tiny_model_folder):
    """Masks come from positions: spans may be full of EOS, and trained EOS tokens count."""
    rng = np.random.default_rng(6)
    model = load(tiny_model_folder, torch.float64)
    tree = random_group(rng)
    eos = Tree(tree.prompt)
    group = eos.new_group()
    for leaf in tree.leaves():
        ids = np.full(len(tree.nodes[leaf]), 2, dtype=np.int32)
        eos.add(0, ids, tree.nodes[leaf].engine_logprobs, group=group, kind=tree.nodes[leaf].kind, stop=None)
    credit = random_credit(eos, rng)
    old = old_logprobs([eos], [credit], rng, torch.float64)
    _, gradient = packed_loss(model, pack([eos], [credit], token_budget=9), old=old)
    assert relative(gradient, padded_loss(model, [eos], [credit], old=old)[1]) <= 1e-10


def test_the_check_at_start_passes_a_llama_and_catches_a_model_that_ignores_the_layout(tiny_model_folder):
    model = load(tiny_model_folder, torch.float32)
    check_packed_forward(PolicyForward(model, Precision("exact", CPU)))

    from graft.errors import ModelError

    scaled = PolicyForward(model, Precision("exact", CPU))
    scale = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * scale(hidden)  # logits that the chunked head does not know of
    with pytest.raises(ModelError, match="packed tree"):
        check_packed_forward(scaled)
