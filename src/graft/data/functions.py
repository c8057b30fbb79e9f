"""People's own functions, named in settings as `package.module:function` or `file.py:function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from graft.errors import ConfigError


def load_function(reference: str, base: Path) -> Callable[..., Any]:
    """Import the function that a reference names.

    A file is imported under a name of its own, made from its path and contents, so that files with the same
    name do not meet and a changed file is imported anew; loading it twice runs it once.

    Args:
        reference: `package.module:function`, or `file.py:function` with the file relative to `base`.
        base: the config's folder.

    Raises:
        ConfigError: malformed reference, no such file, module or function (names the nearest), the import
            fails, or what is named cannot be called.
    """
    module_name, separator, function_name = reference.rpartition(":")
    if not separator or not module_name or not function_name.isidentifier():
        raise ConfigError(
            f"{reference!r} names no function; wants 'file.py:function' or 'package.module:function'."
        )
    is_file = module_name.endswith(".py")
    module = _import_file(base / Path(module_name).expanduser()) if is_file else _import_module(module_name)
    if not hasattr(module, function_name):
        names = [
            name for name, value in vars(module).items() if callable(value) and not name.startswith("__")
        ]
        near = difflib.get_close_matches(function_name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(names)) or 'none'}."
        raise ConfigError(f"{reference!r}: {module_name} has no function {function_name!r}; {hint}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ConfigError(f"{reference!r} is a {type(function).__name__}; wants a function.")
    return function


def _import_file(path: Path) -> ModuleType:
    try:
        contents = path.read_bytes()
    except OSError as error:
        others = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, others, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.{hint}") from None
    digest = hashlib.blake2b(str(path.resolve()).encode() + b"\0" + contents, digest_size=8).hexdigest()
    name = f"graft_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # before running it: dataclasses and pickle look their module up
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{path}: importing it fails: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = ". Install it, or name a file: 'file.py:function'"
        raise ConfigError(f"{name}: importing it fails: {type(error).__name__}: {error}{advice}") from error
