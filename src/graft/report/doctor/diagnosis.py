"""All checks of `graft doctor`, in the order in which they are shown, and their page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.report.doctor.check import Check, Finding, Verdict, find
from graft.report.doctor.diversity import DIVERSITY_CHECKS
from graft.report.doctor.evidence import Evidence
from graft.report.doctor.generalisation import GENERALISATION_CHECKS
from graft.report.doctor.length_and_weight import LENGTH_AND_WEIGHT
from graft.report.doctor.segments import SEGMENTS
from graft.report.doctor.signal import SIGNAL

CHECKS: tuple[Check, ...] = (
    *GENERALISATION_CHECKS,
    *SIGNAL,
    *LENGTH_AND_WEIGHT,
    *DIVERSITY_CHECKS,
    *SEGMENTS,
)
"""In the order in which they are shown: whether the run learns at all comes first."""


def diagnose(evidence: Evidence) -> list[Finding]:
    """Every check on one run."""
    return [find(check, evidence) for check in CHECKS]


def as_record(finding: Finding) -> dict[str, Any]:
    """A finding for scripts."""
    check = finding.check
    return {
        "name": check.name,
        "title": check.title,
        "failure_point": check.failure_point,
        "verdict": str(finding.verdict),
        "value": finding.value,
        "unit": check.unit,
        "text": finding.text,
        "look": check.look,
        "bad": check.bad,
        "reason": check.reason,
        "change": finding.change,
        "details": dict(finding.details),
    }


def count_verdicts(findings: Sequence[Finding]) -> dict[Verdict, int]:
    """How often each verdict was given."""
    return {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}


def render_markdown() -> str:
    """The page `docs/doctor.md`."""
    lines = [
        "# `graft doctor RUN`: what is wrong with a run",
        "",
        "This page is generated from `src/graft/report/doctor/` by `python -m graft.cli.docs`.",
        "",
        "Reads the run folder alone, running or finished, and says of each line below what it measured: `ok`,",
        "`look` (may be what the task is like), `bad` (it spoils samples or the measurement) or `not measured`, with",
        "the reason. What the folder cannot tell is never `ok`. *Late* steps are the last fifth of the training steps.",
        "Samples are completions: candidates that a tree cut and did not go on with are none.",
        "The exit code is 0 whatever the verdicts; with `--strict` a `bad` one makes it 9. `--json` prints everything,",
        "topics and causes included.",
        "",
        "```",
        "graft doctor runs/first",
        "graft doctor runs/first --topic metadata.difficulty --strict",
        "graft eval runs/first --set data.held_out=0 --set data.held_out_source=other.jsonl --json > other.json",
        "graft doctor runs/first --out-of-distribution other.json",
        "```",
        "",
        '*In italics*: the row of the slide "Failure Points of GRPO" that a check measures. Of runs with a critic the',
        "checks read `critiques` of a line of `trees.jsonl`: leaf id to `overall`, `thoughts` and `outcome`.",
    ]
    for check in CHECKS:
        lines += [
            "",
            f"## {check.title} (`{check.name}`)",
            *([f"*{check.failure_point}.*"] if check.failure_point else []),
            check.measures,
            "",
            f"- **Threshold**: {check.thresholds}. {check.reason}",
            f"- **What to change**: {check.change}",
        ]
    return "\n".join(lines) + "\n"
