"""The engine against the plain loop: a whole forward pass for each token, one sample at a time. Both decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from graft.errors import DivergenceError
from graft.kernels.library import Engine as Products
from graft.kernels.library import Kernels, load_kernels
from graft.rollout.decoder import Decoder
from graft.rollout.engine import Continuation
from graft.rollout.grow import grow_groups
from graft.rollout.hf_decoder import HuggingFaceDecoder
from graft.rollout.llama_decoder import LlamaDecoder
from graft.rollout.sampling import Drawn, SamplingSettings, draw_rows, stream_key, uniforms
from graft.rollout.torch_engine import TorchEngine
from graft.types import Credit, Prompt, Purpose, StopReason
from graft.update.packing import pack
from graft.update.policy import PolicyForward, Precision
from tests.trees import kept_masks

CPU = torch.device("cpu")
EOS = tuple(range(3, 320, 12))  # 27 of 320 tokens: samples end after about twelve

Build = Callable[..., TorchEngine]


def load(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> LlamaForCausalLM:
    return load(tiny_model_folder)


def fp32_decoder(kind: str, model: LlamaForCausalLM) -> Decoder:
    if kind == "generic":
        return HuggingFaceDecoder(model.config, dtype=torch.float32, device=CPU)
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    kernels = Kernels(found.path)
    if Products.FP32 not in kernels.engines:
        pytest.skip("this CPU has no fp32 kernels")
    return LlamaDecoder(model.config, kernels, torch.float32)


@pytest.fixture(params=["generic", "fast"])
def build(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> Build:
    """`build(slots=…, eos_ids=…)`: an engine with the tiny model's weights."""

    def make(*, slots: int = 64, eos_ids: Sequence[int] = EOS) -> TorchEngine:
        engine = TorchEngine(fp32_decoder(request.param, model), slots=slots, eos_ids=eos_ids)
        engine.load_weights(model.state_dict(), version=0)
        return engine

    return make


def random_prefixes(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 320, length).astype(np.int32) for length in lengths]


def keys_for(*counts: int, step: int = 1) -> list[list[int]]:
    return [
        [stream_key(0, Purpose.TRAIN, step, row, 0, place) for place in range(count)]
        for row, count in enumerate(counts)
    ]


@torch.no_grad()
def plain_generate(
    model: Any, prefix: np.ndarray, key: int, sampling: SamplingSettings, eos_ids: Sequence[int]
) -> tuple[list[int], list[float], StopReason]:
    """`generate` as it is usually written down, but for the source of randomness and the end of a sample."""
    generated = torch.tensor(prefix.astype(np.int64))[None]
    tokens: list[int] = []
    logprobs: list[float] = []
    for position in range(sampling.max_new_tokens):
        scores = model(input_ids=generated, use_cache=False).logits[0, -1].double() / sampling.temperature
        kept = torch.ones_like(scores, dtype=torch.bool)
        if sampling.top_k is not None:
            kept = torch.zeros_like(kept).scatter(0, scores.topk(sampling.top_k).indices, True)
        if sampling.top_p is not None:
            reached, kept = 0.0, torch.zeros_like(kept)
            for token in scores.argsort(descending=True).tolist():
                kept[token] = True
                reached += float(scores.softmax(-1)[token])
                if reached >= sampling.top_p:
                    break
        p = torch.where(kept, scores, -torch.inf).softmax(-1)
        uniform = float(uniforms(np.array([key], dtype=np.uint64), np.array([position]))[0])
        token = int((p.cumsum(-1) > uniform).nonzero()[0])
        tokens.append(token)
        logprobs.append(float(p[token].log()))
        if token in eos_ids:
            return tokens, logprobs, StopReason.EOS
        generated = torch.cat([generated, torch.tensor([[token]])], 1)
    return tokens, logprobs, StopReason.LENGTH


