"""A JSON decoder that collects in `faults` what Python's own lets pass: NaN, infinities, repeated keys."""

from __future__ import annotations

import json
import math

WHITESPACE = " \t\r\n"


class StrictJson:
    """Decodes values out of a text. Not safe for use by two threads at once."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode_at(self, text: str, start: int) -> tuple[object, int]:
        """The value at `start` and the place after it; `faults` is of this value. Raises ValueError with the reason."""
        self.faults.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            self.faults.append(f"repeated key: {', '.join(twice)} stands twice in one object")
        return result

    def _constant(self, name: str) -> None:
        self.faults.append(f"broken JSON: {name} is not a JSON value")

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.faults.append(f"broken JSON: the number {digits[:20]} is too large")
        return value


def skip_whitespace(text: str, position: int) -> int:
    """The first place from `position` on that is no JSON white space."""
    while position < len(text) and text[position] in WHITESPACE:
        position += 1
    return position


def json_reason(error: ValueError) -> str:
    """Why the text is not JSON, with the column where that is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)


def json_type(value: object) -> str:
    """What JSON calls the value's type: `string`, `number`, `object`, ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: dict[type, str] = {str: "string", int: "number", float: "number", dict: "object", list: "array"}
    return names.get(type(value), type(value).__name__)
