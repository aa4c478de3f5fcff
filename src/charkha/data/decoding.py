"""Bytes of a text file to lines of UTF-8: which encoding they are in, and where a line is not valid.

A byte order mark decides. Without one the text is UTF-8 if the beginning of the file is, or if any of its letters
beyond ASCII are; else the encoding is detected by charset-normalizer and told. A few odd bytes are too little to tell
by: they are reported by line, never guessed.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from charkha.data.records import LineBlock, ParsedBlock
from charkha.data.sources import LONGEST_LINE_BYTES
from charkha.errors import DataError, Problem

_REMEDY = "save the file as UTF-8 (iconv -f <its encoding> -t UTF-8)"
_FEWEST_BYTES = 16  # beyond ASCII; fewer do not tell one legacy encoding from another


@dataclass(frozen=True)
class TextEncoding:
    """`name` is what is told, `codec` what decodes; `skip` is the length of the byte order mark."""

    name: str
    codec: str = "utf-8"
    skip: int = 0
    notes: tuple[str, ...] = ()


class Undecodable(Exception):
    """The text cannot be decoded from `problem` on; what was handed out before is good."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


def detect_encoding(head: bytes) -> TextEncoding:
    """The encoding of a file that begins with `head` (up to a mebibyte). Raises Undecodable for UTF-32."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise Undecodable(Problem(f"the encoding is UTF-32, which is not read; {_REMEDY}", 1))
    if head.startswith(codecs.BOM_UTF16_LE):
        return TextEncoding("utf-16-le", "utf-16-le", 2)
    if head.startswith(codecs.BOM_UTF16_BE):
        return TextEncoding("utf-16-be", "utf-16-be", 2)
    if head.startswith(codecs.BOM_UTF8):
        return TextEncoding("utf-8-sig", skip=len(codecs.BOM_UTF8))
    return _without_mark(head)


def _without_mark(head: bytes) -> TextEncoding:
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(head) >= 8 and head[first::2].count(0) * 2 > len(head[first::2]) and 0 not in head[1 - first :: 2][:64]:
            return TextEncoding(name, name, notes=(f"read as {name}: every other byte is zero",))
    lines = head.split(b"\n")[:-1] or [head]  # the last line may be cut inside a character
    odd = [line for line in lines if not _is_utf8(line)]
    if not odd or any(not line.isascii() for line in lines if _is_utf8(line)):
        return TextEncoding("utf-8")
    found = _legacy(b"\n".join(lines)) if sum(byte > 127 for line in odd for byte in line) >= _FEWEST_BYTES else None
    if found is None:
        return TextEncoding("utf-8")
    told = f"the text is not UTF-8: it was read as {found} (detected); look at a row with `charkha data preview`"
    return TextEncoding(found, found, notes=(told,))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _legacy(sample: bytes) -> str | None:
    """The encoding that charset-normalizer finds, None where it finds none."""
    from charset_normalizer import from_bytes

    best = from_bytes(sample[: 1 << 16].rpartition(b"\n")[0] or sample[: 1 << 16]).best()
    if best is None or best.encoding in ("utf_8", "ascii"):
        return None
    return best.encoding


def as_utf8(chunks: Iterable[bytes], encoding: TextEncoding) -> Iterator[bytes]:
    """The text without its byte order mark. UTF-8 passes as it is, valid or not.

    Raises Undecodable at the first place that is not valid in another encoding.
    """
    if encoding.codec == "utf-8":
        yield from _without_first(chunks, encoding.skip)
        return
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    line, offset = 1, encoding.skip
    for chunk in itertools.chain(_without_first(chunks, encoding.skip), (b"",)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += chunk[: max(0, error.start - pending)].decode(encoding.codec, errors="replace").count("\n")
            place = offset - pending + error.start
            reason = f"not valid {encoding.name.upper()}: {error.reason} at byte offset {place}"
            raise Undecodable(Problem(f"{reason}; nothing after this place was read", line)) from error
        offset += len(chunk)
        line += text.count("\n")
        yield text.encode("utf-8", errors="surrogatepass")


def _without_first(chunks: Iterable[bytes], count: int) -> Iterator[bytes]:
    for chunk in chunks:
        if chunk[count:]:
            yield chunk[count:]
        count = max(0, count - len(chunk))


def line_blocks(
    path: Path, chunks: Iterable[bytes], first_byte: int, parser: Callable[[LineBlock], ParsedBlock]
) -> Iterator[LineBlock]:
    """Blocks of whole lines, about as large as the chunks. Only `\\n` ends a line.

    Raises DataError at a line longer than 64 MiB, before more of it is read.
    """
    carried: list[bytes] = []
    line, size = 1, 0
    for chunk in chunks:
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            data = b"".join((*carried, head, newline))
            yield LineBlock(data, line, first_byte, parser)
            line += data.count(b"\n")
            first_byte += len(data)
            carried, size = [], 0
        carried.append(tail)
        size += len(tail)
        if size > LONGEST_LINE_BYTES:
            raise DataError(
                f"the line is longer than {LONGEST_LINE_BYTES >> 20} MiB",
                where=f"{path}:{line}",
                remedy="write one row a line; a list of rows belongs into a JSON array",
            )
    if size:
        yield LineBlock(b"".join(carried), line, first_byte, parser)


def decoded_lines(block: LineBlock) -> tuple[list[str], list[Problem]]:
    """The lines as text; one that is not valid UTF-8 is empty and stands in the problems with its byte offset.

    The line end at the end of the block starts no line of its own.
    """
    try:
        lines = block.data.decode("utf-8").split("\n")
        problems: list[Problem] = []
    except UnicodeDecodeError:
        lines, problems = _line_by_line(block)
    if lines[-1] == "" and block.data.endswith(b"\n"):
        lines.pop()
    return lines, problems


def _line_by_line(block: LineBlock) -> tuple[list[str], list[Problem]]:
    """One wrong line must not hide the others: each is tried alone."""
    lines: list[str] = []
    problems: list[Problem] = []
    offset = block.first_byte
    for number, raw in enumerate(block.data.split(b"\n"), start=block.first_line):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            place = f"byte 0x{raw[error.start]:02x} at byte offset {offset + error.start}"
            problems.append(Problem(f"not valid UTF-8: {place}; {_REMEDY}", number))
            lines.append("")
        offset += len(raw) + 1
    return lines, problems


def text_chunks(chunks: Iterable[bytes], encoding: TextEncoding) -> Iterator[str]:
    """The text piece by piece, for formats in which a broken character ends the reading.

    Raises Undecodable with line and byte offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass" if encoding.codec != "utf-8" else "strict")
    line, offset = 1, encoding.skip
    for chunk in itertools.chain(as_utf8(chunks, encoding), (b"",)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            start = error.start - pending
            line += chunk[: max(0, start)].count(b"\n")
            byte = f"byte 0x{error.object[error.start]:02x} at byte offset {offset + start}"
            raise Undecodable(Problem(f"not valid UTF-8: {byte}; {_REMEDY}", line)) from error
        offset += len(chunk)
        line += text.count("\n")
        yield text
