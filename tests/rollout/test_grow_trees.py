"""Trees with groups at every prefix: nothing is drawn differently for being shared, cut or waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from graft.errors import ConfigError
from graft.kernels import load_kernels
from graft.rollout.grow import grow_groups
from graft.rollout.grow_trees import Shape, draw_softmax, grow_trees
from graft.rollout.hf_decoder import HuggingFaceDecoder
from graft.rollout.llama_decoder import LlamaDecoder
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.rollout.torch_engine import TorchEngine
from graft.tree import ROOT, Grown, Tree
from graft.types import Prompt, Purpose, StopReason
from tests.conftest import build_tiny_config

SAMPLING = SamplingSettings(max_new_tokens=14, temperature=1.0)


class EveryThird:
    """A boundary after every third token of a path; a token of number 9 makes the rest the answer."""

    def __init__(self, fed: tuple[int, ...] = ()) -> None:
        self.fed = list(fed)

    def feed(self, token: int, logprob: float | None) -> bool:
        assert logprob is not None
        assert logprob <= 0
        self.fed.append(token)
        return len(self.fed) % 3 == 0

    def fork(self) -> EveryThird:
        return EveryThird(tuple(self.fed))


class AfterFourths:
    """A boundary after every token whose number is divided by 4: siblings end at different times."""

    def feed(self, token: int, logprob: float | None) -> bool:
        return token % 4 == 0

    def fork(self) -> AfterFourths:
        return AfterFourths()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(build_tiny_config(vocab_size=48)).eval()


def engine_of(model: LlamaForCausalLM, slots: int, *, fast: bool = False) -> TorchEngine:
    if fast:
        kernels = load_kernels()
        if isinstance(kernels, str):
            pytest.skip(kernels)
        decoder = LlamaDecoder(model.config, kernels, torch.float32)
    else:
        decoder = HuggingFaceDecoder(model.config, dtype=torch.float32, device=torch.device("cpu"))
    engine = TorchEngine(decoder, slots=slots, eos_ids=[2, 7])
    engine.load_weights(model.state_dict(), 0)
    return engine


def prompts(count: int = 3) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            row=i,
            messages=(),
            item={},
            tokens=rng.integers(3, 48, 3 + i).astype(np.int32),
            question=str(i),
        )
        for i in range(count)
    ]


def grow(engine: TorchEngine, shape: Shape, rows: Sequence[Prompt], **changes) -> list[Tree]:
    return [grown.tree for grown in grow_all(engine, shape, rows, **changes)]


def grow_all(engine: TorchEngine, shape: Shape, rows: Sequence[Prompt], **changes) -> list[Grown]:
    asked = {
        "shape": shape,
        "begin": lambda _: EveryThird(),
        "score": lambda groups: [[0.0] * len(nodes) for _, nodes in groups],
        "sampling": SAMPLING,
        "seed": 5,
        "step": 3,
        **changes,
    }
    return grow_trees(engine, rows, **asked)


def texts(trees: Sequence[Tree]) -> list[list[tuple]]:
    return [
        [(node.parent, node.group, node.kind, node.stop, node.tokens.tolist()) for node in tree.nodes]
        for tree in trees
    ]


@pytest.fixture(scope="module")
def sharp_model() -> LlamaForCausalLM:
    """Weights so large that a wrong key or value anywhere shows."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(build_tiny_config(vocab_size=48)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                weight *= 8
    return made


def logprobs_alone(model: LlamaForCausalLM, tree: Tree, node: int) -> np.ndarray:
    """Of a segment's tokens, by one forward pass over its whole path."""
    path = [t for i in tree.path(node) for t in tree.nodes[i].tokens.tolist()]
    with torch.no_grad():
        scores = model(torch.tensor([path])).logits[0].log_softmax(-1)
    places = range(len(path) - len(tree.nodes[node]), len(path))
    return np.array([float(scores[at - 1, path[at]]) for at in places])


def draw_alone(model: LlamaForCausalLM, tree: Tree, node: int, place_path: tuple[int, ...]) -> list[int]:
    """A segment drawn token by token with a full forward pass each, from the prompt and path before it."""
    before = [t for i in tree.path(tree.nodes[node].parent) for t in tree.nodes[i].tokens.tolist()]
    done = len(before) - len(tree.nodes[ROOT])
    key = stream_key(5, Purpose.TRAIN, 3, tree.prompt.row, 0, *place_path)
    from graft.rollout.sampling import uniforms

    drawn: list[int] = []
    for offset in range(len(tree.nodes[node])):
        logits = model(torch.tensor([[*before, *drawn]])).logits[0, -1].double()
        cumulative = logits.softmax(-1).cumsum(-1)
        uniform = uniforms(np.array([key], dtype=np.uint64), np.array([done + offset]))[0]
        drawn.append(int((cumulative < uniform).sum()))
    return drawn


