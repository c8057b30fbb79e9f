"""The report page in a real browser: segments with their numbers, the tree, keyboard and mouse, both themes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.report.html import write_report
from graft.types import Critique, Outcome
from tests.report.browser import CHROMIUM, Browser, Page
from tests.report.synthetic import (
    THOUGHT_METRICS,
    MadeChain,
    chains_record,
    grown_record,
    judged_chain,
    write_run,
    write_trees,
)
from tests.report.test_html import HOSTILE, write_hostile_run

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")

LONG = "A thought that goes on and on. " * 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def thoughts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose one prompt has chains of every kind."""
    first = MadeChain(
        ["3 + 4 = 7\n", "7 * 2 = 15\n", "<think>日本 🌱 \"'</think>\n"],
        "14",
        1.0,
        Critique(10.0, (10.0, 0.0, 5.0), (5.0, 5.0, 10.0), ("uses <b>two</b>\nnumbers", "7 * 2 is 14", "")),
        [
            {
                "S": 10.0,
                "P": 5.0,
                "Ŝ": 1.2247,
                "E": 0.0,
                "Q": 0.0,
                "C": 11.2247,
                "R": 2,
                "V": 0.5,
                "Y": 2,
                "A": 1.5,
            },
            {
                "S": 0.0,
                "P": 5.0,
                "Ŝ": -0.61237,
                "E": 0.0004,
                "Q": 0,
                "C": 9,
                "R": 1,
                "V": 4,
                "Y": 1,
                "A": -3.0,
            },
            {"S": 5.0, "P": 10.0, "Ŝ": 0.0, "E": 1.0, "Q": 1.0, "C": 11, "R": 2, "V": 2, "Y": 2, "A": 0.0},
            {"R": 2.0, "V": 1.25, "Y": 2.0, "A": 0.75},
        ],
    )
    failed = MadeChain(
        ["no critic\n"], "12", 1.0, Critique(outcome=Outcome.TIMED_OUT, problem="no answer in 60 s")
    )
    chains = [first, judged_chain([" \n", LONG], None, score=0.0), failed]
    folder = write_trees(tmp_path_factory.mktemp("runs") / "run", [chains_record(1, chains)])
    return write_report(folder.path)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with a tree of 84 spans, one of 276 and a chain with candidates."""
    small, large, chain = grown_record(1, [4, 4, 4], row=1), grown_record(1, [4, 4, 4, 3], row=2), GROWN_CHAIN
    folder = write_trees(
        tmp_path_factory.mktemp("runs") / "run", [chain], [small, large, chain], algorithm="grft"
    )
    return write_report(folder.path)


GROWN_CHAIN = grown_record(1, [3, 3, 1], shape="chain", row=3)
GROWN_CHAIN["texts"]["1"] = f"{HOSTILE}\n{LONG}"
GROWN_CHAIN["texts"]["2"] = ""


def texts(page: Page, selector: str) -> list[str]:
    return page.ask(f"[...document.querySelectorAll({selector!r})].map((each) => each.textContent)")


def count(page: Page, selector: str) -> int:
    return page.ask(f"document.querySelectorAll({selector!r}).length")


def lines(page: Page) -> list[str]:
    """Kinds of the lines of the tree that are unfolded."""
    return page.ask(
        "[...document.querySelectorAll('.tree .item > .line')].filter((line) => line.offsetParent)"
        ".map((line) => line.querySelector('.span-kind').textContent)"
    )


def focused(page: Page) -> Sequence[Any]:
    """Depth and place in its group of the focused span."""
    return page.ask(
        "((item) => [Number(item.ariaLevel), [...item.parentElement.children]"
        ".filter((each) => each.matches('.item')).indexOf(item)])(document.activeElement)"
    )


def test_the_page_runs_nothing_hostile(browser: Browser, tmp_path: Path):
    page = browser.open(write_report(write_hostile_run(tmp_path / "run").path))
    page.ask("document.querySelectorAll('.prompt').forEach((each) => { each.open = true; })")
    page.point(".to-tree", click=True)
    page.point("#tree-unfold", click=True)
    for _ in range(3):
        page.press("Tab")
    page.press("Enter")
    assert page.problems == []
    assert count(page, "svg") == 3
    assert count(page, ".broken") == 2
    assert count(page, "article") == 5
    assert count(page, "article.credited") == 1
    assert count(page, "img") == 0
    assert count(page, "main b") == count(page, ".readout b, .facts b")
    assert count(page, "script") == 2


def test_each_segment_has_its_numbers_and_a_missing_one_is_blank(browser: Browser, thoughts: Path):
    page = browser.open(thoughts)
    assert count(page, "article") == 3
    assert count(page, "article.credited") == 2
    assert texts(page, "article:nth-of-type(1) thead th") == ["#", "segment", *"SP", "Ŝ", *"EQCRVYA"]
    rows = [texts(page, f"article:nth-of-type(1) tbody tr:nth-of-type({k}) > .number") for k in (1, 2, 3, 4)]
    assert rows == [
        ["10", "5", "1.22", "0", "0", "11.2", "2", "0.5", "2", "+1.5"],
        ["0", "5", "−0.61", "4e−4", "0", "9", "1", "4", "1", "−3"],
        ["5", "10", "0", "1", "1", "11", "2", "2", "2", "0"],
        ["", "", "", "", "", "", "2", "1.25", "2", "+0.75"],
    ]
    assert texts(page, "article:nth-of-type(1) .order") == [
        "#",
        "thought 1",
        "thought 2",
        "thought 3",
        "answer",
    ]
    assert texts(page, "article:nth-of-type(1) .block")[2] == "<think>日本 🌱 \"'</think>"
    assert texts(page, "article:nth-of-type(2) .block")[0] == "(white space)"
    assert "overall score 10" in texts(page, "article:nth-of-type(1) header")[0]
    assert page.problems == []


def test_a_segment_is_coloured_by_sign_and_strength_beside_the_largest_of_its_sample(
    browser: Browser, thoughts: Path
):
    page = browser.open(thoughts)
    rows = page.ask(
        "[...document.querySelectorAll('article:nth-of-type(1) tbody tr')]"
        ".map((row) => [row.className, row.style.getPropertyValue('--strength')])"
    )
    assert rows == [["positive", "0.500"], ["negative", "1.000"], ["", "0.000"], ["positive", "0.250"]]
    bars = page.ask(
        "[...document.querySelectorAll('article:nth-of-type(1) .bar')].map((bar) => { const whole = bar"
        ".getBoundingClientRect(), own = bar.firstChild.getBoundingClientRect(); return [own.width / whole.width,"
        " Math.sign(own.x + own.width / 2 - whole.x - whole.width / 2)]; })"
    )
    assert [sign for _, sign in bars] == [1, -1, 0, 1]
    assert [width for width, _ in bars] == pytest.approx([0.25, 0.5, 0.0, 0.125], abs=0.01)
    edges = page.ask(
        "[...document.querySelectorAll('article:nth-of-type(1) .block')]"
        ".map((block) => getComputedStyle(block).borderLeftStyle)"
    )
    assert edges == ["solid", "double", "solid", "solid"]


def test_curves_of_one_chart_have_names_and_colours_of_their_own(browser: Browser, thoughts: Path):
    page = browser.open(thoughts)
    chart = (
        "[...document.querySelectorAll('.chart')].find((each) => "
        "each.querySelector('.term').textContent === 'Critic scores')"
    )
    assert page.ask(f"{chart}.querySelector('.readout').innerText") == "S 7.5\nP 6.25 · G 5.5 · step\u00a01"
    strokes = page.ask(f"[...{chart}.querySelectorAll('.line')].map((each) => getComputedStyle(each).stroke)")
    keys = page.ask(
        f"[...{chart}.querySelectorAll('.key')].map((each) => getComputedStyle(each).backgroundColor)"
    )
    assert strokes == keys
    assert len(set(strokes)) == 3
    assert page.problems == []


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose grader has four parts, one with a long name."""
    names = ["form", "right", "near", "answer_in_the_form_asked_for"]
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", steps=2, warm_start_steps=0)
    with folder:
        for step in (3, 4):
            folder.append_metrics(
                {"step": step, "stage": "train", **{f"part_{n}_mean": i / step for i, n in enumerate(names)}}
            )
        record = chains_record(4, [MadeChain([], "12"), MadeChain([], "13")], question=ASKED)
        record["grades"]["1"]["parts"] = {"form": 1.0, "right": 0.25}
        record["item"] = ROW
        folder.append_tree(record)
    return write_report(folder.path)


