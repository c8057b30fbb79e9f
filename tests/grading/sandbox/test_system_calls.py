"""The system call filter, run by a simulator of the kernel's; and the numbers against the kernel's own headers."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from graft.grading.sandbox.inside.system_calls import FORBIDDEN, MACHINES, filter_program

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}


def decide(machine: str, number: int, first_argument: int = 0, *, audit: int | None = None) -> int:
    """What the kernel would do: linux/filter.h, classic BPF over struct seccomp_data."""
    data = struct.pack(
        "=IIQQ", number & 0xFFFFFFFF, AUDIT[machine] if audit is None else audit, 0, first_argument
    )
    program = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    at, word = 0, 0
    while True:
        operation, yes, no, value = program[at]
        at += 1
        match operation:
            case 0x20:
                [word] = struct.unpack_from("=I", data, value)
            case 0x15:
                at += yes if word == value else no
            case 0x35:
                at += yes if word >= value else no
            case 0x45:
                at += yes if word & value else no
            case 0x06:
                return value
            case _:
                raise AssertionError(f"operation {operation:#x}")


NUMBERS = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "clone": 56,
        "clone3": 435,
        "socket": 41,
        "socketpair": 53,
        "fork": 57,
        "mmap": 9,
    },
    "aarch64": {
        "read": 63,
        "write": 64,
        "clone": 220,
        "clone3": 435,
        "socket": 198,
        "socketpair": 199,
        "mmap": 222,
    },
}


@pytest.mark.parametrize("machine", list(MACHINES))
def test_every_number_is_decided_as_listed(machine):
    forbidden = {numbers[MACHINES[machine]] for numbers in FORBIDDEN.values()}
    special = {NUMBERS[machine][name] for name in ("clone", "clone3", "socket", "socketpair")}
    for number in range(600):
        if number not in special:
            assert decide(machine, number) == (EPERM if number in forbidden else ALLOW), number


@pytest.mark.parametrize("machine", list(MACHINES))
def test_arguments_decide_about_sockets_and_processes(machine):
    socket, clone = NUMBERS[machine]["socket"], NUMBERS[machine]["clone"]
    for call in (socket, NUMBERS[machine]["socketpair"]):
        assert {family for family in range(50) if decide(machine, call, family) == ALLOW} == {1}
    assert decide(machine, socket, 1 << 32 | 1) == ALLOW  # the kernel takes the lower half, an int
    assert decide(machine, socket, 1 << 32 | 2) == EPERM
    assert decide(machine, clone, 17) == ALLOW  # fork()
    assert decide(machine, clone, 0x003D0F00) == ALLOW  # a thread
    for name in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(machine, clone, name | 17) == EPERM
    assert decide(machine, NUMBERS[machine]["clone3"]) == ENOSYS


@pytest.mark.parametrize("machine", list(MACHINES))
def test_another_set_of_calls_is_not_a_way_around(machine):
    for audit in (0x40000003, 0x40000028, 0xC00000B7, 0xC000003E):  # i386, arm, and the two
        if audit != AUDIT[machine]:
            assert decide(machine, NUMBERS[machine]["read"], audit=audit) == KILL
    assert decide(machine, 0x40000000 | 41, 2) == ENOSYS
    assert decide(machine, -1) == ENOSYS


def test_an_unknown_processor_has_no_filter():
    with pytest.raises(KeyError):
        filter_program("riscv64")


@pytest.mark.parametrize("machine", list(MACHINES))
def test_the_numbers_are_the_kernels(machine):
    header, line = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"the kernel's headers are not installed: {header}")
    listed = {match[1]: int(match[2]) for match in re.finditer(line, header.read_text())}
    for name, numbers in FORBIDDEN.items():
        if numbers[MACHINES[machine]] is not None and (name in listed or numbers[MACHINES[machine]] < 440):
            assert numbers[MACHINES[machine]] == listed[name], name  # newer ones an old header may lack
    for name, number in NUMBERS[machine].items():
        assert number == listed[name]
