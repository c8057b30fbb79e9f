"""First lines of the warm parent: `python start.py DESCRIPTOR SETTINGS`.

Makes the package `graft` out of this folder alone, so that the modules have the same names inside the sandbox as
outside, and nothing else of graft is loaded.
"""

import json
import sys
import types
from pathlib import Path


def start() -> None:
    """Serve until graft closes the socket."""
    settings = json.loads(sys.argv[2])
    sys.path += settings["packages"]
    for name in ("graft", "graft.grading", "graft.grading.sandbox"):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = []
    sys.modules["graft.grading.sandbox"].__path__ = [str(Path(__file__).parents[1])]

    from graft.grading.sandbox.inside.warm import main

    for name in [name for name in sys.modules if name.partition(".")[0] == "graft"]:
        del sys.modules[name]
    main(int(sys.argv[1]), settings)


if __name__ == "__main__":
    start()
