"""Packages of OpenAI's python grader, and some of the standard library, that the warm parent imports when a source
names them.

A closed list: what a source says decides which of these are imported outside its own process, and nothing more.
"""

from __future__ import annotations

import re

PACKAGES = {
    "numpy": ("numpy",),
    "numpy.random": ("numpy.random",),  # apart, since each call seeds it anew
    "scipy": ("scipy", "scipy.stats", "scipy.spatial.distance"),
    "sympy": ("sympy", "sympy.parsing.sympy_parser"),
    "pandas": ("pandas",),
    "rapidfuzz": ("rapidfuzz", "rapidfuzz.fuzz", "rapidfuzz.process", "rapidfuzz.utils"),
    "sklearn": ("sklearn", "sklearn.metrics", "sklearn.metrics.pairwise", "sklearn.feature_extraction.text"),
    "rouge_score": ("rouge_score.rouge_scorer",),
    "deepdiff": ("deepdiff",),
    "jsonschema": ("jsonschema",),
    "pydantic": ("pydantic",),
    "yaml": ("yaml",),
    "nltk": ("nltk", "nltk.tokenize", "nltk.translate.bleu_score", "nltk.translate.meteor_score"),
    "sqlparse": ("sqlparse",),
    "rdkit": ("rdkit", "rdkit.Chem"),
    "skbio": ("skbio", "skbio.alignment"),
    "ast_grep_py": ("ast_grep_py",),
    # Of the standard library: what few graders use and what would make every call dearer.
    **{
        name: (name,)
        for name in ("asyncio", "logging", "random", "statistics", "subprocess", "tempfile", "threading")
    },
}
"""Name in an import -> modules that are imported with it."""

_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(?P<one>\w+)|import[ \t]+(?P<several>[\w., \t]+))", re.MULTILINE)
_RANDOM = re.compile(r"\brandom\b")


def packages_in(source: str) -> frozenset[str]:
    """Those of `PACKAGES` that a source imports. Reads lines; runs and parses nothing."""
    found: set[str] = set()
    for match in _IMPORT.finditer(source):
        names = [match["one"]] if match["one"] else match["several"].split(",")
        found |= {name.strip().partition(" ")[0].partition(".")[0] for name in names}
    if "numpy" in found and _RANDOM.search(source):
        found.add("numpy.random")
    return frozenset(found & PACKAGES.keys())