def places(tree: Tree, node: int) -> tuple[int, ...]:
    """Place in each group from the prompt on."""
    return tuple(list(tree.children(tree.nodes[n].parent)).index(n) for n in tree.path(node)[1:])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "shape", [Shape((3, 2, 2), "all"), Shape((4,) * 6, "sample"), Shape((2, 3), "all")], ids=str
)
def test_every_segment_is_what_its_path_gives(model, shape, fast):
    trees = grow(engine_of(model, 24, fast=fast), shape, prompts())
    for tree in trees:
        for node in range(1, len(tree)):
            assert tree.nodes[node].tokens.tolist() == draw_alone(model, tree, node, places(tree, node))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("shape", "slots"),
    [(Shape((3, 2, 2), "all"), 24), (Shape((4,) * 6, "sample"), 24), (Shape((12, 2), "all"), 24)],
    ids=str,
)
def test_paths_that_wait_keep_their_keys_and_values(sharp_model, shape, slots, fast):
    """Few rows grow while many wait for their siblings."""
    trees = grow(engine_of(sharp_model, slots, fast=fast), shape, prompts(5), begin=lambda _: AfterFourths())
    assert sum(len(tree.path(leaf)) > 2 for tree in trees for leaf in tree.leaves()) > 10
    for tree in trees:
        for node in range(1, len(tree)):
            found = tree.nodes[node].engine_logprobs
            np.testing.assert_allclose(found, logprobs_alone(sharp_model, tree, node), atol=2e-3)


@pytest.mark.parametrize("shape", [Shape((3, 2, 2), "all"), Shape((4,) * 6, "sample")], ids=str)
def test_the_number_of_slots_changes_nothing(model, shape):
    wide = texts(grow(engine_of(model, 60), shape, prompts(5)))
    assert texts(grow(engine_of(model, shape.widest), shape, prompts(5))) == wide