def assert_is_the_plain_loop(
    grown: Sequence[Sequence[Continuation]],
    model: Any,
    prefixes: Sequence[np.ndarray],
    keys: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    eos_ids: Sequence[int] = EOS,
) -> None:
    assert [len(own) for own in grown] == [len(own) for own in keys]
    for prefix, own_keys, own in zip(prefixes, keys, grown, strict=True):
        for key, continuation in zip(own_keys, own, strict=True):
            tokens, logprobs, stop = plain_generate(model, prefix, key, sampling, eos_ids)
            assert continuation.tokens.tolist() == tokens
            assert continuation.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)
            assert continuation.stop is stop
            assert continuation.tokens.dtype == np.int32
            assert continuation.logprobs.dtype == np.float32


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(24),
        SamplingSettings(16, temperature=0.7),
        SamplingSettings(16, temperature=0.1),
        SamplingSettings(16, temperature=1.5),
        SamplingSettings(16, top_k=20),
        SamplingSettings(16, temperature=1.2, top_p=0.7),
        SamplingSettings(1),
    ],
    ids=str,
)
def test_samples_are_those_of_the_plain_loop(build, model, sampling):
    """Prompts of 1 to 40 tokens; 11 samples in 4 slots, so that they leave, enter and the batch shrinks."""
    prefixes, keys = random_prefixes(40, 1, 7, 16), keys_for(3, 3, 1, 4)
    grown = build(slots=4).grow(prefixes, keys, sampling)
    assert_is_the_plain_loop(grown, model, prefixes, keys, sampling)
    if sampling.max_new_tokens >= 16:
        ends = {c.stop for own in grown for c in own}
        assert ends == {StopReason.EOS, StopReason.LENGTH}  # both ways of ending have been tried
        assert len({len(c.tokens) for own in grown for c in own}) > 3


def test_one_end_token_and_none(build, model):
    prefixes, keys = random_prefixes(5, 3), keys_for(4, 4)
    sampling = SamplingSettings(12)
    assert_is_the_plain_loop(
        build(eos_ids=()).grow(prefixes, keys, sampling), model, prefixes, keys, sampling, ()
    )
    [first, *_], *_ = build(eos_ids=()).grow(prefixes, keys, sampling)
    eos = int(first.tokens[4])
    [ended, *_], *_ = build(eos_ids=(eos,)).grow(prefixes, keys, sampling)
    place = first.tokens.tolist().index(eos)
    assert ended.tokens.tolist() == first.tokens[: place + 1].tolist()  # the end token is part of the sample
    assert ended.stop is StopReason.EOS


def test_an_end_token_at_the_last_place_counts_as_an_end(build):
    prefixes, keys = random_prefixes(5), keys_for(1)
    [[whole]] = build(eos_ids=()).grow(prefixes, keys, SamplingSettings(6))
    eos = int(whole.tokens[-1])
    assert eos not in whole.tokens[:-1]
    [[ended]] = build(eos_ids=(eos,)).grow(prefixes, keys, SamplingSettings(6))
    assert len(ended.tokens) == 6
    assert ended.stop is StopReason.EOS


def test_each_prefix_may_have_a_limit_of_its_own(build):
    """Its samples are the beginnings of those that are not cut off."""
    prefixes, keys = random_prefixes(3, 5, 2), keys_for(3, 2, 4)
    sampling = SamplingSettings(9)
    whole = build(slots=4, eos_ids=[]).grow(prefixes, keys, sampling)
    limits = [2, 9, 1]
    short = build(slots=4, eos_ids=[]).grow(prefixes, keys, sampling, limits=limits)
    for limit, own, cut in zip(limits, whole, short, strict=True):
        assert [c.tokens.tolist() for c in cut] == [c.tokens[:limit].tolist() for c in own]
        for one, other in zip(cut, own, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs[:limit], atol=1e-5)
        assert {c.stop for c in cut} == {StopReason.LENGTH}


