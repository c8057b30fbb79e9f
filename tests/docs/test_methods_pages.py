"""docs/methods/ and docs/papers.md: a page a method, generated parts fresh, nothing named that is not there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.algorithm_settings import ALGORITHM_NAMES, CISPO, GRPO, GSPO
from graft.cli.main import app
from graft.cli.method_pages import fill, filled_pages, render_blocks
from graft.cli.readings import READINGS, metrics_of, reading_of
from graft.cli.settings import Setting, read_algorithm, read_sections
from graft.losses import TokenBatch, loss_clipped, loss_clipped_sequence, loss_weighted
from graft.report.doctor.diagnosis import CHECKS
from graft.report.metrics import METRICS, find_metric

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "docs" / "methods"
SOURCE = ROOT / "src" / "graft"
PAPERS = ROOT / "docs" / "papers.md"
WRITTEN = [METHODS / "index.md", *(METHODS / f"{name}.md" for name in ALGORITHM_NAMES), PAPERS]

HEADINGS = [
    "What it optimises",
    "Settings",
    "Metrics",
    "Sources",
    "What we do differently",
    "When to choose it",
    "Hazards",
]

IN_SETTINGS: dict[str, list[Setting]] = {}
"""Dotted name, without `algorithm.`, -> the settings of that name: of several algorithms, or of several critics."""
for _section in read_sections():
    for _entry in _section.settings:
        IN_SETTINGS.setdefault(_entry.path.removeprefix("algorithm."), []).append(_entry)

SECTIONS = {
    path for section in read_sections() for path in (section.path, section.path.removeprefix("algorithm."))
}
LITERALS = set(re.findall(r'"(\w+)"', " ".join(s.type for own in IN_SETTINGS.values() for s in own)))
KINDS = set(re.findall(r'"(\w+)"', " ".join(section.title for section in read_sections())))
PARAMETERS = {"name", "type"}
"""What chooses a kind of section; no setting of its own."""


def own_words(path: Path) -> str:
    """A page without its generated parts and its formulas."""
    text = re.sub(
        r"<!-- (settings|metrics) -->.*?<!-- end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def defined_in(path: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and constants of a module."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            }
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            names |= {target.id} if isinstance(target, ast.Name) else set()
    return names


def problem_of(span: str) -> str | None:
    """What is wrong with a piece of inline code that is no reference to code."""
    name, equals, value = (part.strip() for part in span.partition("="))
    bare = name.strip('"')
    if span.startswith("graft "):
        commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
        return None if span.split()[1] in commands else "no such command"
    if span.startswith("["):
        return None if span.strip("[]").partition("]")[0] in SECTIONS else "no such section"
    if span.startswith('"') or not re.fullmatch(r"[\w.]+", name):
        return None if bare in LITERALS else "no value of a setting"
    known = name.removeprefix("algorithm.")
    if equals and value.startswith('"') and known in IN_SETTINGS:
        return None if any(value in s.type for s in IN_SETTINGS[known]) else f"does not take {value}"
    if equals and name in {"type", "name", "critic.type"}:
        return None if value.strip('"') in KINDS else "no such kind"
    leaves = {path.rpartition(".")[2] for path in IN_SETTINGS}
    is_known = known in {*IN_SETTINGS, *SECTIONS, *leaves} or name in {
        *METRICS,
        *ALGORITHM_NAMES,
        *KINDS,
        *LITERALS,
    }
    return None if is_known else "neither setting nor value, metric or method"


CODE = re.compile(r"`([\w/]+\.py)`((?:(?:,|\s+and|)\s+`(?![\w/]+\.py`)[\w.]+`)*)")


def references(text: str) -> list[tuple[str, str]]:
    """(file, name in it) of each reference such as `losses.py` `loss_clipped`; the name is empty for a file alone."""
    found = []
    for file, names in CODE.findall(text):
        found += [(file, name) for name in re.findall(r"`([\w.]+)`", names)] or [(file, "")]
    return found


def test_each_method_has_a_page():
    assert {path.stem for path in METHODS.glob("*.md")} == {*ALGORITHM_NAMES, "index", "rewards_example"}


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_a_page_has_all_its_parts(name):
    page = (METHODS / f"{name}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert [heading for heading in headings if heading in HEADINGS] == HEADINGS


def test_the_generated_parts_are_fresh():
    pages = dict(filled_pages(METHODS))
    assert len(pages) == len(ALGORITHM_NAMES)
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m graft.cli.docs`"


def test_filling_a_page_keeps_what_is_written_by_hand():
    page = "a\n<!-- metrics -->\nold\n<!-- end -->\nb <!-- settings -->\n<!-- settings -->\n<!-- end -->\nc\n"
    blocks = {"settings": "S\n", "metrics": "M\\1\n"}
    once = fill(page, blocks)
    assert once == (
        "a\n<!-- metrics -->\nM\\1\n<!-- end -->\nb <!-- settings -->\n<!-- settings -->\nS\n<!-- end -->\nc\n"
    )
    assert fill(once, blocks) == once
    for broken in (page.replace("<!-- end -->\nc", "c"), page + "<!-- metrics -->\n<!-- end -->\n", "a\n"):
        with pytest.raises(ValueError, match="marks"):
            fill(broken, blocks)


def test_a_settings_block_holds_the_settings_of_its_method_and_no_others():
    listed = {
        name: set(re.findall(r"^\| `(\S+)` \|", render_blocks(name)["settings"], re.M))
        for name in ALGORITHM_NAMES
    }
    stopping = {"algorithm.early_stopping.patience", "algorithm.early_stopping.minimum_improvement"}
    assert listed["sft"] == {"algorithm.worked", "algorithm.reduction"} | stopping
    assert "algorithm.weight_cap" in listed["cispo"]
    assert "algorithm.clip.dual" in listed["grpo"]
    assert "algorithm.clip.dual" not in listed["gspo"]
    assert {"algorithm.rewards.boost", "algorithm.critic.continuations"} <= listed["rft"]
    for name, found in listed.items():
        assert found == {entry.path for section in read_algorithm(name) for entry in section.settings}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_what_a_page_names_exists(path):
    text = own_words(path)
    problems = []
    for file, name in references(text):
        module = SOURCE / file
        if not module.is_file():
            problems.append(f"{file}: no such file")
        elif name and name not in defined_in(module):
            problems.append(f"{file}: no {name} in it")
    for span in re.findall(r"`([^`\n]+)`", CODE.sub("", text)):
        problem = None if span == "torch.optim.AdamW" or span == "src/graft/" else problem_of(span)
        problems += [f"`{span}`: {problem}"] if problem else []
    assert problems == []


def test_what_is_not_there_is_found():
    assert problem_of("clip.low") is None
    assert problem_of("clip.lowest") is not None
    assert problem_of('scale = "none"') is None
    assert problem_of('scale = "nothing"') is not None
    assert problem_of("graft doctor") is None
    assert problem_of("graft heal") is not None
    assert problem_of("[warm_start]") is None
    assert problem_of("[cold_start]") is not None
    assert problem_of("engine_gap_mean") is None
    assert problem_of("engine_gap_median") is not None
    assert references("`a/b.py` `c` and `D.e`, `f`; `g.py`") == [
        ("a/b.py", "c"),
        ("a/b.py", "D.e"),
        ("a/b.py", "f"),
        ("g.py", ""),
    ]
    assert {"references", "ROOT", "HEADINGS"} <= defined_in(Path(__file__))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).is_file(), link


def test_the_table_of_methods():
    page = (METHODS / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\) \| (.*) \|$", page, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(ALGORITHM_NAMES)
    for name, target, cells in rows:
        assert target == name
        _, _, reduction, value, _ = cells.split(" | ")
        entries = {
            entry.path: entry.default for section in read_algorithm(name) for entry in section.settings
        }
        assert value == ("yes" if "algorithm.value.clip" in entries else "no")
        assert reduction.strip("`") == entries.get("algorithm.reduction", OWN_REDUCTION.get(name, "")).strip(
            '"'
        )


OWN_REDUCTION = {
    "rft": "sum over segments",
    "grft": "mean over each depth",
    "vineppo": "mean over tokens",
    "spo_chain": "mean over unsure tokens",
    "spo_tree": "mean over unsure tokens",
}

DEFAULT = re.compile(r"`([\w.]+)` ([^`,;(|]+?) ?(?:\(((?:`\w+`(?:, )?)+)\))?(?=[,;]|$)")


def test_the_defaults_in_papers_are_those_of_the_settings():
    checked = 0
    rows = re.findall(r"^\| (?!source|-)(.*) \|$", PAPERS.read_text(encoding="utf-8"), re.MULTILINE)
    for row in rows:
        cell = re.split(r" \| ", row.replace(r"\|", "/") + " ")[3]
        for name, value, algorithms in DEFAULT.findall(cell.strip()):
            named = re.findall(r"\w+", algorithms)
            found = [
                entry.default
                for algorithm in named or ALGORITHM_NAMES
                for section in read_algorithm(algorithm)
                for entry in section.settings
                if entry.path == f"algorithm.{name}"
            ] or [entry.default for entry in IN_SETTINGS[name]]
            assert set(found) == {value}, f"{name} of {named or 'all'}: {found}"
            assert not named or len(found) >= len(named), f"{name}: not a setting of all of {named}"
            checked += 1
    assert checked > 50


def test_every_paper_that_the_formulas_cite_has_a_row():
    cited = {
        paper: path.name
        for folder in ("credit", "objective", "critics", "segments", "update", "rollout")
        for path in (SOURCE / folder).glob("*.py")
        for paper in re.findall(r"(?:arXiv:|arXiv )(\d{4}\.\d{5})", path.read_text(encoding="utf-8"))
    }
    cited |= {
        paper: page.name
        for page in WRITTEN
        for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", page.read_text())
    }
    text = PAPERS.read_text(encoding="utf-8")
    assert {paper: file for paper, file in cited.items() if paper not in text} == {}


# -- what a method records ------------------------------------------------------------------------------------

ROWS = [{"prompt": f"What is {n} + 1?", "worked": f"It is\n{n + 1}", "n": n} for n in range(12)]

UNUSUAL: dict[str, dict[str, Any]] = {
    "grpo": {"max_sampling_rounds": 2, "updates_per_batch": 2},
    "ppo": {"kl": {"coefficient": 0.1, "target": 1.0}, "minibatches": 2},
    "rft": {"critic": {"type": "monte_carlo"}, "segments": {"cutter": "tokens:4"}, "updates_per_batch": 2},
    "grft": {"ratio": "segment", "segments": {"cutter": "tokens:4"}, "updates_per_batch": 2},
}
"""Settings under which more is recorded than by default."""

ALSO = {
    "grpo": {"sampling_rounds", "groups_discarded", "tokens_discarded", "kl_to_initial"},
    "ppo": {"kl_per_completion", "kl_coefficient", "kl_to_initial"},
    "rft": {"critic_tokens_sampled", "critic_agreement", "segments_clipped_share", "kl_to_initial"},
    "grft": {"segments_clipped_share", "kl_to_initial"},
}

OF_GRADERS = {"part_<name>_mean", "grading_<name>_count", "judge_prompt_tokens", "judge_completion_tokens"}


def by_length(completion: str, item: dict[str, Any]) -> float:
    return 1.0 if item["n"] < 4 else len(completion) % 3 / 2  # some rows have no signal


def recorded(model: Path, run: str, algorithm: dict[str, Any]) -> set[str]:
    worked = algorithm["name"] == "sft"
    done = graft.train(
        str(model),
        ROWS,
        None if worked else by_length,
        run=run,
        quiet=True,
        algorithm=algorithm | ({"worked": "key:worked"} if worked else {}),
        sampling={"max_new_tokens": 12},
        training={"prompts_per_step": 4, "steps": 3},
        report={} if worked else {"kl_every": 1},
    )
    records = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    return {find_metric(name).name for record in records if record["stage"] == "train" for name in record}


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_a_method_records_what_its_page_lists(tiny_model_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    listed = {metric.name for metric in metrics_of(name)}
    found = recorded(tiny_model_folder, "plain", {"name": name})
    conditional = {reading.metric for reading in READINGS if reading.when and name in reading.methods}
    assert found <= listed
    assert listed - conditional - OF_GRADERS <= found
    if name in UNUSUAL:
        more = recorded(tiny_model_folder, "unusual", {"name": name, **UNUSUAL[name]})
        assert more <= listed
        assert ALSO[name] <= more & conditional


def test_a_metric_has_one_reading_in_a_method():
    for name in ALGORITHM_NAMES:
        own = [reading.metric for reading in READINGS if name in reading.methods]
        assert len(own) == len(set(own))
    assert {reading.metric for reading in READINGS} <= set(METRICS)
    assert reading_of("value_loss", "grpo") is None
    with pytest.raises(KeyError):
        METRICS["no_such_metric"]


def test_thresholds_and_titles_are_those_of_the_doctor():
    checks = {check.name: check for check in CHECKS}
    for metric, name, said in (
        ("clipped_share", "clipped", "look from 20 %"),
        ("ratio_max", "ratio", "look from 2."),
        ("engine_gap_mean", "engine_gap", "look from 0.05."),
    ):
        reading = reading_of(metric, "grpo")
        assert reading is not None
        assert said in reading.text
        threshold = re.findall(r"[\d.]+\d|\d+", said)[0]
        assert float(threshold) / (100 if "%" in said else 1) == checks[name].look
    titles = " ".join(check.title for check in CHECKS)
    failures = own_words(METHODS / "grpo.md").partition("## Hazards")[2]
    for title in [*re.findall(r'"([A-Z][\w\' -]+)"', failures), "Step-count gaming"]:
        if title != "Failure Points of GRPO":
            assert title in titles


# -- what the pages claim -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.1] * 5, [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]])
def test_with_one_update_a_batch_the_ratio_does_not_matter(weights):
    """GRPO, GSPO and CISPO: the same gradient under any reduction, which weighs tokens of a completion alike."""

    def gradient(loss: Any, settings: Any) -> torch.Tensor:
        logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1], dtype=torch.float64, requires_grad=True)
        old = logprobs.detach()
        advantages = torch.tensor([0.7, 0.7, -0.9, -0.9, -0.9], dtype=torch.float64)
        nodes = torch.tensor([0, 0, 1, 1, 1])
        result = loss(TokenBatch(logprobs, old, old, old, None, advantages, nodes), settings)
        (result.per_token * torch.tensor(weights, dtype=torch.float64)).sum().backward()
        assert logprobs.grad is not None
        return logprobs.grad

    # of the completion's log-probability, which all its tokens add to: GSPO spreads it evenly
    expected = gradient(loss_clipped, GRPO())
    torch.testing.assert_close(gradient(loss_weighted, CISPO()), expected)
    torch.testing.assert_close(gradient(loss_clipped_sequence, GSPO()), expected)
