"""What do the advantages of a run say: how hard a row is, or what was done on it?

    python -m benchmarks.advantages runs/first/trees.jsonl [...]

For each file one JSON line about its training steps: `segments`; `with_siblings`, the share of them that others of the
same step and row follow the same tokens with; and of the advantages' variance the share `within` such beginnings, and
`between_actions`, between different next segments behind the same beginning. The rest lies between beginnings.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Tokens = tuple[int, ...]


def main() -> None:
    """Print the shares of each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trees", type=Path, nargs="+", help="trees.jsonl of runs whose algorithm cuts segments"
    )
    for path in parser.parse_args().trees:
        with path.open(encoding="utf-8") as lines:
            found = variance_shares(json.loads(line) for line in lines)
        print(json.dumps({"run": "/".join(path.parts[-3:-1]), **found}))


def variance_shares(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of the variance of all advantages, as the module says."""
    behind: dict[tuple[int, int, Tokens], dict[Tokens, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["stage"] != "train":
            continue
        before: dict[int, Tokens] = {0: ()}
        for number, node in enumerate(record["nodes"][1:], start=1):
            start, own = before[node["parent"]], tuple(node["tokens"])
            before[number] = start + own
            advantage = record["advantages"].get(str(number))
            if advantage is not None:
                mean = fmean(advantage) if isinstance(advantage, list) else advantage
                behind[record["step"], record["row"], start][own].append(mean)
    groups = [[value for own in actions.values() for value in own] for actions in behind.values()]
    total = _squares([value for group in groups for value in group])
    count = sum(map(len, groups))
    within = sum(_squares(group) for group in groups)
    luck = sum(_squares(own) for actions in behind.values() for own in actions.values())
    return {
        "segments": count,
        "with_siblings": round(sum(len(group) for group in groups if len(group) > 1) / count, 3),
        "within": round(within / total, 3),
        "between_actions": round((within - luck) / total, 3),
    }


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from their mean."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)


if __name__ == "__main__":
    main()