@pytest.mark.parametrize("slots", [1, 2, 5, 19])
def test_the_number_of_slots_changes_no_sample(build, slots):
    prefixes, keys = random_prefixes(4, 9, 2), keys_for(8, 5, 6)
    sampling = SamplingSettings(14)
    expected = build(slots=64).grow(prefixes, keys, sampling)
    for own, others in zip(build(slots=slots).grow(prefixes, keys, sampling), expected, strict=True):
        for ours, theirs in zip(own, others, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_the_order_of_prompts_and_samples_changes_no_sample(build):
    prefixes, keys = random_prefixes(4, 9, 2), keys_for(5, 3, 4)
    sampling = SamplingSettings(14)
    engine = build(slots=3)
    forwards = engine.grow(prefixes, keys, sampling)
    backwards = engine.grow(prefixes[::-1], [own[::-1] for own in keys[::-1]], sampling)
    assert [[c.tokens.tolist() for c in own[::-1]] for own in backwards[::-1]] == [
        [c.tokens.tolist() for c in own] for own in forwards
    ]


def test_samples_that_end_at_their_first_token_make_room_for_others(build, model):
    """Half of all tokens end a sample, so slots stand empty while samples still wait."""
    ends = tuple(range(0, 320, 2))
    prefixes, keys = random_prefixes(3, 6), keys_for(30, 30)
    sampling = SamplingSettings(5)
    grown = build(slots=4, eos_ids=ends).grow(prefixes, keys, sampling)
    assert_is_the_plain_loop(grown, model, prefixes, keys, sampling, ends)
    assert sum(len(c.tokens) == 1 for own in grown for c in own) > 15


def test_every_token_ends_a_sample(build):
    grown = build(slots=2, eos_ids=range(320)).grow(
        random_prefixes(3, 6), keys_for(5, 4), SamplingSettings(9)
    )
    assert [[len(c.tokens) for c in own] for own in grown] == [[1] * 5, [1] * 4]


def test_nothing_to_draw(build):
    engine = build()
    assert engine.grow([], [], SamplingSettings(4)) == []
    assert engine.grow(random_prefixes(3, 4), [[], []], SamplingSettings(4)) == [[], []]
    [none, one] = engine.grow(random_prefixes(3, 4), [[], keys_for(1)[0]], SamplingSettings(4))
    assert none == []
    assert len(one) == 1


def test_progress_counts_every_token_once(build):
    told: list[int] = []
    grown = build(slots=3).grow(
        random_prefixes(4, 2), keys_for(5, 5), SamplingSettings(10), progress=told.append
    )
    assert told[-1] == sum(len(c.tokens) for own in grown for c in own)
    assert told == sorted(told)
    assert told[0] < 10
    assert len(told) > 10


def test_the_key_decides_the_sample(build):
    prefixes = random_prefixes(6)
    twice = [[*keys_for(3)[0], *keys_for(3)[0], *keys_for(3, step=2)[0]]]
    [grown] = build(eos_ids=()).grow(prefixes, twice, SamplingSettings(12))
    texts = [tuple(c.tokens.tolist()) for c in grown]
    assert texts[:3] == texts[3:6]
    assert len(set(texts)) == 6


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_the_kept_tokens_are_handed_on(build, filters):
    [[c]] = build(eos_ids=()).grow(random_prefixes(6), keys_for(1), SamplingSettings(8, **filters))
    if not filters:
        assert c.kept is None
        return
    assert c.kept is not None
    assert len(c.kept) == 8
    assert c.kept.contain(c.tokens).all()
    sizes = kept_masks(c.kept).sum(1)
    assert (sizes == 7).all() if "top_k" in filters else (sizes < 320).all()


def test_a_filter_that_cuts_nothing_off_is_none(build):
    """`top_p = 1` and `min_p = 0` take the untruncated path; top-k of the whole vocabulary stores nothing."""
    prefixes, keys = random_prefixes(6), keys_for(2)
    [plain] = build().grow(prefixes, keys, SamplingSettings(8))
    [same] = build().grow(prefixes, keys, SamplingSettings(8, top_p=1.0, min_p=0.0))
    assert [c.tokens.tolist() for c in same] == [c.tokens.tolist() for c in plain]
    assert [c.kept for c in same] == [None, None]
    [wide] = build().grow(prefixes, keys, SamplingSettings(8, top_k=320))
    assert [len(c.kept.words) for c in wide if c.kept] == [0, 0]


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 9}, {"top_p": 0.6}, {"min_p": 0.01}, {"min_p": 1e-12}, {"top_k": 40, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [10_000, 30])
def test_log_probabilities_are_the_trainers(build, tiny_model_folder, temperature, budget, filters):
    prompts = [
        Prompt(row=row, messages=(), item={}, tokens=prefix, question=str(row))
        for row, prefix in enumerate(random_prefixes(9, 3, 17))
    ]
    trees = grow_groups(
        build(slots=5),
        prompts,
        group_size=4,
        sampling=SamplingSettings(20, temperature=temperature, **filters),
        seed=0,
        purpose=Purpose.TRAIN,
        step=1,
    )
    credits = []
    for tree in trees:
        ones = {leaf: np.ones(tree.completion_length(leaf), np.float32) for leaf in tree.leaves()}
        credits.append(Credit(ones, {leaf: own.astype(np.float64) for leaf, own in ones.items()}))
    forward = PolicyForward(load(tiny_model_folder), Precision("exact", CPU))
    compared = 0
    blind = 0.0
    with torch.no_grad():
        for batch in pack(trees, credits, token_budget=budget):
            gap = (forward(batch, temperature=temperature).logprobs - batch.engine_logprobs).abs()
            assert gap.max() < 2e-5  # 1e-3 is what the methods allow
            compared += len(gap)
            full = forward(replace(batch, kept=None), temperature=temperature).logprobs
            blind = max(blind, float((full - batch.engine_logprobs).abs().max()))
    assert (blind > 0.01) == bool(
        filters and filters.get("min_p") != 1e-12
    )  # what forgetting the sets would cost
    assert compared == sum(tree.sampled_tokens for tree in trees) > 60


