"""Settings of critics, and what is built of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from graft.critics.build import CriticServices, models_of, open_critic
from graft.critics.settings import CriticSettings
from graft.errors import ConfigError
from graft.grading.build import Services, build_grader
from graft.grading.judge_client import JudgeClient, JudgeServer
from graft.grading.observe import Observer
from graft.rollout.sampling import SamplingSettings
from graft.types import Grade, Sample
from tests.critics.chains import make_chain
from tests.critics.test_monte_carlo import EndsWithBang, TextEngine, decode
from tests.grading.samples import judged, scripted_server

ADAPTER: TypeAdapter[Any] = TypeAdapter(CriticSettings)


def settings(**section: Any) -> Any:
    return ADAPTER.validate_python(section)


def test_equations():
    assert settings(type="equations").scale == 10
    critic = open_critic(settings(type="equations", scale=4, unknown_operand_factor=0), CriticServices())
    [critique] = critic([make_chain("50 - 15 = 35", "35 - 17 = 18", score=0.5)])
    assert (critique.thoughts, critique.overall) == ((4, 0), 2)


def test_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def critic(chain):\n    n = len(chain.thoughts)\n    return {'thoughts': [3] * n, 'progress': [1] * n}\n"
    )
    critic = open_critic(settings(type="function", function="mine.py:critic"), CriticServices(base=tmp_path))
    assert critic([make_chain("a", "b")])[0].thoughts == (3, 3)
    with pytest.raises(ConfigError, match="has no function 'critics'"):
        open_critic(settings(type="function", function="mine.py:critics"), CriticServices(base=tmp_path))


def test_grader():
    section = settings(type="grader", grader={"type": "regex", "pattern": r"\d"})
    critic = open_critic(
        section, CriticServices(open_grader=lambda spec: build_grader(spec, Services(), Observer()))
    )
    [critique] = critic([make_chain("no digit", "a 4")])
    assert (critique.thoughts, critique.progress) == ((0, 10), (0, 10))


def test_judge():
    section = settings(
        type="judge", model="big", form="earliest_error", overall="judge", sampling={"seed": 3}
    )
    assert models_of(section) == ["big"]
    with scripted_server() as server:
        server.replies = [judged({"reason": "", "earliest_error": 0, "overall": 6})]
        client = JudgeClient(JudgeServer(f"{server.url}/v1", "", ""), {})
        critic = open_critic(section, CriticServices(judges=client))
        [critique] = critic([make_chain("a")])
        client.close()
    assert (critique.overall, critique.thoughts) == (6, (10,))
    assert server.requests[0].body["model"] == "big"
    assert server.requests[0].body["seed"] == 3


def test_monte_carlo():
    services = CriticServices(
        engine=TextEngine({"": ["!"], "a": ["!", "."]}),
        grader=EndsWithBang(),
        decode=decode,
        sampling=SamplingSettings(9),
        seed=1,
    )
    section = settings(type="monte_carlo", continuations=2)
    assert open_critic(section, services)([make_chain("a")])[0].progress == (5,)
    low = settings(type="monte_carlo", continuations=2, threshold=0)
    assert open_critic(low, services)([make_chain("a")])[0].progress == (10,)


def test_prm(tmp_path):
    from transformers import LlamaForTokenClassification

    from tests.conftest import build_tiny_config, build_tiny_tokenizer

    LlamaForTokenClassification(build_tiny_config(num_labels=3)).save_pretrained(tmp_path / "prm")
    build_tiny_tokenizer().save_pretrained(tmp_path / "prm")
    section = settings(type="prm", model="prm", label=2, separator="\n\n", batch_size=1)
    [critique] = open_critic(section, CriticServices(base=tmp_path))([make_chain("a", "b")])
    assert len(critique.thoughts) == 2


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ({"type": "judge", "model": "m"}, "judges"),
        ({"type": "grader", "grader": {"type": "number"}}, "open_grader"),
        ({"type": "monte_carlo"}, "engine"),
    ],
)
def test_services_that_are_missing_are_named(section, missing):
    with pytest.raises(ConfigError, match=f"critic.type = '{section['type']}' needs .*{missing}"):
        open_critic(settings(**section), CriticServices())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"type": "equation"}, "equations"),
        ({"type": "equations", "scale": 0}, "greater than 0"),
        ({"type": "equations", "continuations": 3}, "Extra inputs"),
        ({"type": "monte_carlo", "continuations": 0}, "greater than or equal to 1"),
        ({"type": "judge"}, "model"),
        ({"type": "grader", "grader": {"type": "nmber"}}, "critic.grader.type"),
    ],
)
def test_settings_that_are_refused(section, words):
    with pytest.raises(ValidationError, match=words):
        settings(**section)


def test_the_protocols_are_what_is_built():
    """A plain function is a grader: nothing to inherit."""

    def half(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(0.5) for _ in samples]

    critic = open_critic(
        settings(type="grader", grader={"type": "number"}), CriticServices(open_grader=lambda spec: half)
    )
    assert critic([make_chain("a")])[0].thoughts == (5,)
