"""The report page: nothing of a sample becomes markup, and runs in any state are shown as what they are."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import DataError
from graft.report import page_data, page_prompts
from graft.report.html import embed, write_report
from graft.report.metrics import METRICS, Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.trees import tree_record
from graft.tree import Kind
from graft.types import Credit, Critique, Grade, Outcome
from tests.report.synthetic import (
    decode,
    evaluation_metrics,
    make_credit,
    make_prompt,
    make_tree,
    write_run,
)

HOSTILE = (
    "</script><script>alert(1)</script><!--<script><img src=x onerror=alert(2)>"
    "]]>&lt;\"'`${1}\\{{config}}\x00\x1b[31m\u202egnp.exe\u2028\ud800 🌱👩‍👩‍👧 שלום مرحبا"
)

ELEMENTS = set(
    re.findall(
        r"\w+",
        """html head meta title link style body a main section div header h1 h2 h3 p span b small dl dt dd details
        summary pre table thead tbody tr th td code figure figcaption button fieldset legend label input output footer
        noscript script select dl""",
    )
)


class Page(HTMLParser):
    """What a browser would see of the file before any script runs."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts.append(data)
        elif not self._inside or self._inside[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment in the page: {data[:80]}")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def report_of(folder: RunFolder, **options: Any) -> Page:
    path = write_report(folder.path, **options)
    assert path == folder.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def write_hostile_run(path: Path) -> RunFolder:
    folder = RunFolder.create(
        path, f'# {HOSTILE.encode("ascii", "ignore").decode()!r}\n[model]\nname = "</script><b>x"\n'
    )
    with folder:
        folder.append_metrics(
            {"step": 1, "stage": "train", "reward_mean": math.nan, "gradient_norm": math.inf}
        )
        folder.append_metrics({"step": 2, "stage": "train", "reward_mean": 0.5})
        for step in (1, 2):
            tree = make_tree(make_prompt(step, HOSTILE), [HOSTILE, "<b>bold</b>", " "])
            tree = tree.cut(1, [9, 30], [Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER])
            credit = Credit({1: np.full(9, 0.5, np.float32), 5: np.full(10, -0.25, np.float32)}, {})
            grades = {
                5: Grade(1.0, reason=HOSTILE),
                2: Grade(0.0, Outcome.UNPARSEABLE),
                3: Grade(None, Outcome.CRASHED),
            }
            critiques = {5: Critique(5.0, (1.0, 2.0), (1.0, 2.0), (HOSTILE, ""), problem=HOSTILE)}
            details = {5: {HOSTILE: 1.0, "A": -0.25}}
            folder.append_tree(
                tree_record(
                    step, Stage.TRAIN, tree, grades, decode, credit, critiques=critiques, details=details
                )
            )
        for moment in (Moment.BEFORE, Moment.AFTER):
            folder.append_metrics(evaluation_metrics(2, moment, 0.5))
            tree = make_tree(make_prompt(7, HOSTILE), [HOSTILE])
            folder.append_tree(tree_record(2, Stage.EVALUATION, tree, {1: Grade(0.0)}, decode, moment=moment))
        folder.write_summary(
            {"status": "failed", "error": HOSTILE, "started_at": "<i>", "device": "<b>", "steps": 3}
        )
    return folder


def test_hostile_text_stays_text(tmp_path: Path):
    page = report_of(write_hostile_run(tmp_path / "<b>run & co"))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "alert(1)" in page.text
    assert "<b>run & co" in page.text
    assert "<b>, <i>" not in page.text
    nodes = page.data["steps"][0]["prompts"][0]["nodes"]
    assert nodes[0]["reason"] == nodes[0]["text"] + nodes[3]["text"] + nodes[4]["text"]
    assert nodes[0]["reason"] == (
        HOSTILE.replace("\x00", "␀")
        .replace("\x1b", "␛")
        .replace("\u202e", "⟨U+202E⟩")
        .replace("\ud800", "⟨U+D800⟩")
    )


def test_the_page_can_reach_nothing_outside(tmp_path: Path):
    page = report_of(write_run(tmp_path / "run", steps=2))
    for tag, attributes in page.elements:
        assert "src" not in attributes
        if "href" in attributes:
            assert str(attributes["href"]).startswith(("#", "data:image/svg+xml,")), tag
    policy = next(
        a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


@settings(max_examples=25)
@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_embedded_data_cannot_end_its_script_and_comes_back(value):
    text = embed(value)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == value


def test_a_finished_run(tmp_path: Path):
    page = report_of(write_run(tmp_path / "run", steps=40))
    for part in (
        "finished after 40 steps",
        "smollm2-135m-instruct · GRPO after a warm start · seed 7",
        "11.5 % → 66.0 %",
        "+54.5 points on 200 rows. The warm start gave +22.0 points, GRPO +32.5 points.",
        "2 March 2025, 14:03 UTC",
        "24 min 36 s",
        "2,000 training, 200 held out",
        "Resolved settings",
        'source = "gym:chain_sum"',
    ):
        assert part in page.text
    for metric in METRICS.values():
        assert metric.name in page.text
    assert [chart["title"] for chart in page.data["charts"]] == [
        "Reward",
        "Held-out accuracy",
        "Groups with signal",
        "Completion length",
        "Entropy",
        "Gradient norm",
        "KL to initial",
        "Engine gap",
        "Sampling speed",
        "Warm-start loss",
    ]
    assert len(page.data["pairs"]) == 12
    assert "overlap" not in page.text


def test_columns_by_hand(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        folder.append_metrics(
            {
                "step": 0,
                "stage": "evaluation",
                "moment": "before",
                "held_out_accuracy": 0.25,
                "evaluation_seconds": 9,
            }
        )
        folder.append_metrics({"step": 1, "stage": "warm_start", "loss": 2.0, "step_seconds": 1.5})
        folder.append_metrics(
            {
                "step": 1,
                "stage": "train",
                "reward_mean": 0.123456789,
                "generated_tokens": 70,
                "step_seconds": 3,
            }
        )
        folder.append_metrics(
            {"step": 2, "stage": "train", "reward_mean": math.nan, "entropy": 0.5, "generated_tokens": 150}
        )
        folder.append_metrics(
            {
                "step": 2,
                "stage": "evaluation",
                "moment": "after",
                "held_out_accuracy": 0.5,
                "evaluation_seconds": 4,
            }
        )
    columns = report_of(folder).data["columns"]
    assert columns["train"] == {
        "step": [1, 2],
        "reward_mean": [0.123457, "NaN"],
        "generated_tokens": [70, 150],
        "step_seconds": [3, None],
        "entropy": [None, 0.5],
        "seconds": [13.5, 13.5],
    }
    assert columns["warm_start"]["seconds"] == [10.5]
    assert columns["evaluation"]["generated_tokens"] == [0, 150]
    assert columns["evaluation"]["seconds"] == [9, 17.5]


def test_a_run_cut_short_says_so(tmp_path: Path):
    page = report_of(write_run(tmp_path / "run", steps=37, planned_steps=200, finished=False))
    assert "37 of 200 steps; no summary: cut short or still running" in page.text
    assert "Last measured after step 35; not measured at the end." in page.text
    assert "before the measurement after training" in page.text


def test_a_run_without_evaluation_claims_nothing_about_new_rows(tmp_path: Path):
    page = report_of(write_run(tmp_path / "run", steps=40, evaluate=False, warm_start_steps=0))
    assert "Training reward, mean of the first and last 10 steps" in page.text
    assert "whether this holds on new rows is unknown" in page.text
    assert "Not measured in this run: held-out accuracy." in page.text
    assert "Measured and not drawn, because it says little here: loss. metrics.jsonl" in page.text
    assert "This run did not measure held-out rows." in page.text


def test_a_run_of_one_step(tmp_path: Path):
    page = report_of(write_run(tmp_path / "run", steps=1, evaluate=False, warm_start_steps=0))
    assert "Training reward of the one step" in page.text
    assert page.data["columns"]["train"]["step"] == [1]


def test_a_run_that_made_no_step(tmp_path: Path):
    page = report_of(RunFolder.create(tmp_path / "run", ""))
    assert "No step was recorded before the run stopped." in page.text
    assert "No training step was recorded." in page.text
    assert page.data["charts"] == page.data["steps"] == page.data["pairs"] == []


def test_steps_that_were_not_finite_are_counted_and_left_out_of_the_mean(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        for step, reward in enumerate([0.25, math.nan, 0.75], start=1):
            folder.append_metrics({"step": step, "stage": "train", "reward_mean": reward})
    page = report_of(folder)
    assert "Steps without a finite reward, left out here: 1." in page.text
    assert "0.25 → 0.75" in page.text


def test_intervals_that_overlap_are_called_chance(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        folder.append_metrics(evaluation_metrics(0, Moment.BEFORE, 0.50))
        folder.append_metrics(evaluation_metrics(9, Moment.AFTER, 0.52))
    assert "The intervals overlap: the difference may be chance." in report_of(folder).text


def test_imitation_shows_its_loss(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", '[algorithm]\nname = "sft"\n') as folder:
        folder.append_metrics({"step": 1, "stage": "train", "loss": 2.0})
    assert [chart["title"] for chart in report_of(folder).data["charts"]] == ["Loss"]


def test_of_many_trees_an_even_choice_is_shown_and_counted(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100, prompts_per_step=3, group_size=2, evaluate=False)
    page = report_of(folder, max_trees=12)
    steps = [entry["step"] for entry in page.data["steps"]]
    assert (steps[0], steps[-1]) == (1, 100)
    assert len(steps) == 4
    assert all(len(entry["prompts"]) == 3 for entry in page.data["steps"])
    assert "4 of 100 steps are on this page, at even distances" in page.text


def test_long_texts_and_large_groups_are_cut_and_counted(tmp_path: Path):
    with RunFolder.create(tmp_path / "run", "") as folder:
        folder.append_metrics({"step": 1, "stage": "train", "reward_mean": 0.5})
        count = page_prompts.SAMPLES_PER_PROMPT + 4
        tree = make_tree(make_prompt(1, "?"), ["x" * (page_prompts.CHARACTERS_PER_SAMPLE + 7)] * count)
        folder.append_tree(tree_record(1, "train", tree, {}, decode, make_credit(tree, [0.0] * count)))
    (prompt,) = report_of(folder).data["steps"][0]["prompts"]
    assert (len(prompt["leaves"]), prompt["drawn"]) == (page_prompts.SAMPLES_PER_PROMPT, count)
    assert (len(prompt["nodes"]), prompt["spans"]) == (page_prompts.SAMPLES_PER_PROMPT, count)
    assert prompt["nodes"][0]["text"].endswith("x… [7 more characters in trees.jsonl]")


def test_an_older_report_is_replaced_and_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1)
    (folder.path / "report.html").write_text("old")
    assert "finished" in report_of(folder).text
    with pytest.raises(DataError, match="not a run folder"):
        write_report(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1)
    with open(folder.path / "trees.jsonl", "ab") as file:
        file.write(b"damage\n")
    with pytest.raises(DataError, match=r"trees\.jsonl, line \d+"):
        write_report(folder.path)


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours `#rrggbb` as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_in_both_themes(tmp_path: Path):
    style = (Path(page_data.__file__).parent / "page" / "page.css").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for text in ("ink", "muted", "accent", "warm", "good", "bad"):
            for ground in ("ground", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