def test_new_weights_are_used_and_the_engine_can_be_used_again(build, model):
    prefixes, keys, sampling = random_prefixes(5, 8), keys_for(3, 3), SamplingSettings(10)
    engine = build(slots=4)
    assert engine.version == 0
    before = engine.grow(prefixes, keys, sampling)
    changed = LlamaForCausalLM(model.config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    engine.load_weights(changed.state_dict(), version=7)
    assert engine.version == 7
    after = engine.grow(prefixes, keys, sampling)
    assert_is_the_plain_loop(after, changed, prefixes, keys, sampling)
    assert [c.tokens.tolist() for c in after[0]] != [c.tokens.tolist() for c in before[0]]
    engine.load_weights(model.state_dict(), version=8)
    again = engine.grow(prefixes, keys, sampling)
    for ours, theirs in zip(
        [c for own in again for c in own], [c for own in before for c in own], strict=True
    ):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.logprobs.tolist() == theirs.logprobs.tolist()


def test_the_weights_are_a_copy(build, model):
    """The trainer changes its weights in place while the engine still stands."""
    engine = build()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.load_weights(own, version=1)
    prefixes, keys, sampling = random_prefixes(5), keys_for(3), SamplingSettings(6)
    before = engine.grow(prefixes, keys, sampling)
    for tensor in own.values():
        tensor.zero_()
    after = engine.grow(prefixes, keys, sampling)
    assert [c.logprobs.tolist() for c in after[0]] == [c.logprobs.tolist() for c in before[0]]


def test_dropped_weights_come_back(build, model):
    engine = build()
    prefixes, keys, sampling = random_prefixes(5), keys_for(3), SamplingSettings(6)
    before = engine.grow(prefixes, keys, sampling)
    engine.drop_weights()
    assert engine.version == -1
    engine.load_weights(model.state_dict(), version=1)
    after = engine.grow(prefixes, keys, sampling)
    assert [c.logprobs.tolist() for c in after[0]] == [c.logprobs.tolist() for c in before[0]]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}], ids=str)
