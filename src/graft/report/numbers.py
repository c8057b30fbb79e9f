"""Numbers on the way from a critic's scores to an advantage, declared once: what the `numbers` of `trees.jsonl` mean.

The formulas are in `credit/rewards.py` and `credit/gae.py`. A number that a span does not have is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NUMBERS: Mapping[str, str] = {
    "S": "critic's score of the thought by itself, 0 to `critic.scale`",
    "P": "critic's progress score: how far the chain has come by the end of the thought, 0 to `critic.scale`",
    "Ŝ": "S against the mean and standard deviation of the thoughts it is compared with, boosted or dampened",
    "E": "progress factor: above 0 where P rose above the mean of the scores before it, below 0 where it fell",
    "Q": "progress effect: E times S / `rewards.thought_divisor`",
    "C": "combined score: overall score + Ŝ + Q",
    "R": "reward: C, or of the answer the overall score times `rewards.answer_scale`; whitened with those of its step",
    "V": "value model's estimate of the state before the segment",
    "Y": "target of the value: R and what the value model expects afterwards",
    "value": "value of the state behind the span: backed up from the leaves below it, or a critic's score",
    "A": "advantage: above 0 the span was made more likely, below 0 less likely",
}
"""Name to meaning (Markdown), in the order of the columns."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names without repetition: the declared ones in their order, then others; the advantage comes last."""
    found = dict.fromkeys(names)
    declared = [name for name in NUMBERS if name in found and name != "A"]
    others = [name for name in found if name not in NUMBERS]
    return [*declared, *others, *(["A"] if "A" in found else [])]
