"""What every section of charkha.yaml is."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Name = Annotated[str, Field(min_length=1)]  # of a file, folder or model
_LARGEST_WHOLE, _LARGEST_FRACTION = 10**18, 1e36  # what 64 bits count, and what fp32 holds with products to spare


class Section(BaseModel):
    """Frozen; an unknown key is an error, a number is never made out of a string and is always finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_counted_with(cls, value: Any) -> Any:
        """Whole numbers have no end in YAML, but products of them and of fractions have."""
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,):
            largest = _LARGEST_FRACTION if isinstance(number, float) else _LARGEST_WHOLE
            if isinstance(number, (int, float)) and abs(number) > largest:
                raise ValueError(f"a number of {len(str(int(number)))} digits is beyond any use")
        return value