ASKED = "Which is it, A or B?"
ROW = {"question": ASKED, "reference_answer": "A", "messages": [{"role": "user", "content": ASKED}]}


def test_parts_of_a_grader_have_a_line_each_and_stand_in_the_card_of_their_sample(
    browser: Browser, parts: Path
):
    page = browser.open(parts)
    chart = (
        "[...document.querySelectorAll('.chart')].find((each) => "
        "each.querySelector('.term').textContent === 'Parts of the score')"
    )
    told = page.ask(f"{chart}.querySelector('.readout').textContent").replace("\u00a0", " ")
    assert told == "form 0right 0.25 · near 0.5 · answer_in_the_form_asked_for 0.75 · step 4"
    looks = page.ask(
        f"[...{chart}.querySelectorAll('path.line')].map((each) => getComputedStyle(each))"
        ".map((style) => `${style.stroke} ${style.strokeDasharray}`)"
    )
    assert len(set(looks)) == 4
    assert texts(page, ".prompt:nth-of-type(1) article .parts") == ["form 1right 0.25"]
    page.point(".to-tree", click=True)
    page.point(".tree .item .span-kind", click=True)
    assert texts(page, ".tree .detail .parts") == ["form 1right 0.25"]
    assert page.problems == []


def test_a_failed_critique_is_told_and_its_sample_looks_like_one_without_numbers(
    browser: Browser, thoughts: Path
):
    page = browser.open(thoughts)
    assert "critic: timed out" in texts(page, "article:nth-of-type(3) header")[0]
    assert texts(page, "article:nth-of-type(3) .text") == ["no critic\n12"]
    assert texts(page, "article:nth-of-type(3) .reason") == ["Critic: no answer in 60 s"]
    assert count(page, "article:nth-of-type(3) table") == 0


