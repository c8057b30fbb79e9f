"""What every section of the settings is; imports nothing of graft, so that stages can have sections of their own."""

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
