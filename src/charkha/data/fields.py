"""The fields of one record, each asked for by name and type."""

from __future__ import annotations

import json
from typing import cast

from charkha.data.strict_json import json_type

Fields = dict[str, object]


class RowFault(Exception):
    """The row being read has this problem. `validate.read_row` turns it into one; it reaches no further."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def optional_text(fields: Fields, name: str, *, required: bool = False) -> str:
    """The field's text; null and, unless required, a missing field are the empty text."""
    if required and name not in fields:
        raise RowFault(name, "missing field")
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(name, f"wrong type: {json_type(value)} where text is needed")
    return clean(value, name)


def answer_text(fields: Fields, name: str) -> str:
    """The field's text, which must hold more than white space."""
    answer = optional_text(fields, name, required=True)
    if not answer.strip():
        raise RowFault(name, "missing answer: it is empty" if not answer else "missing answer: it is only white space")
    return answer


def clean(text: str, field: str) -> str:
    """The text itself if it can be written as UTF-8, which tokenizers need."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RowFault(field, f"half a character: {code} without its other half at character {error.start}") from None
    return text


def list_field(fields: Fields, name: str) -> list[object]:
    """The field's array, not empty; a CSV cell may hold it as JSON text."""
    if name not in fields:
        raise RowFault(name, "missing field")
    value = fields[name]
    if isinstance(value, str):
        value = parsed_list(value, name)
    if not isinstance(value, list):
        raise RowFault(name, f"wrong type: {json_type(value)} where an array of messages is needed")
    if not value:
        raise RowFault(name, "no messages: the array is empty")
    return value


def parsed_list(text: str, name: str) -> object:
    """What the JSON text holds."""
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError):
        raise RowFault(name, "wrong type: string where an array is needed, and it is not JSON") from None


def label_field(fields: Fields, name: str) -> bool:
    """A label: true or false, 1 or 0, or one of the words a table may hold."""
    value = fields.get(name)
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, 1, "true", "1", "yes", "chosen", "good"):
        return True
    if word in (False, 0, "false", "0", "no", "rejected", "bad"):
        return False
    raise RowFault(name, f"wrong value: the label is true or false, not {str(value)[:40]!r}")
