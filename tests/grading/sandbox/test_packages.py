"""Which packages a source names, and that OpenAI's are there."""

from __future__ import annotations

import importlib.util

import pytest

from graft.grading.sandbox.packages import PACKAGES, packages_in
from tests.grading.sandbox.sandboxes import grader, open_sandbox


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
        ("import numpy as np\nnp.random.rand()", "numpy numpy.random"),
        ("import random, numpy", "random numpy numpy.random"),
        ("import random\nimport statistics", "random statistics"),
        ("randomly = 1\nimport numpy", "numpy"),
        ("\x00\ud800import numpy\nimport " + "," * 100_000, ""),
    ],
)
def test_names_by_hand(source, names):
    assert packages_in(source) == set(names.split())


def test_an_ordinary_grader_runs_nothing_after_the_fork():
    """`random` would seed itself and `threading` make new locks in every call."""
    source = grader(
        "import sys\nreturn sum(name in sys.modules for name in ('random', 'threading', 'tempfile'))"
    )
    with open_sandbox() as fresh:
        [result] = fresh.run_grade(source, [({}, {})])
    assert result.value == 0.0


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_can_be_imported_inside(sandbox, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; it comes with the extra 'python-graders'")
    source = f"import {name}, sys\nloaded = set(sys.modules)\nimport {', '.join(PACKAGES[name])}\n"
    source += f"def grade(sample, item):\n    assert {list(PACKAGES[name])!r}[-1] in loaded\n    return 1.0"
    [result] = sandbox.run_grade(source, [({}, {})])
    assert (result.value, result.reason) == (1.0, "")
