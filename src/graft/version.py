"""The version of the distribution `graft-rl`; `pyproject.toml` reads it from here."""

VERSION = "0.1.0.dev0"