def test_the_critics_reason_by_mouse_by_keyboard_and_held_open(browser: Browser, thoughts: Path):
    page = browser.open(thoughts)
    shown = "getComputedStyle(document.querySelector('.said .tip')).visibility"
    assert count(page, ".why") == 2
    assert texts(page, ".said .tip") == ["uses <b>two</b>\nnumbers", "7 * 2 is 14"]
    assert page.ask(shown) == "hidden"
    page.point(".said .block")
    page.ask(
        "Promise.all(document.querySelector('.said .tip').getAnimations().map((each) => each.finished)).then(() => 0)"
    )
    assert page.ask(shown) == "visible"
    page.point("h1")
    assert page.ask(shown) == "hidden"
    page.ask("document.querySelector('.prompt > summary').focus()")
    page.press("Tab")
    assert page.ask("document.activeElement.matches('.why')")
    assert page.ask(shown) == "visible"
    page.press("Escape")
    assert page.ask(shown) == "hidden"
    page.point(".why", click=True)
    assert page.ask("document.querySelector('.why').ariaExpanded") == "true"
    assert page.ask("getComputedStyle(document.querySelector('.said .tip')).position") == "static"
    page.point(".why", click=True)
    assert page.ask(shown) == "hidden"


def test_a_long_text_is_shown_whole_on_demand(browser: Browser, thoughts: Path):
    page = browser.open(thoughts)
    whole = LONG.strip("\n")
    assert len(texts(page, "article:nth-of-type(2) .block > span")[1]) < len(whole) / 2
    assert texts(page, ".more") == [f"show all {len(whole):,} characters"]
    page.point(".more", click=True)
    assert texts(page, "article:nth-of-type(2) .block > span")[1] == whole
    page.point(".more", click=True)
    assert len(texts(page, "article:nth-of-type(2) .block > span")[1]) < len(whole) / 2


def test_the_columns_are_explained(browser: Browser, thoughts: Path):
    page = browser.open(thoughts)
    heads = page.ask(
        "[...document.querySelectorAll('article:nth-of-type(1) thead .number')].map((head) => head.title)"
    )
    assert all(heads)
    assert heads[0].startswith("critic's score of the thought")
    assert texts(page, ".numbers dt") == [*"SP", "Ŝ", *"EQCRVYA"]


