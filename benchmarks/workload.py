"""The work that all sides are given. Standard library only: a peer's environment imports it too."""

from __future__ import annotations

import random

GROUPS_WITHOUT_SIGNAL = 3
"""Groups whose samples all get the same reward in the sparse case."""


def questions(count: int, *, seed: int = 0) -> list[str]:
    """Arithmetic questions, about 50 tokens each once SmolLM2's chat template stands around them."""
    rng = random.Random(seed)
    return [
        f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)} - {rng.randint(10, 99)}? "
        "Answer with the number alone."
        for _ in range(count)
    ]


def rewards(prompts: int, samples: int, *, sparse: bool, seed: int = 0) -> list[float]:
    """One reward for each sample, group after group: random, but the same for every side and step."""
    rng = random.Random(seed)
    drawn = [rng.random() for _ in range(prompts * samples)]
    idle = GROUPS_WITHOUT_SIGNAL * samples if sparse else 0
    return [1.0] * min(idle, len(drawn)) + drawn[idle:]
