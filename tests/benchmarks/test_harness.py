"""The figures that a report is made of, worked by hand, and the talk between harness and side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import engine, harness, step
from benchmarks.harness import Side, SideFailed, ratio, spread, table, take_turns
from benchmarks.side import peak_memory_gb
from benchmarks.workload import questions, rewards

SIDE = """
import sys
from benchmarks.side import serve

def prepare(settings):
    print("this goes to standard error")
    if settings.get("broken"):
        raise RuntimeError("no such model")
    turns = iter(range(100))
    return {"prompt_tokens": [3]}, lambda case: {"seconds": 1.0 + next(turns), "tokens": 8}

serve(prepare)
"""


@pytest.fixture
def side_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that stands for a side and answers at once."""
    (tmp_path / "stand_in_side.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in_side"


def test_sides_take_turns_and_keep_what_is_no_warm_up(side_module: str) -> None:
    with (
        Side("a", side_module, {}, python=sys.executable) as a,
        Side("b", side_module, {}, python=sys.executable) as b,
    ):
        take_turns([a, b], ["full", "sparse"], 2)
    assert a.about["prompt_tokens"] == [3]
    assert a.about["peak_memory_gb"] > 0
    for side in (a, b):
        assert [r["case"] for r in side.records] == ["full", "sparse", "full", "sparse"]
        assert [r["seconds"] for r in side.records] == [2.0, 3.0, 4.0, 5.0]  # 1.0 was the warm-up


def test_a_side_that_dies_tells_why(side_module: str) -> None:
    with pytest.raises(SideFailed, match="no such model"):
        Side("a", side_module, {"broken": True}, python=sys.executable)


def test_spread_and_ratio() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    # medians 10 and 4; rounds 8/4, 10/2, 12/6
    assert ratio([8.0, 10.0, 12.0], [4.0, 2.0, 6.0]) == {"median": 2.5, "low": 2.0, "high": 5.0}


def test_table_aligns() -> None:
    assert table(["side", "s"], [["a", "1.5"], ["longer", "10"]]).splitlines() == [
        "side      s",
        "------  ---",
        "a       1.5",
        "longer   10",
    ]


def test_all_sides_get_the_same_work() -> None:
    assert questions(3) == questions(8)[:3]
    full, sparse = rewards(8, 8, sparse=False), rewards(8, 8, sparse=True)
    assert len(full) == len(sparse) == 64
    assert all(len(set(full[i : i + 8])) == 8 for i in range(0, 64, 8))
    assert sparse[:24] == [1.0] * 24  # 3 of 8 groups without signal
    assert sparse[24:] == full[24:]


def test_peak_memory_is_this_process_own() -> None:
    peak = peak_memory_gb()
    assert peak is None or 0.01 < peak < 1000


def engine_records() -> dict[str, list[dict[str, float]]]:
    """64 tokens in the seconds given, two turns."""
    seconds = {
        "hf bf16": (4.0, 4.0),
        "generic bf16": (1.0, 2.0),
        "fast bf16": (0.5, 1.0),
        "hf fp32": (2.0, 2.0),
        "generic fp32": (1.0, 1.0),
        "fast fp32": (0.5, 0.5),
    }
    return {
        name: [{"seconds": s, "cpu_seconds": 2 * s, "tokens": 64, "peak_memory_gb": 1.0} for s in own]
        for name, own in seconds.items()
    }


def test_engine_ratios_by_hand() -> None:
    records = engine_records()
    about = {name: {"prompt_tokens": [5, 5], "kernels": "some"} for name in records}
    summary = engine.summarise(records, about)
    assert summary["peer_fastest"] == "hf fp32"
    # generic bf16: 64 and 32 tokens/s, median 48, against 16 and 32 tokens/s
    assert summary["ratios"]["ratio_generic"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert summary["ratios"]["ratio_generic_against_fastest"]["median"] == 1.5
    assert summary["ratios"]["ratio_fast"]["median"] == 6.0
    assert summary["ratios"]["ratio_fast_fp32"]["median"] == 4.0
    assert summary["sides"]["fast bf16"]["tokens_per_second"] == {"median": 96.0, "low": 64.0, "high": 128.0}
    text = engine.as_text(report_around(summary))
    assert "ratio_fast " in text
    assert "hf fp32" in text


def test_unequal_work_is_refused() -> None:
    records = engine_records()
    about = {name: {"prompt_tokens": [5]} for name in records}
    about["hf bf16"] = {"prompt_tokens": [6]}
    with pytest.raises(ValueError, match="prompts of different lengths"):
        engine.summarise(records, about)
    records["hf bf16"][0]["tokens"] = 60
    with pytest.raises(ValueError, match="different numbers of tokens"):
        engine.summarise(records, about)


STEP_SECONDS = {
    step.PEER: {"full": (60.0, 80.0), "sparse": (66.0,)},
    step.OWN: {"full": (10.0, 10.0), "sparse": (6.0,)},
    step.OWN_LOW: {"full": (20.0, 20.0), "sparse": (12.0,)},
    step.PEER_FP32: {"full": (40.0, 40.0), "sparse": (36.0,)},
}
STEP_MEMORY = {step.PEER: 5.0, step.OWN: 4.0, step.OWN_LOW: 3.0, step.PEER_FP32: 8.0}


def step_summary(*names: str) -> dict[str, object]:
    """Of the sides named, from the seconds above."""
    records = {
        name: [
            {
                "case": case,
                "seconds": seconds,
                "cpu_seconds": 2 * seconds,
                "tokens": 2560,
                "peak_memory_gb": STEP_MEMORY[name],
                "parts": {"sample": 2.0, "update": 7.0} if name.startswith("graft") else {},
                "tokens_computed": 2896,
            }
            for case in step.CASES
            for seconds in STEP_SECONDS[name][case]
        ]
        for name in names
    }
    about = {name: {"prompt_tokens": [50], "kernels": "some"} for name in names}
    return step.summarise(records, about, {"off": 60.0, "on": 80.0})


def test_step_ratios_by_hand() -> None:
    summary = step_summary(*STEP_SECONDS)
    ratios, memory = summary["ratios"], summary["memory_ratios"]
    assert isinstance(ratios, dict)
    assert isinstance(memory, dict)
    assert ratios["ratio_full"] == {"median": 7.0, "low": 6.0, "high": 8.0}
    assert ratios["ratio_sparse"]["median"] == 11.0
    assert ratios["ratio_full_low"]["median"] == 3.5
    assert summary["cpu_ratios"] == {
        name: ratios[name] for name in ("ratio_full", "ratio_sparse", "ratio_full_low", "ratio_sparse_low")
    }
    assert summary["peer_fastest"] == step.PEER_FP32
    assert ratios["ratio_full_against_fastest"]["median"] == 4.0
    assert ratios["ratio_sparse_against_fastest"]["median"] == 6.0
    assert memory == {
        "memory_ratio": 0.8,
        "memory_ratio_low": 0.6,
        "memory_ratio_against_fastest": 0.5,
        "memory_ratio_low_against_fastest": 0.375,
    }
    text = step.as_text(report_around(summary))
    assert all(name in text for name in step.TARGETS)
    assert "off 60.0 s" in text


def test_step_without_the_peer_in_fp32() -> None:
    summary = step_summary(step.PEER, step.OWN, step.OWN_LOW)
    assert summary["peer_fastest"] is None
    assert set(summary["memory_ratios"]) == {"memory_ratio", "memory_ratio_low"}  # pyright: ignore[reportArgumentType]
    assert "not measured" in step.as_text(report_around(summary))


def report_around(summary: dict[str, object]) -> dict[str, object]:
    """What `main` puts around a summary."""
    return {
        "command": "python -m benchmarks.step",
        "machine": harness.machine(),
        "environment": harness.environment(),
        "notes": ["a note"],
        "settings": {"prompts": 8, "samples": 8, "new_tokens": 40, "repeats": 2},
        **summary,
    }


@pytest.mark.parametrize("benchmark", [engine, step])
def test_the_options_of_both_benchmarks(benchmark) -> None:
    options = benchmark.parse(["--json", "--prompts", "3"])
    assert (options.json, options.prompts, options.samples) == (True, 3, 8)
    assert (options.repeats, options.new_tokens) == ((5, 64) if benchmark is engine else (3, 40))


def test_a_report_is_printed_as_tables_or_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = harness.report_of(
        "engine",
        ["--json"],
        machine={"cores": 2},
        settings={"prompts": 8},
        notes=["a note"],
        figures={"ratios": {"ratio_fast": 3.0}},
    )
    assert report["command"] == "python -m benchmarks.engine --json"
    harness.publish(report, "the tables", as_json=True)
    said = capsys.readouterr()
    assert said.err == "the tables\n"
    assert json.loads(said.out) == report
    assert json.loads(said.out)["ratios"] == {"ratio_fast": 3.0}
    harness.publish(report, "the tables", as_json=False)
    assert capsys.readouterr() == ("the tables\n", "")