def test_samples_without_numbers_have_no_table(browser: Browser, tmp_path: Path):
    page = browser.open(write_report(write_run(tmp_path / "run", steps=3).path))
    assert count(page, "article .segments, .why, .numbers") == 0
    assert count(page, "article .text") > 0
    assert page.ask("document.getElementById('tree').hidden")
    page.point(".to-tree", click=True)
    assert not page.ask("document.getElementById('tree').hidden")
    assert page.ask("document.activeElement.id") == "tree-title"
    assert lines(page) == ["1 completion"] * 4
    assert page.problems == []


def test_a_tree_unfolds_and_folds_one_span_and_all(browser: Browser, trees: Path):
    page = browser.open(trees)
    assert texts(page, "#tree-row option") == ["row 1, 84 spans", "row 2, 276 spans", "row 3, 7 spans"]
    assert lines(page).count("1 thought") == 4
    assert lines(page).count("2 thought") == 16
    assert "3 answer" not in lines(page)
    assert count(page, ".tree .siblings") == 1 + 4 + 16
    assert set(texts(page, ".tree .siblings > .about")) == {"group of 4"}
    page.point(".children .item .fold-mark", click=True)
    assert lines(page).count("3 answer") == 4
    page.point(".children .item .fold-mark", click=True)
    assert "3 answer" not in lines(page)
    page.point("#tree-unfold", click=True)
    assert len(lines(page)) == 84
    page.point("#tree-fold", click=True)
    assert lines(page) == ["1 thought"] * 4
    assert page.problems == []


def test_a_large_tree_starts_short_and_unfolds_whole(browser: Browser, trees: Path):
    page = browser.open(trees)
    choose(page, row=1)
    assert len(lines(page)) <= 40
    assert " of 48 right" in texts(page, ".tree .below")[0]
    page.point("#tree-unfold", click=True)
    assert len(lines(page)) == 276
    assert page.problems == []


def choose(page: Page, **chosen: int) -> None:
    for name, value in chosen.items():
        page.ask(
            f"(({{ownerDocument: all}}) => {{ const list = all.getElementById('tree-{name}'); list.value = '{value}';"
            " list.dispatchEvent(new Event('change')); })(document.body)"
        )


def test_the_tree_by_keyboard(browser: Browser, trees: Path):
    page = browser.open(trees)
    page.ask("document.getElementById('tree-fold').focus()")
    page.press("Tab")
    assert focused(page) == [1, 0]
    page.press("ArrowLeft", "ArrowDown")
    assert focused(page) == [1, 1]
    page.press("ArrowUp", "ArrowRight", "ArrowRight")
    assert focused(page) == [2, 0]
    page.press("ArrowRight", "ArrowRight", "End")
    assert focused(page) == [2, 3]
    page.press("ArrowLeft")
    assert focused(page) == [1, 3]
    page.press("Home")
    assert focused(page) == [1, 0]
    assert count(page, ".tree .detail") == 0
    page.press("Enter")
    assert count(page, ".tree .detail") == 1
    page.press(" ")
    assert count(page, ".tree .detail") == 0
    page.press("ArrowRight", "ArrowDown")
    assert count(page, ".tree .item[tabindex='0']") == 1
    page.point("#tree-fold", click=True)
    page.press("Tab")
    assert focused(page) == [1, 0]
    page.press("Tab")
    assert not page.ask("document.activeElement.matches('.item')")


def test_the_path_that_a_chain_was_grown_along_is_marked_and_texts_open_whole(browser: Browser, trees: Path):
    page = browser.open(trees)
    choose(page, row=2)
    assert lines(page) == [*["1 thought"] * 3, *["2 thought"] * 3, "3 answer"]
    assert texts(page, ".survived > .line .span-kind") == ["1 thought", "2 thought", "3 answer"]
    assert "grown along" in texts(page, "#tree-about")[0]
    assert count(page, ".survived ~ .item") == 0
    assert len(texts(page, ".tree .block")[0]) <= 200
    assert "(empty)" in texts(page, ".tree .block")
    page.point(".tree .item .block", click=True)
    shown = texts(page, ".tree .block")[0]
    assert shown.startswith("</script><script>alert(1)</script>")
    assert shown.endswith(LONG)
    assert "tokens" in texts(page, ".tree .detail")[0]
    page.point(".tree .item .span-kind", click=True)
    assert len(texts(page, ".tree .block")[0]) <= 200
    assert count(page, ".tree script, .tree img") == 0
    choose(page, step=0)
    assert texts(page, "#tree-row option") == ["row 3, 7 spans"]
    assert page.problems == []


