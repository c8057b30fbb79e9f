"""Text for people: what a model or a data set wrote, made safe to look at, values and durations."""

from __future__ import annotations

import math
import re

from graft.report.metrics import Metric

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with its control characters shown instead of obeyed; line breaks and tabs stay.

    Escape sequences could drive a terminal, and direction marks show a text in another order than it has.
    `\\x1b` becomes `␛`; a right-to-left override becomes `⟨U+202E⟩`. `\\r\\n` counts as a line break.
    """
    return _CONTROL.sub(_picture, text.replace("\r\n", "\n"))


def format_value(metric: Metric, value: float) -> str:
    """A value for people, without its unit: shares in percent, counts with separators, else 4 digits; no -0."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if metric.unit == "share":
        return f"{100 * value:z.1f} %"
    value = without_noise(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def without_noise(value: float) -> float:
    """0 for what rounding leaves of a 0, such as a correlation of 7e-18; nothing recorded is measured so finely."""
    return 0.0 if abs(value) < 1e-12 else value


def format_duration(seconds: float) -> str:
    """`45 s`, `3:20` (minutes) or `2:03:20` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def duration_in_words(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 3 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
