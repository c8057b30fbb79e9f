"""The generated parts of `docs/methods/*.md`: settings and metrics of each algorithm, between marks in pages by hand.

<!-- settings -->
...
<!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from graft.algorithm_settings import ALGORITHM_NAMES
from graft.cli.readings import metrics_of, reading_of
from graft.cli.settings import read_algorithm, table_of
from graft.report.metrics import METRICS, Stage

_BLOCK = re.compile(r"(?<=^<!-- )(settings|metrics) -->\n.*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def render_blocks(method: str) -> Mapping[str, str]:
    """Name of a mark -> what stands between it and the end mark."""
    return {"settings": _settings(method), "metrics": _metrics(method)}


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """The page with what stands behind each mark replaced; everything else stays.

    Raises:
        ValueError: a block has no place in the page, or two.
    """
    found = _BLOCK.findall(page)
    if sorted(found) != sorted(blocks):
        raise ValueError(
            f"a page needs the marks {sorted(blocks)}, each once with an end mark; found {found}"
        )
    return _BLOCK.sub(lambda match: f"{match[1]} -->\n{blocks[match[1]]}", page)


def filled_pages(folder: Path) -> Iterator[tuple[Path, str]]:
    """Page of each algorithm that has one in `folder`, and its text with the blocks as they are now."""
    for method in ALGORITHM_NAMES:
        path = folder / f"{method}.md"
        if path.is_file():
            yield path, fill(path.read_text(encoding="utf-8"), render_blocks(method))


def _settings(method: str) -> str:
    """One table, and one more for each kind of a part that has several."""
    sections = read_algorithm(method)
    named = [section for section in sections if section.title != f"[{section.path}]"]
    kinds = [section for section in named if section.path != "algorithm"]
    plain = [entry for section in sections if section not in kinds for entry in section.settings]
    lines = table_of(plain)
    for section in kinds:
        lines += ["", f"`{section.title}`: {section.help}", "", *table_of(section.settings)]
    return "\n".join(lines) + "\n"


def _metrics(method: str) -> str:
    """A table of those that say something here, then the names of the others."""
    lines = ["| Metric | Unit | What it is | How to read it |", "|---|---|---|---|"]
    others = []
    for metric in metrics_of(method):
        reading = reading_of(metric.name, method)
        if reading is None:
            others.append(metric.name)
            continue
        text = f"*{reading.when}* {reading.text}" if reading.when else reading.text
        cells = (f"`{metric.name}`", metric.unit, metric.meaning, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    held_out = [metric.name for metric in METRICS.values() if metric.stages == (Stage.EVALUATION,)]
    lines += [
        "",
        f"Also in the records of its steps: {_listed(others)}. On held-out rows, where there are some and a grader: "
        f"{_listed(held_out)}. All are explained under [metrics](../reference/metrics.md).",
    ]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
