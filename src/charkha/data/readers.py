"""Any supported file to records, by its name's ending and by what it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from charkha.data.decoding import (
    TextEncoding,
    Undecodable,
    as_utf8,
    decoded_lines,
    detect_encoding,
    line_blocks,
    text_chunks,
)
from charkha.data.json_files import open_json_file
from charkha.data.records import Block, LineBlock, OpenFile, ParsedBlock, Record
from charkha.data.sources import Source, empty_file, open_source
from charkha.data.table_files import open_arrow_file, open_csv_file, open_parquet_file
from charkha.data.whatsapp import is_whatsapp, whatsapp_file
from charkha.errors import DataError, Problem

BINARY_SUFFIXES = (".parquet", ".arrow", ".feather")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", *BINARY_SUFFIXES)


def open_records(path: Path, *, assistant: str | None = None) -> OpenFile:
    """The file, opened: what it is, and blocks of records to come.

    `assistant` names who is the assistant in a chat export. Raises DataError when there is no such file, it is empty,
    or of a kind not read; going through the blocks raises it for a file that cannot be read further.
    """
    source = open_source(path)
    if source.suffix not in SUFFIXES:
        raise _not_read(source)
    if source.is_empty():
        raise empty_file(path)
    if source.suffix in BINARY_SUFFIXES:
        return open_parquet_file(source) if source.suffix == ".parquet" else open_arrow_file(source)
    head = next(source.chunks())
    try:
        encoding = detect_encoding(head)
    except Undecodable as stop:
        return OpenFile(source.suffix[1:], "utf-32", iter([ParsedBlock((), (stop.problem,))]))
    if source.suffix in (".csv", ".tsv"):
        return open_csv_file(source, encoding)
    if source.suffix in (".txt", ".md"):
        return _open_text(source, head, encoding, assistant)
    return open_json_file(source, head, encoding, assistant)


def _not_read(source: Source) -> DataError:
    kinds = ", ".join(SUFFIXES)
    name = source.suffix or source.path.name
    return DataError(
        f"files named *{name} are not read", where=str(source.path), remedy=f"use one of {kinds}, or these as .gz, .zst"
    )


def _open_text(source: Source, head: bytes, encoding: TextEncoding, assistant: str | None) -> OpenFile:
    """A .txt file holds one document a line; a .md file one a paragraph; a WhatsApp export its conversations."""
    kind = source.suffix[1:]
    if kind == "md":
        return OpenFile(
            kind, encoding.name, _paragraphs(source, encoding), (*encoding.notes, "each paragraph is one row")
        )
    if is_whatsapp(head[encoding.skip :].decode(encoding.codec, errors="replace")):
        try:
            text = "".join(text_chunks([source.whole()], encoding))
        except Undecodable as stop:
            return OpenFile("whatsapp", encoding.name, iter([ParsedBlock((), (stop.problem,))]))
        return whatsapp_file(source.path, text, encoding, assistant)
    return OpenFile(kind, encoding.name, _documents(source, encoding), (*encoding.notes, "each line is one row"))


def _documents(source: Source, encoding: TextEncoding) -> Iterator[Block]:
    try:
        yield from line_blocks(source.path, as_utf8(source.chunks(), encoding), encoding.skip, parse_documents)
    except Undecodable as stop:
        yield ParsedBlock((), (stop.problem,))


def parse_documents(block: LineBlock) -> ParsedBlock:
    """One text row a line; a line with NUL bytes is no text and a problem."""
    if not block.data.strip():
        return ParsedBlock((), blank=block.data.count(b"\n") or 1)
    lines, problems = decoded_lines(block)
    records: list[Record] = []
    for number, line in enumerate(lines, start=block.first_line):
        text = line.removesuffix("\r")
        if "\0" in text:
            problems.append(Problem(f"NUL byte: at character {text.index(chr(0)) + 1}; this is not text", number))
        elif text.strip():
            records.append(Record({"text": text}, number))
    problems.sort(key=lambda problem: problem.line or 0)
    return ParsedBlock(tuple(records), tuple(problems), len(lines) - len(records) - len(problems))


def _paragraphs(source: Source, encoding: TextEncoding) -> Iterator[Block]:
    try:
        blocks = line_blocks(source.path, as_utf8(source.chunks(), encoding), encoding.skip, parse_documents)
        yield from _joined_paragraphs(blocks)
    except Undecodable as stop:
        yield ParsedBlock((), (stop.problem,))


def _joined_paragraphs(blocks: Iterable[LineBlock]) -> Iterator[Block]:
    """Lines up to a blank one are a paragraph, also where a block ends inside it."""
    lines: list[str] = []
    first = 1
    for block in blocks:
        found, problems = decoded_lines(block)
        records: list[Record] = []
        for number, line in enumerate(found, start=block.first_line):
            if re.search(r"\S", line):
                first = first if lines else number
                lines.append(line.removesuffix("\r"))
            elif lines:
                records.append(Record({"text": "\n".join(lines)}, first))
                lines = []
        yield ParsedBlock(tuple(records), tuple(problems))
    if lines:
        yield ParsedBlock((Record({"text": "\n".join(lines)}, first),))
