"""What a dry run says: what was read, what the run would take, and what was assumed. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graft.report.text import duration_in_words


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the estimate."""

    name: str
    times: int
    seconds_each: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.times * self.seconds_each


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read, not estimated."""

    run: str
    rows_train: int
    rows_held_out: int
    prompt_tokens_mean: float
    prompt_tokens_longest: int
    model: str
    parameters: int
    parameters_trained: int
    device: str
    precision: str
    engine: str
    threads: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run would take."""

    facts: Facts
    items: Sequence[Item]
    seconds_without_signal: float
    """Of the whole run if no group had different scores, where only such groups train: a model that learns gets there
    slowly, and its steps get cheaper."""

    memory_bytes: float
    tokens_sampled_training: float
    tokens_sampled_measuring: float
    tokens_trained: float
    """Tokens through forward and backward, prompts included, once for each pass over a batch."""

    tokens_scored: float
    """Tokens through a forward pass alone: of the policy that sampled, and of the KL anchor."""

    steps: Mapping[str, int]
    """Phase -> optimiser steps."""

    assumptions: Sequence[str]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return math.fsum(item.seconds for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            **asdict(self.facts),
            "rows_shared": 0,
            "steps": dict(self.steps),
            "tokens_sampled_training": round(self.tokens_sampled_training),
            "tokens_sampled_measuring": round(self.tokens_sampled_measuring),
            "tokens_trained": round(self.tokens_trained),
            "tokens_scored": round(self.tokens_scored),
            "seconds": self.seconds,
            "seconds_without_signal": self.seconds_without_signal,
            "parts": [
                {
                    "name": item.name,
                    "times": item.times,
                    "seconds_each": item.seconds_each,
                    "seconds": item.seconds,
                }
                for item in self.items
            ],
            "peak_memory_gb": self.memory_bytes / 1e9,
            "assumptions": list(self.assumptions),
        }

    def to_text(self) -> str:
        """For people."""
        facts = self.facts
        trained = "all" if facts.parameters_trained == facts.parameters else f"{facts.parameters_trained:,}"
        steps = ", ".join(f"{name} {count:,}" for name, count in self.steps.items())
        held_out = "; they share no question" if facts.rows_held_out else ""
        lines = [
            f"rows      {facts.rows_train:,} to train on, {facts.rows_held_out:,} held out{held_out}",
            f"prompts   {facts.prompt_tokens_mean:.0f} tokens on average, {facts.prompt_tokens_longest:,} the longest",
            f"model     {facts.model}, {facts.parameters:,} weights, {trained} of them trained",
            f"machine   {facts.device}, {facts.precision}, {facts.engine} engine, {facts.threads} threads",
            f"steps     {steps}",
            f"tokens    {self.tokens_sampled_training:,.0f} to sample for training, "
            f"{self.tokens_sampled_measuring:,.0f} for measuring, {self.tokens_trained:,.0f} to train on "
            "(prompts included, several passes added up)"
            + (f", {self.tokens_scored:,.0f} to score without gradient" if self.tokens_scored else ""),
            "",
            f"{'':<32}{'times':>7}{'each':>12}{'in all':>16}",
        ]
        lines += [
            f"{item.name:<32}{item.times:>7,}{item.seconds_each:>10.2f} s{duration_in_words(item.seconds):>16}"
            for item in self.items
        ]
        lines += [
            "",
            f"time      about {duration_in_words(self.seconds)}" + self._without_signal(),
            f"memory    about {self.memory_bytes / 1e9:.1f} GB at most",
            f"run       {facts.run}",
            "",
            "Assumed:",
            *(f"- {assumption}" for assumption in self.assumptions),
        ]
        return "\n".join(lines)

    def _without_signal(self) -> str:
        if self.seconds_without_signal == self.seconds:
            return ""
        least = duration_in_words(self.seconds_without_signal)
        return f" with as many groups of different scores as now; {least} if there were none"
