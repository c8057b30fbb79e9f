"""`graft model chat NAME-or-RUN`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.common import say
from graft.report.text import visible

if TYPE_CHECKING:
    from graft.types import Message

Answer = Callable[[Sequence["Message"], int], str]
"""Conversation and number of the turn -> the model's words."""


def chat(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|RUN", help="A model as in model.name, or a run: its newest checkpoint."),
    ],
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message at the beginning of the conversation.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling distribution.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Another seed, other answers.")] = 0,
) -> None:
    """Talk to a model, a line at a time; Ctrl-D ends it. Only its answers go to stdout."""
    answer = _open_model(name, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    conversation, turn = list(opening), 0
    say("Ctrl-D ends the conversation, an empty line begins a new one.")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            say("")
            return
        if not line.strip():
            conversation = list(opening)
            continue
        conversation.append({"role": "user", "content": line.strip()})
        text = answer(conversation, turn)
        turn += 1
        print(visible(text), flush=True)
        if text.strip():
            conversation.append({"role": "assistant", "content": text})
        else:  # an empty answer cannot stand in a conversation
            conversation.pop()


def _open_model(name: str, *, temperature: float, max_new_tokens: int, seed: int) -> Answer:
    from graft.config import Model, Rollout
    from graft.saved_runs import holds_run, load_run_weights, read_run_config

    trained = holds_run(name)
    config = read_run_config(name) if trained else None
    model = config.model if config else Model(name=name)
    from graft.assemble import build_engine, choose_device, choose_precision, load_policy
    from graft.data.chat import ChatEncoder
    from graft.errors import DataError
    from graft.model import plain_state
    from graft.rollout.sampling import SamplingSettings, stream_key
    from graft.types import Purpose

    device = choose_device(model.device)
    policy = load_policy(model, device, seed=config.seed if config else 0, progress=say)
    if trained:
        say(f"{name}: checkpoint of step {load_run_weights(policy, name)}")
    rollout = config.rollout if config else Rollout()
    engine, note = build_engine(rollout, policy, choose_precision(model.precision, device))
    if note:
        say(note)
    engine.load_weights(plain_state(policy), 0)
    encoder = ChatEncoder(policy.tokenizer, model.chat_template_kwargs)
    positions = getattr(policy.plain.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def answer(conversation: Sequence[Message], turn: int) -> str:
        tokens = encoder.encode(conversation)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(tokens))
        if room < 1:
            raise DataError(
                f"the conversation has {len(tokens)} tokens, as many as the model has positions. Start a new one."
            )
        sampling = SamplingSettings(max_new_tokens=room, temperature=temperature)
        key = stream_key(seed, Purpose.EVALUATION, turn, 0, 0)
        [[continuation]] = engine.grow([tokens], [[key]], sampling)
        return encoder.decode(continuation.tokens)

    return answer
