"""The base of every section of the settings tree. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: nothing unknown, no number that is not finite, nothing changed after checking."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # tables that are passed on, like `data.options`, may hold any number
    )


def tag_of(kind: type[BaseModel]) -> str:
    """The key that chooses this kind of section where there are several: `name`, or `type`."""
    return next(key for key in ("name", "type") if key in kind.model_fields)
