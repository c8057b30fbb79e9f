"""Measurements against other projects: `python -m benchmarks.engine`, `python -m benchmarks.step`.

Every side runs in a process of its own (`side.py` is what they share, and imports nothing but the standard
library, so that a peer's own environment can run it). `harness.py` starts them and takes turns between them.
"""
