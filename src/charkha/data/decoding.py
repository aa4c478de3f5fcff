"""Bytes of a text file to text: UTF-8 with or without BOM, UTF-16 with BOM; everything else is named, never guessed."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from charkha.errors import DataError, Problem

_REMEDY = "save the file as UTF-8 (iconv -f <its encoding> -t UTF-8)"


@dataclass(frozen=True)
class DecodedText:
    """The text of a file; a line that could not be decoded is empty here and stands in `problems`.

    `encoding` is None when not one line could be decoded.
    """

    encoding: str | None
    text: str
    problems: tuple[Problem, ...]


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises DataError when it is missing, not an ordinary file, unreadable or empty."""
    if not path.exists():
        raise DataError(
            "the file does not exist", where=str(path), remedy="check the path; it is relative to where you run"
        )
    if not path.is_file():
        raise DataError("this is not an ordinary file", where=str(path), remedy="name the data files themselves")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    if not data.strip(b" \t\r\n\0\xef\xbb\xbf\xff\xfe"):
        raise empty_file(path)
    return data


def empty_file(path: Path) -> DataError:
    """The error for a file without a single row."""
    return DataError(
        "the file is empty: it has no rows", where=str(path), remedy="give a file that holds training rows"
    )


def decode_text(data: bytes) -> DecodedText:
    """The text with line ends as they are; lines that are not valid become empty and are reported with byte offset."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return DecodedText("utf-32", "", (Problem(f"the encoding is UTF-32, which is not read; {_REMEDY}", 1),))
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decode_utf16(data)
    has_bom = data.startswith(codecs.BOM_UTF8)
    encoding = "utf-8-sig" if has_bom else "utf-8"
    body = data[len(codecs.BOM_UTF8) :] if has_bom else data
    try:
        return DecodedText(encoding, body.decode("utf-8"), ())
    except UnicodeDecodeError:
        return _decode_line_by_line(encoding, body, len(data) - len(body))


def _decode_utf16(data: bytes) -> DecodedText:
    encoding = "utf-16-le" if data.startswith(codecs.BOM_UTF16_LE) else "utf-16-be"
    try:
        return DecodedText(encoding, data[2:].decode(encoding), ())
    except UnicodeDecodeError as error:
        line = data[2 : 2 + error.start].decode(encoding, errors="replace").count("\n") + 1
        reason = f"not valid UTF-16: {error.reason} at byte offset {error.start + 2}"
        return DecodedText(encoding, "", (Problem(reason, line),))


def _decode_line_by_line(encoding: str, body: bytes, offset: int) -> DecodedText:
    """One wrong line must not hide the others: each is tried alone, a wrong one leaves an empty line in its place."""
    lines: list[str] = []
    problems: list[Problem] = []
    for number, raw in enumerate(body.split(b"\n"), start=1):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            place = f"byte 0x{raw[error.start]:02x} at byte offset {offset + error.start}"
            problems.append(Problem(f"not valid UTF-8: {place}; {_REMEDY}", number))
            lines.append("")
        offset += len(raw) + 1
    text = "\n".join(lines)
    return DecodedText(encoding if text.strip() else None, text, tuple(problems))
