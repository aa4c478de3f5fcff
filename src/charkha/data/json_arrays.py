"""A JSON array of any length to records, element by element, with no more than one element and a chunk in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from charkha.data.decoding import Undecodable
from charkha.data.records import Block, ParsedBlock, Record
from charkha.data.sources import LONGEST_LINE_BYTES
from charkha.data.strict_json import StrictJson, skip_whitespace
from charkha.errors import Problem

_BLOCK_CHARACTERS = 1 << 20
# Where the decoder may stop only because the text goes on in the next chunk: `tru`, `\u00`, `-1.`
_LONGEST_TOKEN = 32


def array_blocks(chunks: Iterable[str]) -> Iterator[Block]:
    """The elements of `[value, value, ...]`, each with the line it starts on; the first broken place ends the reading.

    Not checked: what stands before the opening bracket.
    """
    reader = _ArrayReader(chunks)
    block: list[Record] = []
    problems: list[Problem] = []
    size = 0
    try:
        for value, line, faults, length in reader.elements():
            problems.extend(Problem(fault, line) for fault in faults)
            if not faults:
                block.append(Record(value, line))
            size += length
            if size > _BLOCK_CHARACTERS:
                yield ParsedBlock(tuple(block), tuple(problems))
                block, problems, size = [], [], 0
    except Undecodable as stop:
        problems.append(stop.problem)
    except ValueError as error:
        line, reason = reader.place_of(error)
        problems.append(Problem(f"broken JSON: {reason}; nothing after this place was read", line))
    yield ParsedBlock(tuple(block), tuple(problems))


class _ArrayReader:
    """A window on the text that moves on, counting lines on the way."""

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._text = ""
        self._at = 0
        self._line = 1
        self._counted = 0
        self._column = 0  # characters of the window's first line that have left the window
        self._is_whole = False  # no more text will come
        self._decoder = StrictJson()

    def elements(self) -> Iterator[tuple[object, int, tuple[str, ...], int]]:
        """(value, line, faults, characters). Raises ValueError at the first place that is not JSON."""
        self._skip()
        self._at += 1  # the opening bracket, which the caller has seen
        if self._next_character() == "]":
            return self._expect_end()
        while True:
            line = self._line_here()
            value, stop = self._decode()
            yield value, line, tuple(self._decoder.faults), stop - self._at
            self._at = stop
            character = self._next_character()
            if character == "]":
                return self._expect_end()
            if character != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
            self._at += 1
            self._skip()

    def _decode(self) -> tuple[object, int]:
        """The value here. Reads on, twice as much each time, while the value may only be cut off by the window."""
        wanted = _BLOCK_CHARACTERS
        while True:
            try:
                value, stop = self._decoder.decode_at(self._text, self._at)
                if stop < len(self._text) or self._is_whole:
                    self._check_length(stop - self._at)
                    return value, stop
            except json.JSONDecodeError as error:
                if self._is_whole or self._is_real(error):
                    raise
            self._check_length(len(self._text) - self._at)
            self._read_on(wanted)
            wanted *= 2

    def _check_length(self, characters: int) -> None:
        if characters > LONGEST_LINE_BYTES:
            raise json.JSONDecodeError(f"one row of over {LONGEST_LINE_BYTES >> 20} MiB", self._text, self._at)

    def _is_real(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could not mend it; an unclosed string is told by where it begins."""
        cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_TOKEN
        return not cut

    def _read_on(self, characters: int) -> None:
        """Drops what was read and takes in at least so many characters more, if there are."""
        self._line_here()
        dropped = self._text[: self._at]
        newline = dropped.rfind("\n")
        self._column = len(dropped) - newline - 1 if newline >= 0 else self._column + len(dropped)
        parts = [self._text[self._at :]]
        self._at = self._counted = 0
        while characters > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._is_whole = True
                break
            parts.append(chunk)
            characters -= len(chunk)
        self._text = "".join(parts)

    def _skip(self) -> None:
        while True:
            self._at = skip_whitespace(self._text, self._at)
            if self._at < len(self._text) or self._is_whole:
                return
            self._read_on(1)

    def _next_character(self) -> str:
        self._skip()
        return self._text[self._at : self._at + 1]

    def _expect_end(self) -> None:
        self._at += 1
        self._skip()
        if self._at < len(self._text):
            raise json.JSONDecodeError("more text after the array", self._text, self._at)

    def _line_here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def place_of(self, error: ValueError) -> tuple[int, str]:
        """(line, reason with column): where the parser stopped, or the element it was in where it does not say."""
        here = self._line_here()
        if not isinstance(error, json.JSONDecodeError):
            return here, str(error)
        column = error.colno if "\n" in self._text[: error.pos] else error.colno + self._column
        return here + self._text.count("\n", self._at, error.pos), f"{error.msg} (column {column})"
