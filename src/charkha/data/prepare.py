"""Rows split into training and held-out, duplicates counted, and written as JSON Lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.data.formats import ReadFile, raise_for_problems, read_rows
from charkha.data.masking import Action, treat_rows, treatment_report
from charkha.data.rows import Row, content_hash, row_as_record
from charkha.errors import DataError, UsageError


def split_rows(rows: Sequence[Row], eval_: str | int | float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training rows, held-out rows), each in the order given.

    `eval_` is a share (`"5%"`, 0.05) or a count (200, "200"); 0 holds nothing out. The same rows and seed give the
    same split in whatever order they come. Rows that say the same stand on one side; a share is met as nearly as that
    allows.
    Raises UsageError for a share that is none, DataError where one side would be empty.
    """
    wanted = held_out_count(eval_, len(rows))
    if wanted == 0:
        return tuple(rows), ()
    hashes = [content_hash(row) for row in rows]
    sizes: dict[str, int] = {}
    for digest in hashes:
        sizes[digest] = sizes.get(digest, 0) + 1
    chosen = _choose_groups(sizes, wanted, seed)
    train = tuple(row for row, digest in zip(rows, hashes, strict=True) if digest not in chosen)
    held_out = tuple(row for row, digest in zip(rows, hashes, strict=True) if digest in chosen)
    if not train or not held_out:
        raise DataError(
            f"{len(rows)} rows ({len(sizes)} different) cannot be split into training and {eval_} held-out rows",
            remedy="give more rows, a smaller data.eval, or a file of its own",
        )
    return train, held_out


def _choose_groups(sizes: Mapping[str, int], wanted: int, seed: int) -> set[str]:
    """Contents whose rows add up to `wanted` or just below, in an order that only seed and content decide."""
    ordered = sorted(sizes, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
    chosen: set[str] = set()
    left = wanted
    for digest in ordered:
        if sizes[digest] <= left:
            chosen.add(digest)
            left -= sizes[digest]
    return chosen


def held_out_count(eval_: str | int | float, rows: int) -> int:
    """The number of held-out rows that a share or count means, at least 1 unless it is 0. Raises UsageError."""
    share, count = _share_or_count(eval_)
    if share is not None:
        return 0 if share == 0 else max(1, round(share * rows))
    return count


def _share_or_count(eval_: str | int | float) -> tuple[float | None, int]:
    try:
        if isinstance(eval_, str) and eval_.strip().endswith("%"):
            share = float(eval_.strip()[:-1]) / 100
        elif isinstance(eval_, int) or (isinstance(eval_, str) and eval_.strip().isdigit()):
            if int(eval_) < 0:
                raise ValueError
            return None, int(eval_)
        else:
            share = float(eval_)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(
            f"data.eval: {eval_!r} is no share or count of rows", remedy="write for example 5%, 0.05 or 200"
        )
    return share, 0


def count_duplicates(rows: Sequence[Row]) -> int:
    """How many rows say exactly what an earlier row said."""
    return len(rows) - len({content_hash(row) for row in rows})


def without_duplicates(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows without exact repetitions; the first of each stays."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(content_hash(row), row)
    return tuple(first.values())


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """Writes one JSON object a line (`messages`, `prompt` + `completion`, or `text`): the whole file or nothing."""
    beside = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row_as_record(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@dataclass(frozen=True)
class Prepared:
    """What was written. `duplicates` counts exact repetitions, removed or not."""

    files: tuple[ReadFile, ...]
    train_path: Path
    train_rows: int
    eval_path: Path | None
    eval_rows: int
    duplicates: int
    duplicates_removed: bool
    personal: dict[str, object]  # what was found and done, without values


def prepare_files(
    paths: Sequence[Path],
    *,
    out: Path,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    eval_: str | int | float = 0,
    seed: int = 42,
    deduplicate: bool = False,
    personal: Action = "report",
    personal_report: Path | None = None,
) -> Prepared:
    """Reads files of any supported format and writes `out`, and `<out>.eval.jsonl` where rows are held out.

    `personal` says what is done about personal data: `mask` writes stand-ins, `drop` leaves rows out;
    `personal_report` is a Markdown file that tells what was found and done. Raises DataError
    with every problem of every file before anything is written, UsageError where the files hold rows
    of different kinds, which one JSONL file cannot mix.
    """
    if out.suffix.lower() != ".jsonl":
        raise UsageError(f"the output must be named *.jsonl, not {out.name}", where=str(out))
    files = tuple(read_rows(path, format=format, mapping=mapping) for path in paths)
    raise_for_problems(files)
    _refuse_mixture(files)
    treatment = treat_rows([(str(file.path), file.rows) for file in files], personal)
    rows = tuple(row for file in treatment.files for row in file.rows)
    duplicates = count_duplicates(rows)
    train, held_out = split_rows(without_duplicates(rows) if deduplicate else rows, eval_, seed)
    eval_path = out.with_name(out.stem + ".eval.jsonl") if held_out else None
    write_jsonl(train, out)
    if personal_report is not None:
        _write_report(personal_report, treatment_report(treatment, files))
    if eval_path is not None:
        write_jsonl(held_out, eval_path)
    return Prepared(files, out, len(train), eval_path, len(held_out), duplicates, deduplicate, treatment.record())


def _write_report(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error.strerror}", where=str(path)) from error


def _refuse_mixture(files: Sequence[ReadFile]) -> None:
    kinds = {type(row): file.path for file in files for row in file.rows}
    if len(kinds) > 1:
        names = ", ".join(str(path) for path in kinds.values())
        raise UsageError(
            f"the files hold rows of different kinds: {names}", remedy="prepare each kind into its own file"
        )
