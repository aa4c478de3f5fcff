"""JSON Lines and JSON arrays to records, strictly: no NaN and no repeated key."""

from __future__ import annotations

import json
import math
from pathlib import Path

from charkha.data.decoding import DecodedText
from charkha.data.records import FileRecords, Record, blank_lines_note
from charkha.errors import DataError, Problem

_WHITESPACE = " \t\r\n"


class StrictJson:
    """A JSON decoder that collects what Python's own lets pass in `faults`."""

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


def read_json_file(path: Path, decoded: DecodedText) -> FileRecords:
    """Records of a .json, .jsonl or .ndjson file.

    What the file holds decides, not its name: an array is read as an array, one object a line as JSON Lines.
    Raises DataError for a single object in a .json file, which is no list of rows.
    """
    text = decoded.text
    start = _skip_whitespace(text, 0)
    named_lines = path.suffix.lower() != ".json"
    is_lines = _first_line_is_whole(text, start)
    if text.startswith("[", start) and not (named_lines and is_lines):
        note = ("the file holds one JSON array and was read as such",) if named_lines else ()
        return _read_array(decoded, start, note)
    if named_lines:
        return _read_lines(decoded, ())
    if is_lines:
        return _read_lines(decoded, ("the file holds one object a line and was read as JSON Lines",))
    return _read_single_value(path, decoded, start)


def _skip_whitespace(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _first_line_is_whole(text: str, start: int) -> bool:
    """Whether the first line is a value of its own and others follow, as in a JSON Lines file of arrays."""
    end = text.find("\n", start)
    if end < 0 or not text[end:].strip():
        return False
    try:
        _, stop = StrictJson().decode_at(text, start)
    except ValueError:
        return False
    return stop <= end


def _read_single_value(path: Path, decoded: DecodedText, start: int) -> FileRecords:
    """Raises DataError for one whole JSON value, which is no list of rows; one that is broken gives one problem."""
    if decoded.problems:
        return FileRecords("json", decoded.encoding, (), decoded.problems)
    text = decoded.text
    try:
        value, stop = StrictJson().decode_at(text, start)
        if text[stop:].strip(_WHITESPACE):
            raise json.JSONDecodeError("more text after the value", text, _skip_whitespace(text, stop))
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        return FileRecords("json", decoded.encoding, (), (Problem(f"broken JSON: {_reason(error)}", line),))
    raise _not_a_list(path, value)


def _not_a_list(path: Path, value: object) -> DataError:
    remedy = "write a JSON array of rows, or one row a line as .jsonl"
    if not isinstance(value, dict):
        return DataError(f"the file is one JSON {json_type(value)}, not a list of rows", where=str(path), remedy=remedy)
    lists = [name for name, part in value.items() if isinstance(part, list)]
    if len(lists) == 1:
        remedy += f"; the rows may be the list under the key {lists[0]!r}: save that list alone"
    keys = ", ".join(value) or "none"
    return DataError(
        f"the file is one JSON object, not a list of rows (its keys: {keys})", where=str(path), remedy=remedy
    )


def json_type(value: object) -> str:
    """What JSON calls the value's type: `string`, `number`, `object`, ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: dict[type, str] = {str: "string", int: "number", float: "number", dict: "object", list: "array"}
    return names.get(type(value), type(value).__name__)


def _read_lines(decoded: DecodedText, notes: tuple[str, ...]) -> FileRecords:
    decoder = StrictJson()
    records: list[Record] = []
    problems = list(decoded.problems)
    undecodable = {problem.line for problem in problems}
    blank = 0
    # Only "\n" ends a line: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(decoded.text.split("\n"), start=1):
        stripped = line.strip(_WHITESPACE)
        if stripped:
            _read_one_line(decoder, stripped, number, records, problems)
        elif number not in undecodable:
            blank += 1
    if decoded.text.endswith("\n"):
        blank -= 1  # the end of the last line is not a line
    problems.sort(key=lambda problem: problem.line or 0)
    return FileRecords("jsonl", decoded.encoding, tuple(records), tuple(problems), notes + blank_lines_note(blank))


def _read_one_line(decoder: StrictJson, line: str, number: int, records: list[Record], problems: list[Problem]) -> None:
    try:
        value, stop = decoder.decode_at(line, 0)
        if stop < len(line):
            raise ValueError(f"more text after the value (column {stop + 1})")
    except ValueError as error:
        problems.append(Problem(f"broken JSON: {_reason(error)}", number))
        return
    problems.extend(Problem(fault, number) for fault in decoder.faults)
    if not decoder.faults:
        records.append(Record(value, number))


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)


def _read_array(decoded: DecodedText, start: int, notes: tuple[str, ...]) -> FileRecords:
    """Each element is decoded on its own, so that it can be told by the line where it starts."""
    if decoded.problems:  # an array with a hole in it would be reported as broken JSON a second time
        return FileRecords("json", decoded.encoding, (), decoded.problems, notes)
    reader = _ArrayReader(decoded.text)
    try:
        reader.read(start + 1)
    except ValueError as error:
        reason = f"broken JSON: {_reason(error)}; nothing after this place was read"
        reader.problems.append(Problem(reason, reader.line_of_error(error)))
    return FileRecords("json", decoded.encoding, tuple(reader.records), tuple(reader.problems), notes)


class _ArrayReader:
    """Walks `[value, value, ...]` and counts lines on the way, once over the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.records: list[Record] = []
        self.problems: list[Problem] = []
        self._counted = 0
        self._line = 1

    def read(self, position: int) -> None:
        """Reads elements up to the closing bracket. Raises ValueError at the first place that is not JSON."""
        decoder = StrictJson()
        position = _skip_whitespace(self.text, position)
        if self.text.startswith("]", position):
            return self._expect_end(position + 1)
        while True:
            position = self._read_element(decoder, position)
            if self.text.startswith("]", position):
                return self._expect_end(position + 1)
            if not self.text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", self.text, position)
            position = _skip_whitespace(self.text, position + 1)

    def _read_element(self, decoder: StrictJson, start: int) -> int:
        value, stop = decoder.decode_at(self.text, start)
        line = self._line_at(start)
        self.problems.extend(Problem(fault, line) for fault in decoder.faults)
        if not decoder.faults:
            self.records.append(Record(value, line))
        return _skip_whitespace(self.text, stop)

    def _expect_end(self, position: int) -> None:
        position = _skip_whitespace(self.text, position)
        if position < len(self.text):
            raise json.JSONDecodeError("more text after the array", self.text, position)

    def _line_at(self, position: int) -> int:
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def line_of_error(self, error: ValueError) -> int:
        """The line the parser stopped at; where it does not say, that of the element it was in."""
        return error.lineno if isinstance(error, json.JSONDecodeError) else self._line