@pytest.mark.parametrize("width", [400, 1280])
def test_keys_of_a_row_stand_beside_or_above_their_values(browser: Browser, parts: Path, width: int):
    page = browser.open(parts, width=width)
    assert texts(page, "#step-samples .prompt[open] .message > span") == ["user", "reference_answer"]
    assert texts(page, "#step-samples .prompt[open] .message > div") == [ASKED, "A"]
    apart = page.ask(
        "[...document.querySelectorAll('.message')].filter((each) => { const key = document.createRange(); "
        "key.selectNodeContents(each.firstChild); const at = key.getBoundingClientRect(), value = "
        "each.lastChild.getBoundingClientRect(); return at.right <= value.left || at.bottom <= value.top + 1; }).length"
    )
    assert apart == count(page, ".message")


@pytest.fixture(scope="module")
def wide_numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with charts of long titles, numbers of many digits, and numbers next to 0."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", steps=1, evaluate=False)
    record = {**THOUGHT_METRICS, "engine_gap_mean": 0.008948, "engine_gap_max": 12.3456}
    with folder:
        for step in (2, 3):
            variance = -0.0002 * (step - 2)
            changed = {"value_explained_variance": variance, "critic_agreement": 7.495e-18}
            folder.append_metrics({"step": step, "stage": "train", **record, **changed})
    return write_report(folder.path)


@pytest.mark.parametrize("width", [400, 1152, 1200, 1280])
def test_no_head_of_a_chart_runs_out_of_its_card_or_into_the_other_half(
    browser: Browser, wide_numbers: Path, parts: Path, width: int
):
    for path in (wide_numbers, parts):
        page = browser.open(path, width=width)
        out = page.ask(
            "[...document.querySelectorAll('.chart')].filter((card) => { const text = (selector) => { const range = "
            "document.createRange(); range.selectNodeContents(card.querySelector(selector)); return range"
            ".getBoundingClientRect(); }, title = text('.term'), unit = text('.unit'), value = text('.readout'), "
            "whole = card.getBoundingClientRect(), left = Math.max(title.right, unit.right), "
            "below = value.top >= unit.bottom - 2; return Math.max(left, value.right) > whole.right "
            "|| (left > value.left && !below); }).map((card) => card.querySelector('.term').textContent)"
        )
        assert out == []


def test_numbers_next_to_0_have_no_sign_and_ticks_differ(browser: Browser, wide_numbers: Path):
    page = browser.open(wide_numbers)
    told = dict(
        page.ask(
            "[...document.querySelectorAll('.chart')].map((card) => [card.querySelector('.term').textContent, "
            "[card.querySelector('.readout b').textContent, "
            "[...card.querySelectorAll('text[text-anchor=end]')].map((each) => each.textContent)]])"
        )
    )
    value, ticks = told["Value model"]
    assert value == "0.0 %"
    percent = [tick for tick in ticks if tick.endswith("%")]
    assert len(set(percent)) == len(percent) >= 3
    assert "0.000 %" in percent or "0.00 %" in percent
    assert told["Critic and grader"][0] == "0"
    assert all("-0 %" not in ticks for _, ticks in told.values())


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, thoughts: Path, trees: Path, width: int, dark: bool
):
    for path in (thoughts, trees):
        page = browser.open(path, width=width, dark=dark)
        page.ask("document.getElementById('tree-unfold').click()") if path == trees else None
        assert page.ask("document.documentElement.scrollWidth") == width
        wide = (
            "[...document.querySelectorAll('.block, .number, .credit, .line, .tip')]"
            ".filter((each) => each.getBoundingClientRect().right > innerWidth).length"
        )
        assert page.ask(wide) == 0
        assert page.problems == []
