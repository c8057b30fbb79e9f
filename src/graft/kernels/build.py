"""Compiles the native kernels at first use and keeps the result in a cache.

The library lies in `<cache>/kernels/<key>/kernels.so`; the key is a hash of the sources, the compiler's
version, its flags and the CPU's flags, so that a changed source, compiler or machine builds its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from graft.platform import CpuFacts

SOURCE_FOLDER = Path(__file__).parent / "source"

COMPILERS = ("g++", "clang++")
"""g++ first: its OpenMP runtime is the one that torch's Linux wheels bring along, so both share one pool."""

FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-w")
"""No contraction and no fast-math: what is fused is written as fused, whatever the compiler would prefer."""

DIGEST_BYTES = 32
BUILD_LIMIT_S = 300


class BuildError(Exception):
    """The kernels cannot be built here; the message says why. Callers turn it into a reason."""


def cache_folder() -> Path:
    """`$GRAFT_CACHE`, or `~/.cache/graft`."""
    setting = os.environ.get("GRAFT_CACHE")
    return Path(setting) if setting else Path.home() / ".cache" / "graft"


def find_compiler() -> str:
    """`$CXX`, or the first known C++ compiler on the path."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler: looked for {wanted or ' and '.join(COMPILERS)}; install g++ or set CXX"
    )


def build(cpu: CpuFacts) -> Path:
    """Path of the library for this machine, from the cache if it is there and whole."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpu.avx512:
        raise BuildError("the native kernels need an x86-64 CPU with AVX-512 (F, BW, DQ and VL) on Linux")
    compiler = find_compiler()
    sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
    library = cache_folder() / "kernels" / build_key(compiler, cpu) / "kernels.so"
    if not is_whole(library):
        compile_library(compiler, sources, library)
    return library


def build_key(compiler: str, cpu: CpuFacts) -> str:
    """Hash of everything that the compiled library depends on."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (compiler_version(compiler), *FLAGS, cpu.model_name, *sorted(cpu.flags)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


def compiler_version(compiler: str) -> str:
    """What the compiler says about itself."""
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version: {error}") from error
    if done.returncode:
        raise BuildError(
            f"{compiler} --version ended with status {done.returncode}: {done.stderr.strip()[:200]}"
        )
    return done.stdout


def is_whole(library: Path) -> bool:
    """Whether the file is there and ends in the digest of the rest.

    The loader ignores the digest behind the last section. Loading a damaged library could kill the process.
    """
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def compile_library(compiler: str, sources: list[Path], library: Path) -> None:
    """Compile into a temporary file and rename it: a second process sees the whole library or none."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name
            command = [compiler, *FLAGS, *map(str, sources), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S)
            if done.returncode:
                raise BuildError(f"{compiler} could not compile the kernels: {done.stderr.strip()[:500]}")
            content = fresh.read_bytes()
            fresh.write_bytes(content + hashlib.sha256(content).digest())
            fresh.replace(library)
    except OSError as error:
        raise BuildError(
            f"cannot build in {library.parent}: {error}. Set GRAFT_CACHE to a folder to write in"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} took more than {BUILD_LIMIT_S} s to compile the kernels") from error