class Watched(HuggingFaceDecoder):
    """Remembers the slots that it was to make room for, and all that it was given a token for."""

    def begin(self, prefixes: Any, slots: int, max_new_tokens: int) -> torch.Tensor:
        self.room, self.used = slots, set[int]()
        return super().begin(prefixes, slots, max_new_tokens)

    def step(
        self, slots: np.ndarray, prefixes: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> torch.Tensor:
        self.used |= set(slots.tolist())
        return super().step(slots, prefixes, tokens, lengths)


@pytest.mark.parametrize("slots", [12, 30, 90])
@pytest.mark.parametrize(
    ("shape", "nodes", "tokens"),
    [
        (Shape((3, 2, 2), "all"), 3 + 6 + 12, 12 * 14),
        (Shape((4,) * 6, "sample"), 4 * 6, 14 + 3 * 6 * 14),
    ],
    ids=str,
)
def test_limits_while_trees_grow(sharp_model, shape, nodes, tokens, slots):
    """The formulas of docs/methods/grft.md with completions of 14 tokens, 12 and 4 open paths, five prompts."""
    decoder = Watched(sharp_model.config, dtype=torch.float32, device=torch.device("cpu"))
    engine = TorchEngine(decoder, slots=slots, eos_ids=[2, 7])
    engine.load_weights(sharp_model.state_dict(), 0)
    trees = grow(engine, shape, prompts(5), begin=lambda _: AfterFourths())
    assert decoder.room == min(slots, 5 * shape.widest)
    assert decoder.used <= set(range(decoder.room))
    assert nodes / 3 < max(map(len, trees)) - 1 <= nodes
    for tree in trees:
        assert tree.sampled_tokens <= tokens
        assert max(map(tree.completion_length, tree.leaves())) <= 14


def test_depth_one_is_a_group_of_whole_completions(model):
    engine = engine_of(model, 8)
    [tree] = grow(engine, Shape((6,), "all"), prompts(1))
    [group] = grow_groups(
        engine,
        prompts(1),
        group_size=6,
        sampling=SAMPLING,
        seed=5,
        purpose=Purpose.TRAIN,
        step=3,
    )
    assert [n.tokens.tolist() for n in tree.nodes] == [n.tokens.tolist() for n in group.nodes]
    assert [n.engine_logprobs.tolist() for n in tree.nodes] == [
        n.engine_logprobs.tolist() for n in group.nodes
    ]


def test_the_shape_of_a_chain(model):
    for tree in grow(engine_of(model, 16), Shape((4,) * 9, "sample"), prompts(4)):
        parents = {node.parent for node in tree.nodes[1:]}
        for parent in parents:
            assert len(tree.children(parent)) == 4
            if parent != ROOT:
                assert tree.nodes[parent].stop is StopReason.CUT
        assert sum(bool(tree.children(node)) for node in tree.children(ROOT)) <= 1
        for leaf in tree.leaves():
            assert tree.completion_length(leaf) <= 14
        groups = {tree.nodes[node].group for node in range(1, len(tree))}
        assert len(groups) == len(parents)


def test_the_last_depth_is_drawn_to_the_end(model):
    for tree in grow(engine_of(model, 16), Shape((2, 2), "all"), prompts(4)):
        assert all(tree.nodes[leaf].stop is not StopReason.CUT for leaf in tree.leaves())
        assert tree.endings() == tree.leaves()


def test_the_survivor_is_the_one_with_the_best_score(model):
    def score(groups):
        return [[float(place == 2) for place in range(len(nodes))] for _, nodes in groups]

    for tree in grow(engine_of(model, 16), Shape((4,) * 5, "best"), prompts(4), score=score):
        for parent in {node.parent for node in tree.nodes[1:]}:
            going = [place for place, child in enumerate(tree.children(parent)) if tree.children(child)]
            assert going in ([], [2])


def test_any_survivor_is_as_likely(model):
    rows = [
        Prompt(row=i, messages=(), item={}, tokens=np.array([5], np.int32), question="") for i in range(300)
    ]
    counts = np.zeros(3)
    for tree in grow(engine_of(model, 60), Shape((3, 1), "sample"), rows):
        if all(tree.nodes[n].stop is StopReason.CUT for n in tree.children(ROOT)):
            counts[[bool(tree.children(n)) for n in tree.children(ROOT)].index(True)] += 1
    assert counts.sum() > 150
    assert (np.abs(counts / counts.sum() - 1 / 3) < 0.09).all()


def test_a_softmax_by_hand():
    # weights 1, e, 1 at temperature 1
    edges = np.cumsum([1, np.e, 1]) / (2 + np.e)
    assert [
        draw_softmax([0.0, 1.0, 0.0], 1.0, u) for u in (0.0, edges[0] - 1e-6, edges[0] + 1e-6, 0.999)
    ] == [0, 0, 1, 2]
    assert draw_softmax([0.0, 100.0], 0.1, 0.5) == 1
    assert draw_softmax([-1e9, -1e9], 1.0, 0.7) == 1


def test_a_tree_that_is_too_wide_is_refused(model):
    with pytest.raises(ConfigError, match=r"keeps 12 paths open, rollout\.slots is 11"):
        grow(engine_of(model, 11), Shape((3, 2, 2), "all"), prompts(1))


def test_no_prompts(model):
    assert grow(engine_of(model, 4), Shape((2,), "all"), []) == []


def by_tokens(groups: Sequence[tuple[Tree, Sequence[int]]]) -> list[list[float | None]]:
    """A score that a candidate's tokens decide, of few values; some cannot be judged."""
    found = []
    for tree, nodes in groups:
        sums = [int(tree.completion(node).sum()) for node in nodes]
        found.append([None if total % 7 == 0 else float(total % 2) for total in sums])
    return found


REDRAWN = [
    Shape((3, 2, 2), "all", draws=3),
    Shape((3,) * 6, "sample", draws=4),
    Shape((4,) * 6, "best", draws=2),
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", REDRAWN, ids=str)
def test_groups_without_signal_are_drawn_anew(sharp_model, shape, fast):
    """Every candidate is what its own stream gives after its path, in whichever draw; groups that are still without
    signal have used all their draws."""
    grown = grow_all(
        engine_of(sharp_model, 24, fast=fast),
        shape,
        prompts(5),
        begin=lambda _: AfterFourths(),
        score=by_tokens,
        sampling=SamplingSettings(max_new_tokens=14, temperature=3.0),
    )
    assert sum(own.groups_redrawn for own in grown) > 5
    for own in grown:
        tree = own.tree
        assert (own.tokens_redrawn > 0) == (own.groups_redrawn > 0)
        for parent in {node.parent for node in tree.nodes[1:]}:
            [scores] = by_tokens([(tree, tree.children(parent))])
            known = {score for score in scores if score is not None}
            assert len(known) > 1 or own.groups_redrawn >= shape.draws - 1
        for node in range(1, len(tree)):
            path = [t for i in tree.path(node) for t in tree.nodes[i].tokens.tolist()]
            with torch.no_grad():
                scores = (sharp_model(torch.tensor([path])).logits[0] / 3).log_softmax(-1)
            first = len(path) - len(tree.nodes[node])
            alone = [float(scores[at - 1, path[at]]) for at in range(first, len(path))]
            np.testing.assert_allclose(tree.nodes[node].engine_logprobs, alone, atol=2e-3)


def test_what_is_drawn_anew_does_not_depend_on_slots_or_other_prompts(sharp_model):
    for shape in REDRAWN:
        asked = {"begin": lambda _: AfterFourths(), "score": by_tokens}
        wide = grow_all(engine_of(sharp_model, 60), shape, prompts(5), **asked)
        narrow = grow_all(engine_of(sharp_model, shape.widest), shape, prompts(5), **asked)
        alone = [grow_all(engine_of(sharp_model, 60), shape, [own], **asked)[0] for own in prompts(5)]
        for others in (narrow, alone):
            assert texts([own.tree for own in others]) == texts([own.tree for own in wide])
            assert [(own.survivors, own.groups_redrawn, own.tokens_redrawn) for own in others] == [
                (own.survivors, own.groups_redrawn, own.tokens_redrawn) for own in wide
            ]


def test_a_draw_by_hand(model):
    """All candidates always score alike: the last of three draws stays. Candidates are numbered over the draws."""
    shape = Shape((3, 2), "all", draws=3)
    [own] = grow_all(engine_of(model, 6), shape, prompts(1))
    tree = own.tree
    groups = 1 + sum(bool(tree.children(node)) for node in tree.children(ROOT))
    assert own.groups_redrawn == 2 * groups
    assert own.survivors == []
    for place, node in enumerate(tree.children(ROOT)):
        assert tree.nodes[node].tokens.tolist() == draw_alone(model, tree, node, (6 + place,))
        for below, child in enumerate(tree.children(node)):
            assert tree.nodes[child].tokens.tolist() == draw_alone(model, tree, child, (6 + place, 4 + below))


def test_ends_that_differ_from_thoughts_alone_are_no_signal(sharp_model):
    """Every thought scores 0 and every end 1: signal where both are compared together."""

    def score(groups):
        return [
            [float(tree.nodes[node].stop is not StopReason.CUT) for node in nodes] for tree, nodes in groups
        ]

    asked: dict[str, Any] = {
        "begin": lambda _: AfterFourths(),
        "score": score,
        "sampling": SamplingSettings(max_new_tokens=14, temperature=3.0),
    }
    together, separately = (
        grow_all(
            engine_of(sharp_model, 24),
            Shape((3, 2, 2), "all", draws=3, separately=apart),
            prompts(5),
            **asked,
        )
        for apart in (False, True)
    )
    groups = sum(len({node.group for node in own.tree.nodes[1:]}) for own in separately)
    assert sum(own.groups_redrawn for own in separately) == 2 * groups
    assert sum(own.groups_redrawn for own in together) < 2 * groups


def test_groups_with_signal_and_groups_of_one_are_drawn_once(model):
    def score(groups):
        return [[float(place) for place in range(len(nodes))] for _, nodes in groups]

    for branching in ((3, 2), (3, 1)):
        once = grow_all(engine_of(model, 6), Shape(branching, "all"), prompts())
        again = grow_all(engine_of(model, 6), Shape(branching, "all", draws=5), prompts(), score=score)
        assert [own.groups_redrawn for own in again] == [0, 0, 0]
        assert texts([own.tree for own in again]) == texts([own.tree for own in once])


def test_the_survivors_are_told(sharp_model):
    """One of each group, also of the last; each was gone on from, but for the last."""
    for how in ("sample", "best", "softmax"):
        asked = {"begin": lambda _: AfterFourths(), "score": by_tokens}
        for own in grow_all(engine_of(sharp_model, 24), Shape((4,) * 5, how), prompts(5), **asked):
            tree = own.tree
            assert len(own.survivors) == len(tree.groups())
            assert tree.path(own.survivors[-1])[1:] == own.survivors
            assert [bool(tree.children(node)) for node in own.survivors] == [True] * (
                len(own.survivors) - 1
            ) + [False]
    [own] = grow_all(engine_of(sharp_model, 24), Shape((2, 2), "all"), prompts(1))
    assert own.survivors == []


def test_candidates_that_could_not_be_judged_come_last(model):
    def score(groups):
        return [[None if place != 2 else -5.0 for place in range(len(nodes))] for _, nodes in groups]

    for own in grow_all(engine_of(model, 16), Shape((4,) * 5, "best"), prompts(4), score=score):
        assert all(list(own.tree.children(own.tree.nodes[n].parent)).index(n) == 2 for n in own.survivors)
