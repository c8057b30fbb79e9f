"""A process reward model: a tiny random one, written to disk and asked the slow way too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from graft.critics.prm import PRMCritic, load_prm
from graft.errors import ModelError
from graft.types import Chain, Outcome
from tests.conftest import build_tiny_config, build_tiny_tokenizer
from tests.critics.chains import behind, make_chain

CPU = torch.device("cpu")
CHAINS = [
    make_chain("the sum is 4\n", " so the answer is 4\n", question="2 + 2?", score=0.5),
    make_chain("a", question="Why?"),
    make_chain(question="Why?"),
    make_chain("one", "two", "three and a longer one", question="What is the sum of the numbers?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForTokenClassification(build_tiny_config(num_labels=2)).save_pretrained(path)
    build_tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_prm(str(folder), CPU)


def slow(loaded: tuple[Any, Any], chain: Chain, separator: str, prefix: str | None = None) -> list[float]:
    """Each thought by a forward pass of its own over what stands before its end."""
    model, tokenizer = loaded

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found, so_far = [], ids(chain.prompt.question if prefix is None else prefix)
    for thought in chain.thoughts:
        so_far = so_far + ids(thought.strip()) + ids(separator)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([so_far])).logits[0, -1]
        found.append(float(torch.exp(logits[1]) / torch.exp(logits).sum()))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("separator", ["\n", "<|im_end|>", ""])
def test_judgements_are_read_at_the_ends_of_thoughts(loaded, separator, batch_size):
    critic = PRMCritic(*loaded, scale=10, separator=separator, progress="same", batch_size=batch_size)
    for chain, critique in zip(CHAINS, critic(CHAINS), strict=True):
        expected = [10 * p for p in slow(loaded, chain, separator)]
        assert critique.thoughts == pytest.approx(expected, abs=1e-4)
        assert critique.progress == critique.thoughts
        assert critique.outcome is Outcome.GRADED
    assert critic(CHAINS)[0].overall == 5


def test_messages_before_the_question_are_read(loaded):
    chain = behind(CHAINS[3], ("system", "Be right."), ("user", "1?"), ("assistant", "2"))
    [critique] = PRMCritic(*loaded, scale=1, progress="same")([chain])
    whole = f"Be right.\n1?\n2\n{CHAINS[3].prompt.question}"
    assert critique.thoughts == pytest.approx(slow(loaded, chain, "\n", prefix=whole), abs=1e-5)
    assert critique.thoughts != pytest.approx(slow(loaded, CHAINS[3], "\n"), abs=1e-5)


def test_progress(loaded):
    chain = CHAINS[3]
    r = slow(loaded, chain, "\n")
    [least] = PRMCritic(*loaded, scale=1)([chain])
    assert least.progress == pytest.approx([r[0], min(r[:2]), min(r)], abs=1e-5)
    [product] = PRMCritic(*loaded, scale=1, progress="product")([chain])
    assert product.progress == pytest.approx([r[0], r[0] * r[1], r[0] * r[1] * r[2]], abs=1e-5)


def test_the_other_label(loaded):
    [critique] = PRMCritic(*loaded, scale=1, label=0)([CHAINS[0]])
    assert critique.thoughts == pytest.approx([1 - p for p in slow(loaded, CHAINS[0], "\n")], abs=1e-5)


def test_chat_template(loaded):
    _, tokenizer = loaded
    prefix = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], tokenize=False, add_generation_prompt=True
    )
    assert prefix.endswith("assistant\n")
    [critique] = PRMCritic(*loaded, scale=1, template="chat")([CHAINS[0]])
    assert critique.thoughts == pytest.approx(slow(loaded, CHAINS[0], "\n", prefix), abs=1e-5)


def test_chains_that_are_too_long(loaded):
    critic = PRMCritic(*loaded, scale=1)
    long, short = critic([make_chain("x" * 300, question="?"), CHAINS[1]])
    assert (long.outcome, long.thoughts) == (Outcome.OVER_LIMIT, ())
    assert "reads 256" in long.problem
    assert short.scored


def test_a_model_that_diverged(loaded):
    model, tokenizer = loaded
    broken = LlamaForTokenClassification(model.config)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    [critique] = PRMCritic(broken.eval(), tokenizer, scale=1)([CHAINS[0]])
    assert (critique.outcome, critique.thoughts) == (Outcome.NOT_FINITE, ())


def test_nothing_to_read(loaded):
    [critique] = PRMCritic(*loaded, scale=1, separator="")([make_chain(" ", question="")])
    assert critique.outcome is Outcome.CRASHED


@pytest.mark.parametrize("label", [2, 7])
def test_labels_that_are_not_there(loaded, label):
    with pytest.raises(ModelError, match=f"has 2 labels; critic.label = {label}"):
        PRMCritic(*loaded, scale=1, label=label)


def test_a_model_without_a_head_is_refused(tmp_path):
    LlamaForCausalLM(build_tiny_config()).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks the weights score\..*judge at random"):
        load_prm(str(tmp_path), CPU)


def test_no_model_at_all(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_prm(str(tmp_path / "nothing"), CPU)
