"""Monte Carlo with an engine that continues as the test says, and with a real one on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from graft.critics.monte_carlo import MonteCarloCritic
from graft.rollout.engine import Continuation
from graft.rollout.hf_decoder import HuggingFaceDecoder
from graft.rollout.sampling import SamplingSettings
from graft.rollout.torch_engine import TorchEngine
from graft.types import Chain, Grade, Outcome, Sample, StopReason, Tokens
from tests.conftest import build_tiny_config
from tests.critics.chains import make_chain
from tests.engines import PlannedEngine


def decode(tokens: Tokens) -> str:
    return "".join(chr(int(token)) for token in tokens)


class TextEngine(PlannedEngine):
    """Continues each prefix with the texts planned for it, over and over."""

    def __init__(self, plans: dict[str, list[str]]) -> None:
        def planned(index: int, place: int, prefix: Tokens, limit: int) -> Continuation:
            plan = plans[text_of(prefix)]
            text = plan[place % len(plan)]
            ids = np.array([ord(letter) for letter in text[:limit]], np.int32)
            stop = StopReason.EOS if len(text) <= limit else StopReason.LENGTH
            return Continuation(ids, np.zeros(len(ids), np.float32), stop)

        super().__init__(planned)
        self.asked: list[str] = []
        """Texts behind the prompt, of all calls."""

        self.streams: dict[str, list[int]] = {}

    def grow(
        self, prefixes: Sequence[Tokens], keys: Sequence[Sequence[int]], *rest: Any, **named: Any
    ) -> Any:
        self.asked += map(text_of, prefixes)
        self.streams |= {text_of(prefix): list(own) for prefix, own in zip(prefixes, keys, strict=True)}
        return super().grow(prefixes, keys, *rest, **named)


def text_of(prefix: Tokens) -> str:
    assert prefix[:2].tolist() == [1, 2]  # the prompt
    return decode(prefix[2:])


class EndsWithBang:
    """1 if the text ends with `!`; no score for texts that end with `?`."""

    def __init__(self) -> None:
        self.seen: list[Sample] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        self.seen += samples
        return [
            Grade(None, Outcome.CRASHED, reason="no idea")
            if sample.text.endswith("?")
            else Grade(float(sample.text.endswith("!")))
            for sample in samples
        ]


def critic(
    engine: TextEngine | TorchEngine, grader: EndsWithBang | None = None, *, limit: int = 20, n: int = 4
) -> MonteCarloCritic:
    return MonteCarloCritic(
        engine,
        grader or EndsWithBang(),
        decode,
        sampling=SamplingSettings(limit),
        scale=10,
        continuations=n,
        threshold=1.0,
        seed=7,
    )


PLANS = {"": ["!", ".", ".", "."], "ab": ["!", "."], "abcd": ["x!"]}
CHAIN = make_chain("ab", "cd", answer="!", score=1.0)


def test_rates_become_scores():
    engine, grader = TextEngine(PLANS), EndsWithBang()
    [critique] = critic(engine, grader)([CHAIN])
    # p_0 = 1/4, p_1 = 1/2, p_2 = 1
    assert critique.thoughts == (6.25, 7.5)
    assert critique.progress == (5, 10)
    assert critique.overall == 10
    assert critique.reasons == ("solved 0.25 -> 0.5", "solved 0.5 -> 1")
    assert critique.sampled_tokens == 4 + 4 + 8
    assert critique.calls == 12
    assert engine.asked == ["", "ab", "abcd"]
    assert {sample.text for sample in grader.seen} == {"!", ".", "ab!", "ab.", "abcdx!"}
    assert {sample.tokens for sample in grader.seen if sample.text == "abcdx!"} == {6}
    assert {sample.stop for sample in grader.seen} == {StopReason.EOS}


def test_a_thought_that_hurts_has_less_than_half():
    [critique] = critic(TextEngine({"": ["!"], "ab": ["."]}))([make_chain("ab")])
    assert (critique.thoughts, critique.progress) == ((0,), (0,))
    [idle] = critic(TextEngine({"": ["."], "ab": ["."]}))([make_chain("ab")])
    assert (idle.thoughts, idle.progress) == ((5,), (0,))


def test_states_are_shared_and_paid_once():
    engine = TextEngine({**PLANS, "abef": ["."]})
    first, second = critic(engine)([CHAIN, make_chain("ab", "ef")])
    assert sorted(engine.asked) == ["", "ab", "abcd", "abef"]
    assert first.sampled_tokens + second.sampled_tokens == 4 + 4 + 8 + 4
    assert second.sampled_tokens == 4
    assert second.thoughts == (6.25, 2.5)


def test_rows_do_not_share_states():
    engine = TextEngine(PLANS)
    critic(engine)([make_chain("ab", row=1), make_chain("ab", row=2)])
    assert sorted(engine.asked) == ["", "", "ab", "ab"]


def test_streams_depend_on_the_state_alone():
    alone, together = TextEngine(PLANS), TextEngine({**PLANS, "zz": ["."]})
    critic(alone)([CHAIN])
    critic(together)([make_chain("zz"), CHAIN])
    assert {text: alone.streams[text] for text in ("", "ab", "abcd")} == {
        text: together.streams[text] for text in ("", "ab", "abcd")
    }
    everything = [key for keys in together.streams.values() for key in keys]
    assert len(set(everything)) == len(everything)


def test_the_limit_holds_for_the_whole_completion():
    grader = EndsWithBang()
    engine = TextEngine({"": ["12345!"], "ab": ["345678!"], "abcdef": [""]})
    chain = make_chain("ab", "cdef", answer=None, score=0.0)
    [critique] = critic(engine, grader, limit=6, n=1)([chain])
    assert engine.asked == ["", "ab"]  # "abcdef" is at the limit: it is its own only sample
    assert [(sample.text, sample.stop) for sample in grader.seen] == [
        ("12345!", StopReason.EOS),
        ("ab3456", StopReason.LENGTH),
        ("abcdef", StopReason.LENGTH),
    ]
    assert critique.thoughts == (0, 5)
    assert critique.sampled_tokens == 6 + 4  # nothing is drawn behind the limit


def test_grades_that_failed_leave_the_rate():
    [critique] = critic(TextEngine({"": ["!", "?"], "ab": ["?", "?", "!", "."]}))([make_chain("ab")])
    assert critique.progress == (5,)
    assert critique.thoughts == (2.5,)


def test_nothing_that_can_be_graded_is_an_outcome():
    engine = TextEngine({"": ["!"], "ab": ["?"], "cd": ["!"]})
    first, second = critic(engine)([make_chain("ab"), make_chain("cd")])
    assert (first.outcome, first.problem, first.thoughts) == (Outcome.CRASHED, "no idea", ())
    assert first.sampled_tokens == 8
    assert second.thoughts == (5,)


def test_chains_without_thoughts_draw_nothing():
    engine = TextEngine({})
    [critique] = critic(engine)([make_chain(score=0.5)])
    assert (critique.overall, critique.thoughts, critique.sampled_tokens) == (5, (), 0)
    assert engine.asked == []


@pytest.mark.parametrize("together", [False, True])
def test_with_a_real_engine(together):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(build_tiny_config())
    engine = TorchEngine(
        HuggingFaceDecoder(model.config, dtype=torch.float32, device=torch.device("cpu")),
        slots=8,
        eos_ids=[2],
    )
    engine.load_weights(model.state_dict(), 0)

    class EvenGrader:
        def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
            return [Grade(float(ord(sample.text[-1]) % 2)) for sample in samples]

    made = MonteCarloCritic(
        engine,
        EvenGrader(),
        decode,
        sampling=SamplingSettings(8),
        scale=10,
        continuations=6,
        threshold=1,
        seed=3,
    )
    chains: list[Chain] = [make_chain("ab", "c"), make_chain("ab", "d")]
    critiques = made(chains) if together else [critique for chain in chains for critique in made([chain])]
    for critique in critiques:
        rates = [p / 10 for p in critique.progress]
        assert all((6 * rate) == pytest.approx(round(6 * rate)) for rate in rates)
        assert critique.thoughts[1] == pytest.approx(10 * (1 + rates[1] - rates[0]) / 2)
    assert critiques[0].progress[0] == critiques[1].progress[0]  # the same state
    assert critiques[0].sampled_tokens > critiques[1].sampled_tokens * together