def test_weights_that_give_no_finite_number_are_said_to_have_diverged(build, model, filters):
    engine = build()
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
    engine.load_weights(spoilt, version=12)
    with pytest.raises(DivergenceError, match="with the weights after 12 steps: a log-probability is"):
        engine.grow(random_prefixes(5), keys_for(3), SamplingSettings(4, **filters))


@pytest.mark.parametrize("slots", [9, 20, 64])
def test_samples_that_drew_the_same_are_computed_once(build, model, slots, monkeypatch):
    engine = build(slots=slots)
    rows_of_steps: list[int] = []
    step = engine.decoder.step

    def counted(slots, prefixes, tokens, lengths):
        assert len(set(slots.tolist())) == len(slots)
        rows_of_steps.append(len(tokens))
        return step(slots, prefixes, tokens, lengths)

    monkeypatch.setattr(engine.decoder, "step", counted)
    prefixes, keys, sampling = random_prefixes(5, 9), keys_for(9, 8), SamplingSettings(12, temperature=0.15)
    grown = engine.grow(prefixes, keys, sampling)
    assert_is_the_plain_loop(grown, model, prefixes, keys, sampling)
    beginnings = {
        (index, *continuation.tokens[:end].tolist())
        for index, own in enumerate(grown)
        for continuation in own
        for end in range(1, len(continuation.tokens))
    }
    tokens = sum(len(continuation.tokens) for own in grown for continuation in own)
    assert sum(rows_of_steps) == len(beginnings) < 0.8 * tokens


def test_a_group_larger_than_the_slots(build, model):
    prefixes, keys, sampling = random_prefixes(5), keys_for(11), SamplingSettings(8, temperature=0.3)
    grown = build(slots=3).grow(prefixes, keys, sampling)
    assert_is_the_plain_loop(grown, model, prefixes, keys, sampling)


class FailingDecoder:
    """Raises in the middle of a round."""

    name = "failing"
    width_invariant = True

    def __init__(self) -> None:
        self.ended = 0

    def load_weights(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def drop_weights(self) -> None: ...

    def begin(self, prefixes: Sequence[np.ndarray], slots: int, max_new_tokens: int) -> torch.Tensor:
        return torch.zeros(len(prefixes), 4)

    def step(
        self, slots: np.ndarray, prefixes: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> torch.Tensor:
        raise RuntimeError("no memory")

    def release(self, slot: int) -> None: ...

    def copy_slots(self, sources: np.ndarray, targets: np.ndarray) -> None: ...

    def draw(self, logits: torch.Tensor, uniform: np.ndarray, sampling: SamplingSettings) -> Drawn:
        return draw_rows(logits, uniform, sampling)

    def end(self) -> None:
        self.ended += 1


def test_the_caches_are_dropped_when_a_round_fails():
    decoder = FailingDecoder()
    with pytest.raises(RuntimeError, match="no memory"):
        TorchEngine(decoder, slots=2, eos_ids=()).grow(random_prefixes(3), keys_for(2), SamplingSettings(4))
    assert decoder.ended == 1


@pytest.mark.parametrize("slots", [2, 5])
def test_a_sample_is_handed_over_when_it_ends_and_others_still_grow(build, slots):
    prefixes, keys, sampling = random_prefixes(3, 6), keys_for(3, 2), SamplingSettings(20)
    handed: list[tuple[int, int, Continuation]] = []
    drawn: list[int] = []
    engine = build(slots=slots, eos_ids=range(0, 320, 4))
    grown = engine.grow(
        prefixes,
        keys,
        sampling,
        progress=drawn.append,
        finished=lambda *ended: handed.append((*ended,)) or drawn.append(-1),
    )
    assert sorted(ended[:2] for ended in handed) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(grown[i][j] is continuation for i, j, continuation in handed)
    assert drawn.index(-1) < len(drawn) - drawn[::-1].index(max(drawn)) - 1  # the first before the last token
