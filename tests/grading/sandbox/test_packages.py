"""Which packages a source names, and that OpenAI's are there."""

from __future__ import annotations

import importlib.util

import pytest

from graft.grading.sandbox.packages import PACKAGES, packages_in


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("", ""),
        ("import numpy", "numpy"),
        ("import numpy as np, os, scipy.stats", "numpy scipy"),
        ("from sklearn.metrics import f1_score", "sklearn"),
        ("from  rapidfuzz import fuzz\nimport\tyaml", "rapidfuzz yaml"),
        ("def grade(s, i):\n    import pandas\n\treturn 1", "pandas"),
        ("# import numpy\nx = 'import scipy'", ""),
        ("import os, sys\nfrom . import numpy\nimport numpyx\nfrom numpy_financial import x", ""),
        ("import torch", ""),
        ("\x00\ud800import numpy\nimport " + "," * 100_000, ""),
    ],
)
def test_names_by_hand(source, names):
    assert packages_in(source) == set(names.split())


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_can_be_imported_inside(sandbox, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it comes with the extra 'python-graders'")
    source = f"import {name}, sys\nloaded = set(sys.modules)\nimport {', '.join(PACKAGES[name])}\n"
    source += f"def grade(sample, item):\n    assert {list(PACKAGES[name])!r}[-1] in loaded\n    return 1.0"
    [result] = sandbox.run_grade(source, [({}, {})])
    assert (result.value, result.reason) == (1.0, "")
