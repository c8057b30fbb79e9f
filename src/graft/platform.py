"""Facts about the CPU, and two settings that must stand before torch computes anything.

Imports no torch: `graft/__init__.py` makes the settings before anything else can.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

AMX_PALETTE_LEAF = 0x1D
"""CPUID leaf that describes AMX's tiles. Software that asks for it where it is hidden reads palette 0."""

ONEDNN_CAP = "AVX512_CORE_BF16"
"""The best instruction set of oneDNN below AMX."""

ONEDNN_CAP_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""The variable that caps oneDNN's instruction set, by its present and its former name."""

OPENMP_SPIN_COUNT = "1000"
"""Rounds that a waiting OpenMP thread spins before it sleeps, about 0.1 ms; GNU's default is 300000."""


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """What the kernel says about the first CPU; empty on systems without `/proc/cpuinfo`."""

    model_name: str = ""
    flags: frozenset[str] = frozenset()
    """Instruction set extensions under their Linux names, e.g. `avx512_bf16`. Empty unless x86."""

    cpuid_level: int | None = None
    """The highest basic CPUID leaf, e.g. 28."""

    @property
    def avx512(self) -> bool:
        """Whether the AVX-512 subsets that the native kernels are written for are there."""
        return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= self.flags

    @property
    def amx_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 tiles. Linux grants their use to a process that asks for it."""
        return {"amx_tile", "amx_bf16"} <= self.flags

    @property
    def hides_amx_palette(self) -> bool:
        """Whether AMX is announced but the leaf that describes its tiles is not (some virtual machines)."""
        return self.amx_bf16 and self.cpuid_level is not None and self.cpuid_level < AMX_PALETTE_LEAF


def parse_cpuinfo(text: str) -> CpuFacts:
    """The facts about the first CPU in the text of `/proc/cpuinfo`."""
    fields: dict[str, str] = {}
    for line in text.split("\n\n", maxsplit=1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    level = fields.get("cpuid level", "")
    return CpuFacts(
        model_name=fields.get("model name", ""),
        flags=frozenset(fields.get("flags", "").split()),
        cpuid_level=int(level) if level.isdecimal() else None,
    )


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> CpuFacts:
    """The facts about this machine's CPU; no facts where the file does not exist."""
    try:
        return parse_cpuinfo(path.read_text())
    except OSError:
        return CpuFacts()


def guard_onednn(cpu: CpuFacts | None = None, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Keep oneDNN off AMX where it would die of it; returns whether the guard is needed here.

    oneDNN 3.12 (torch 2.13) believes the AMX flags, reads tile palette 0 from a CPUID leaf that some
    hypervisors hide, and the first bf16 product ends in SIGILL (oneDNN issue 5689). Capping its instruction
    set avoids that. A cap that the user has set stays.

    oneDNN reads the variable once, at the first operation that asks it for anything (an fp32 `linear` or a
    convolution is enough). So the guard still works when torch was imported before graft, but not when
    torch has already computed something with oneDNN.
    """
    if not (cpu or read_cpu()).hides_amx_palette:
        return False
    if not any(name in environment for name in ONEDNN_CAP_VARIABLES):
        environment[ONEDNN_CAP_VARIABLES[0]] = ONEDNN_CAP
    return True


def limit_openmp_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads that wait for others sleep soon, unless the user has said how they should wait.

    With GNU OpenMP's default a thread spins for tens of milliseconds. Where another program wants one of the
    CPUs it thereby keeps the very thread that it waits for from running. Measured on two CPUs beside other
    work: the products of a decoding step took 960 ms, and 25 to 45 ms with the shorter wait.

    The library reads the variable when it is loaded, which is when torch is imported: later it has no effect.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
