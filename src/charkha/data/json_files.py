"""JSON Lines and JSON arrays to records, strictly: no NaN and no repeated key. Neither is ever in memory whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from charkha.data.decoding import TextEncoding, Undecodable, as_utf8, decoded_lines, line_blocks, text_chunks
from charkha.data.json_arrays import array_blocks
from charkha.data.records import Block, LineBlock, OpenFile, ParsedBlock, Record
from charkha.data.sources import Source
from charkha.data.strict_json import WHITESPACE, StrictJson, json_reason, json_type, skip_whitespace
from charkha.data.telegram import is_telegram, telegram_file
from charkha.errors import DataError, Problem


def open_json_file(source: Source, head: bytes, encoding: TextEncoding, assistant: str | None) -> OpenFile:
    """Records of a .json, .jsonl or .ndjson file.

    What the file holds decides, not its name: an array is read as an array, one object a line as JSON Lines.
    Raises DataError for a single object in a .json file, which is no list of rows.
    """
    text = _text_of(head, encoding)
    start = skip_whitespace(text, 0)
    named_lines = source.suffix != ".json"
    is_lines = _first_line_is_whole(text, start)
    if text.startswith("[", start) and not (named_lines and is_lines):
        note = ("the file holds one JSON array and was read as such",) if named_lines else ()
        blocks = array_blocks(text_chunks(source.chunks(), encoding))
        return OpenFile("json", encoding.name, blocks, (*encoding.notes, *note))
    if named_lines or is_lines:
        note = () if named_lines else ("the file holds one object a line and was read as JSON Lines",)
        return OpenFile("jsonl", encoding.name, _lines(source, encoding), (*encoding.notes, *note))
    return _open_single_value(source, encoding, assistant)


def _text_of(head: bytes, encoding: TextEncoding) -> str:
    return head[encoding.skip :].decode(encoding.codec, errors="replace")


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


def _lines(source: Source, encoding: TextEncoding) -> Iterator[Block]:
    try:
        yield from line_blocks(source.path, as_utf8(source.chunks(), encoding), encoding.skip, parse_json_lines)
    except Undecodable as stop:
        yield ParsedBlock((), (stop.problem,))


def parse_json_lines(block: LineBlock) -> ParsedBlock:
    """One value a line; a line that holds none is a problem."""
    if not block.data.strip():
        return ParsedBlock((), blank=block.data.count(b"\n") or 1)
    decoder = StrictJson()
    lines, problems = decoded_lines(block)
    undecodable = {problem.line for problem in problems}
    records: list[Record] = []
    blank = 0
    # Only "\n" ends a line: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(lines, start=block.first_line):
        stripped = line.strip(WHITESPACE)
        if stripped:
            _parse_one_line(decoder, stripped, number, records, problems)
        elif number not in undecodable:
            blank += 1
    problems.sort(key=lambda problem: problem.line or 0)
    return ParsedBlock(tuple(records), tuple(problems), blank)


def _parse_one_line(
    decoder: StrictJson, line: str, number: int, records: list[Record], problems: list[Problem]
) -> None:
    try:
        value, stop = decoder.decode_at(line, 0)
        if stop < len(line):
            raise ValueError(f"more text after the value (column {stop + 1})")
    except ValueError as error:
        problems.append(Problem(f"broken JSON: {json_reason(error)}", number))
        return
    problems.extend(Problem(fault, number) for fault in decoder.faults)
    if not decoder.faults:
        records.append(Record(value, number))


def _open_single_value(source: Source, encoding: TextEncoding, assistant: str | None) -> OpenFile:
    """Raises DataError for one whole JSON value, which is no list of rows; one that is broken gives one problem."""
    opened = partial(OpenFile, "json", encoding.name, notes=encoding.notes)
    try:
        text = "".join(text_chunks([source.whole()], encoding))
    except Undecodable as stop:
        return opened(iter([ParsedBlock((), (stop.problem,))]))
    start = skip_whitespace(text, 0)
    decoder = StrictJson()
    try:
        value, stop_at = decoder.decode_at(text, start)
        if text[stop_at:].strip(WHITESPACE):
            raise json.JSONDecodeError("more text after the value", text, skip_whitespace(text, stop_at))
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        return opened(iter([ParsedBlock((), (Problem(f"broken JSON: {json_reason(error)}", line),))]))
    if decoder.faults:
        return opened(iter([ParsedBlock((), tuple(Problem(fault, 1) for fault in decoder.faults))]))
    if is_telegram(value):
        return telegram_file(source.path, text, encoding, assistant)
    raise _not_a_list(source, value)


def _not_a_list(source: Source, value: object) -> DataError:
    remedy = "write a JSON array of rows, or one row a line as .jsonl"
    where = str(source.path)
    if not isinstance(value, dict):
        return DataError(f"the file is one JSON {json_type(value)}, not a list of rows", where=where, remedy=remedy)
    lists = [name for name, part in value.items() if isinstance(part, list)]
    if len(lists) == 1:
        remedy += f"; the rows may be the list under the key {lists[0]!r}: save that list alone"
    keys = ", ".join(value) or "none"
    return DataError(f"the file is one JSON object, not a list of rows (its keys: {keys})", where=where, remedy=remedy)
