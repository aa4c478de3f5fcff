"""Any supported file to records, by its name's ending."""

from __future__ import annotations

import re
from pathlib import Path

from charkha.data.decoding import DecodedText, decode_text, empty_file, read_bytes
from charkha.data.json_files import read_json_file
from charkha.data.records import FileRecords, Record, blank_lines_note
from charkha.data.table_files import read_csv_file, read_parquet_file
from charkha.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


def read_records(path: Path) -> FileRecords:
    """The records of a file. Raises DataError when there is no such file, it is empty, or of a kind not read."""
    suffix = path.suffix.lower()
    data = read_bytes(path)
    if suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise DataError(
            f"files named *{suffix or path.name} are not read", where=str(path), remedy=f"use one of {kinds}"
        )
    if suffix == ".parquet":
        return read_parquet_file(path)
    decoded = decode_text(data)
    if suffix in (".csv", ".tsv"):
        return read_csv_file(path, decoded)
    found = _read_paragraphs(decoded, suffix) if suffix in (".txt", ".md") else read_json_file(path, decoded)
    if not found.records and not found.problems:
        raise empty_file(path)
    return found


def _read_paragraphs(decoded: DecodedText, suffix: str) -> FileRecords:
    """A .txt file holds one document a line; a .md file one a paragraph, with blank lines between them."""
    text = decoded.text.replace("\r\n", "\n")
    if suffix == ".md":
        records = tuple(_blocks(text))
        return FileRecords("md", decoded.encoding, records, decoded.problems, ("each paragraph is one row",))
    lines = text.removesuffix("\n").split("\n")
    records = tuple(Record({"text": line}, number) for number, line in enumerate(lines, start=1) if line.strip())
    blank = len(lines) - len(records) - len(decoded.problems)
    notes = ("each line is one row", *blank_lines_note(blank))
    return FileRecords("txt", decoded.encoding, records, decoded.problems, notes)


def _blocks(text: str) -> list[Record]:
    blocks: list[Record] = []
    line, counted = 1, 0
    for match in re.finditer(r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        blocks.append(Record({"text": match[0]}, line))
    return blocks
