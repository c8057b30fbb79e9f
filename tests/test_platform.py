"""CPU facts from stored `/proc/cpuinfo` texts, and torch's bf16 products under the guard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.platform import (
    ONEDNN_CAP,
    ONEDNN_CAP_VARIABLES,
    OPENMP_SPIN_COUNT,
    CpuFacts,
    guard_onednn,
    limit_openmp_spinning,
    parse_cpuinfo,
    read_cpu,
)

AVX512 = "fpu sse2 avx2 fma avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni"


def cpuinfo(model: str, level: int, flags: str) -> str:
    one = f"processor\t: 0\nmodel name\t: {model}\nfpu\t\t: yes\ncpuid level\t: {level}\nflags\t\t: {flags}\n"
    return one + "bugs\t\t: spectre_v1\n\n" + one.replace("processor\t: 0", "processor\t: 1")


SAPPHIRE_VM = cpuinfo("Intel(R) Xeon(R) Processor", 28, f"{AVX512} amx_bf16 amx_tile amx_int8")
SAPPHIRE_METAL = cpuinfo("Intel(R) Xeon(R) Platinum 8488C", 31, f"{AVX512} amx_bf16 amx_tile amx_int8")
ZEN4 = cpuinfo("AMD EPYC 9R14", 16, AVX512)
AVX2 = cpuinfo("Intel(R) Core(TM) i7-8700", 22, "fpu sse2 avx avx2 fma")
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\n\n"


@pytest.mark.parametrize(
    ("text", "avx512", "amx", "hidden"),
    [
        (SAPPHIRE_VM, True, True, True),
        (SAPPHIRE_METAL, True, True, False),
        (ZEN4, True, False, False),
        (AVX2, False, False, False),
        (ARM, False, False, False),
        ("", False, False, False),
    ],
)
def test_facts_of_known_machines(text, avx512, amx, hidden):
    facts = parse_cpuinfo(text)
    assert (facts.avx512, facts.amx_bf16, facts.hides_amx_palette) == (avx512, amx, hidden)


def test_level_and_name_come_from_the_first_cpu():
    facts = parse_cpuinfo(SAPPHIRE_VM)
    assert facts.cpuid_level == 28
    assert facts.model_name == "Intel(R) Xeon(R) Processor"


def test_the_leaf_itself_is_enough():
    assert not parse_cpuinfo(cpuinfo("x", 0x1D, "amx_tile amx_bf16")).hides_amx_palette


def test_no_file_means_no_facts(tmp_path: Path):
    assert read_cpu(tmp_path / "missing") == CpuFacts()


def test_guard_caps_only_where_needed():
    environment: dict[str, str] = {}
    assert not guard_onednn(parse_cpuinfo(ZEN4), environment)
    assert environment == {}
    assert guard_onednn(parse_cpuinfo(SAPPHIRE_VM), environment)
    assert environment == {"ONEDNN_MAX_CPU_ISA": ONEDNN_CAP}


@pytest.mark.parametrize("name", ONEDNN_CAP_VARIABLES)
def test_guard_leaves_the_users_cap(name: str):
    environment = {name: "AVX2"}
    assert guard_onednn(parse_cpuinfo(SAPPHIRE_VM), environment)
    assert environment == {name: "AVX2"}


@pytest.mark.parametrize("torch_first", [False, True])
def test_bf16_products_survive_under_the_guard(torch_first: bool):
    guard = ["from graft.platform import guard_onednn", "guard_onednn()"]
    lines = ["import torch", *guard] if torch_first else [*guard, "import torch"]
    lines += [
        "x = torch.ones(64, 96, dtype=torch.bfloat16)",
        "assert torch.nn.functional.linear(x, x[:32]).unique().tolist() == [96.0]",
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ONEDNN_CAP_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("before", "spin_count"),
    [({}, OPENMP_SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_waits_as_the_user_says_or_shortly(before: dict[str, str], spin_count: str | None):
    limit_openmp_spinning(before)
    assert before.get("GOMP_SPINCOUNT") == spin_count
