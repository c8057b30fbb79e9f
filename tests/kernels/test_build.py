"""The build cache: shared by processes, repaired when damaged, and a reason wherever nothing can be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft.kernels import Kernels, load_kernels
from graft.kernels.build import BuildError, build, build_key, find_compiler, is_whole
from graft.platform import CpuFacts, read_cpu

REPORT = "from graft.kernels import load_kernels; print(getattr(found := load_kernels(), 'path', found))"


@pytest.fixture
def library() -> Path:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(f"no native kernels here: {found}")
    return found.path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    return tmp_path


def start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_two_processes_build_at_once(library: Path, cache: Path):
    # A slow compiler whose result is known: it writes half of it, waits for the other process, and goes on.
    compiler = script(
        cache / "cxx",
        'test "$1" = --version && exec echo 1.0\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'head -c 5000 {library} >"$2"; sleep 1; cp {library} "$2"',
    )
    both = [start(GRAFT_CACHE=str(cache), CXX=compiler) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    paths = {Path(out.strip()) for out, _ in said}
    assert len(paths) == 1
    built = paths.pop()
    assert built.parent.parent == cache / "kernels"
    assert is_whole(built)
    assert [path.name for path in built.parent.iterdir()] == ["kernels.so"]  # nothing half-done is left


def test_a_damaged_library_is_built_again(library: Path, cache: Path):
    cached = cache / "kernels" / library.parent.name / library.name
    cached.parent.mkdir(parents=True)
    content = library.read_bytes()
    cached.write_bytes(content[: len(content) // 2])
    assert not is_whole(cached)
    assert build(read_cpu()) == cached
    assert is_whole(cached)
    assert Kernels(cached).engines == Kernels(library).engines


def test_a_whole_library_is_used_as_it_is(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    cached = cache / "kernels" / library.parent.name / library.name
    cached.parent.mkdir(parents=True)
    shutil.copy(library, cached)
    before = cached.stat()
    assert build(read_cpu()) == cached
    assert (cached.stat().st_ino, cached.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_key_changes_with_compiler_and_cpu(tmp_path: Path):
    one = script(tmp_path / "one", "echo one 1.0")
    two = script(tmp_path / "two", "echo two 1.0")
    cpu = CpuFacts("a", frozenset({"avx512f"}), 20)
    assert build_key(one, cpu) == build_key(one, cpu)
    assert build_key(one, cpu) != build_key(two, cpu)
    assert build_key(one, cpu) != build_key(one, CpuFacts("a", frozenset({"avx512f", "amx_tile"}), 20))


def test_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAFT_KERNELS", "off")
    assert load_kernels() == "switched off by GRAFT_KERNELS"


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: looked for g\+\+ and clang\+\+"):
        find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="looked for no-such-compiler"):
        find_compiler()


def test_a_compiler_that_fails_gives_its_message_as_the_reason(library: Path, cache: Path, monkeypatch):
    broken = script(cache / "cxx", 'test "$1" = --version && exec echo 1.0\necho "out of order" >&2; exit 3')
    monkeypatch.setenv("CXX", broken)
    reason = load_kernels()
    assert isinstance(reason, str)
    assert "could not compile the kernels: out of order" in reason
    assert not list(cache.glob("kernels/*/*"))


def test_a_folder_that_cannot_be_written_gives_a_reason(library: Path, tmp_path: Path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(file))
    reason = load_kernels()
    assert isinstance(reason, str)
    assert "Set GRAFT_CACHE" in reason


def test_other_cpus_get_a_reason():
    with pytest.raises(BuildError, match="AVX-512"):
        build(CpuFacts("Intel(R) Core(TM) i7-8700", frozenset({"avx2", "fma"}), 22))
