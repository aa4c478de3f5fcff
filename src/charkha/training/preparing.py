"""From the files that a config names to the token shards of a run, once."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.config import Config
from charkha.config_file import LoadedConfig
from charkha.data.encoded import EncodedCounts
from charkha.data.eval_share import is_share_or_count
from charkha.data.formats import ReadOptions, open_rows, raise_for_problems, raise_for_reports
from charkha.data.hub_names import resolve_names
from charkha.data.indexing import IndexedFile, index_file
from charkha.data.parts import EncodedPart, EncodeTask, encode_parts, remove_parts
from charkha.data.personal_rows import numbered
from charkha.data.shards import Shard, open_shard, write_token_rows
from charkha.data.splits import SplitWish, held_out, joined, repeats
from charkha.data.templates import ChatTemplate, load_template
from charkha.data.tokenize import EncodeSettings, source_notes
from charkha.data.tokenizer import Tokenizer, load_tokenizer
from charkha.data.workers import worker_count
from charkha.errors import DataError, FileProblems, Problem, RunDamaged
from charkha.store.durable import sha256_of_file
from charkha.training.dataset import PreparedData, open_shards
from charkha.training.personal_gate import decide_personal
from charkha.training.sources import Source, options_of, sources_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def prepare_data(
    loaded: LoadedConfig,
    base: Path,
    folder: Path,
    max_length: int,
    previous: dict[str, Any] | None,
    progress: Callable[[str], None] = lambda text: None,
) -> PreparedData:
    """Reads, splits and tokenizes what the config names; writes shards into `folder`.

    `previous` is the `data` record of the run in that folder: when nothing that made it has changed, its shards are
    opened instead. Files are gone through twice, block by block, so memory does not grow with them; tokens of blocks
    that are finished stay in `folder` when the work is interrupted. Raises DataError (every problem of every file), and
    the errors of templates and tokenizers.
    """
    config = loaded.config
    sources = sources_of(config, loaded.folder)
    held_out_path = _held_out_file(config, loaded.folder)
    paths = [source.path for source in sources] + ([held_out_path] if held_out_path else [])
    tokenizer = load_tokenizer(base)
    template = _template(config, base, loaded.folder)
    files = _file_records(paths)
    key = _key(config, sources, files, tokenizer, template, max_length)
    if previous is not None and previous["key"] == key:
        with suppress(RunDamaged):  # a shard that was lost or cut short is made again from the same files
            return open_shards(previous, folder, tokenizer, template)
    reading = _Reading(config, sources, held_out_path, worker_count(paths, _processes(config)), progress)
    indexed, wish = reading.indexed()
    is_stated = "data.personal" in loaded.keys_set
    decided = decide_personal([(file.read, file.finds) for file in indexed], config.data, is_stated=is_stated)
    sides = _sides(config, sources, indexed, wish, has_file=held_out_path is not None)
    settings = EncodeSettings(tokenizer, template, config.data.train_on, max_length, config.data.overlong)
    parts_folder = folder / f"parts-{key[:16]}"
    parts = reading.encoded(indexed, sides, settings, parts_folder)
    train, eval_shard = _shards(parts, folder, indexed)
    remove_parts(parts_folder)
    has_conversations = any("ChatRow" in file.kinds for file in indexed)
    notes = [*_file_notes(indexed), *decided.notes, *sides.notes, *_token_notes(parts, settings, has_conversations)]
    return PreparedData(
        train=train,
        eval=eval_shard,
        tokenizer=tokenizer,
        template=template,
        key=key,
        files=tuple(
            record | {"format": file.read.format, "rows": file.read.row_count} | more
            for record, file, more in zip(files, indexed, sides.records, strict=True)
        ),
        notes=tuple(dict.fromkeys(notes)),
        has_conversations=has_conversations,
        split=sides.record,
        personal=decided.record,
        personal_report=decided.report,
    )


def _processes(config: Config) -> int | None:
    return None if config.data.num_proc == "auto" else config.data.num_proc


@dataclass(frozen=True)
class _Reading:
    """The files of a run and how they are read. The held-out file, if there is one, comes last."""

    config: Config
    sources: Sequence[Source]
    held_out: Path | None
    workers: int
    progress: Callable[[str], None]

    def files(self) -> list[tuple[Path, ReadOptions]]:
        """Every file with the options of its source."""
        files = [(source.path, options_of(self.config, source)) for source in self.sources]
        return files + ([(self.held_out, options_of(self.config, None))] if self.held_out else [])

    def indexed(self) -> tuple[list[IndexedFile], SplitWish]:
        """The files gone through once. Raises DataError with every problem of every file."""
        data = self.config.data
        share = None if self.held_out else data.eval
        wish = SplitWish(share, self.config.training.seed, data.group_by, data.time_by)
        told = _Told(self.progress)
        found = []
        for path, options in self.files():
            needed = wish if path != self.held_out else SplitWish(None)
            kept_kinds = tuple(data.personal_keep)
            masked = data.personal == "mask"
            found.append(index_file(path, options, needed, self.workers, told.rows, kept_kinds, masked))
        raise_for_problems([file.read for file in found])
        _refuse_preferences(found)
        return found, wish

    def encoded(
        self, indexed: Sequence[IndexedFile], sides: _Sides, settings: EncodeSettings, folder: Path
    ) -> list[EncodedPart]:
        """The tokens of all files. Raises DataError with every row that cannot be used."""
        blocks = sum(len(file.block_rows) for file in indexed)
        tasks = self._tasks(indexed, sides)
        parts = encode_parts(tasks, blocks, settings, folder, self.workers, _Told(self.progress).blocks)
        by_file: dict[str, list[Problem]] = {}
        for source, problem in (pair for part in parts for pair in part.problems):
            by_file.setdefault(source, []).append(problem)
        rows = {str(file.read.path): file.read.row_count for file in indexed}
        reports = tuple(
            FileProblems(path, None, None, rows[path] - len(found), tuple(found)) for path, found in by_file.items()
        )
        if reports:
            remove_parts(folder)
        raise_for_reports(reports)
        return parts

    def _tasks(self, indexed: Sequence[IndexedFile], sides: _Sides) -> Iterator[EncodeTask]:
        first = 0
        found = np.concatenate([np.zeros(0, np.bool_), *(file.finds.found for file in indexed)])
        masks = numbered([values for file in indexed for values in file.block_values])
        masking, kept_kinds = self.config.data.personal == "mask", tuple(self.config.data.personal_keep)
        for (path, options), file in zip(self.files(), indexed, strict=True):
            for task, count in zip(open_rows(path, replace(options, warn=False)).tasks, file.block_rows, strict=True):
                place = slice(first, first + count)
                mask = next(masks)
                yield EncodeTask(
                    str(path),
                    task,
                    sides.repeats[place],
                    sides.held_out[place],
                    mask if masking and mask else None,
                    found[place],
                    kept_kinds,
                )
                first += count


class _Told:
    """Says every five seconds how far a long preparation is."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._begun = self._last = time.monotonic()

    def rows(self, path: Path, rows: int) -> None:
        """After each block that was read."""
        self._say(lambda seconds: f"reading {path.name}: {rows:,} rows, {rows / seconds:,.0f} a second")

    def blocks(self, done: int, total: int) -> None:
        """After each part that was tokenized."""
        self._say(lambda seconds: f"tokenizing: {done / total:.0%}, {seconds * (total - done) / done:,.0f} s left")

    def _say(self, text: Callable[[float], str]) -> None:
        now = time.monotonic()
        if now - self._last >= 5:
            self._last = now
            self._tell(text(now - self._begun))


@dataclass(frozen=True, eq=False)
class _Sides:
    """What becomes of every row of every file: int64 and bool [rows]; and what is told and recorded of it."""

    repeats: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    notes: tuple[str, ...]
    record: dict[str, Any]
    records: tuple[dict[str, Any], ...]  # one a file


def _sides(
    config: Config, sources: Sequence[Source], indexed: Sequence[IndexedFile], wish: SplitWish, *, has_file: bool
) -> _Sides:
    keys = joined([file.keys for file in indexed[: len(sources)]])
    used = _used(config, indexed)
    of_sources = used[: len(keys.hashes)]
    out = np.zeros(len(keys.hashes), np.bool_)
    out[of_sources] = held_out(keys.of(of_sources), wish)
    repeated = [
        repeats(file.keys.hashes, source.weight, wish.seed) for source, file in zip(sources, indexed, strict=False)
    ]
    times = np.concatenate([np.empty(0, np.int64), *repeated])
    if has_file:
        rows = len(indexed[-1].keys.hashes)
        out, times = np.append(out, np.ones(rows, np.bool_)), np.append(times, np.zeros(rows, np.int64))
    out &= used
    times[out | ~used] = 0
    if not times.any():
        raise DataError("no rows are left to train on", where=str(sources[0].path), remedy="hold out fewer rows")
    records, notes = _mix(sources, indexed, times)
    if has_file:
        records += ({"weight": 0.0, "rows_an_epoch": 0},)
    elif out.any():
        notes += (f"held out {int(out.sum())} of {len(keys.hashes)} rows ({_wish_text(config)})",)
    else:
        notes += ("no held-out rows: nothing will show whether the model got better",)
    record = {"eval": config.data.eval, "seed": wish.seed, "group_by": wish.group_by, "time_by": wish.time_by}
    return _Sides(times, out, notes, record | {"held_out_rows": int(out.sum())}, records)


def _used(config: Config, indexed: Sequence[IndexedFile]) -> NDArray[np.bool_]:
    """All rows, or those without personal data, bool [rows of all files]."""
    found = np.concatenate([np.zeros(0, np.bool_), *(file.finds.found for file in indexed)])
    return ~found if config.data.personal == "drop" else np.ones(len(found), np.bool_)


def _wish_text(config: Config) -> str:
    data = config.data
    by = {"group_by": data.group_by, "time_by": data.time_by}
    return ", ".join([f"data.eval {data.eval}", *(f"{name} {value}" for name, value in by.items() if value)])


def _mix(
    sources: Sequence[Source], indexed: Sequence[IndexedFile], times: NDArray[np.int64]
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """What stands of each source in an epoch, for the record and, where weights differ, to tell."""
    records: list[dict[str, Any]] = []
    first = 0
    for source, file in zip(sources, indexed, strict=False):
        count = len(file.keys.hashes)
        records.append({"weight": source.weight, "rows_an_epoch": int(times[first : first + count].sum())})
        first += count
    if all(source.weight == 1 for source in sources):
        return tuple(records), ()
    total = sum(record["rows_an_epoch"] for record in records)
    told = ", ".join(
        f"{source.path.name} {record['rows_an_epoch'] / total:.1%} (weight {source.weight:g})"
        for source, record in zip(sources, records, strict=True)
    )
    return tuple(records), (f"an epoch is made of {told}",)


def _refuse_preferences(indexed: Sequence[IndexedFile]) -> None:
    """Raises DataError for rows that compare or rate answers: supervised training has no use for them."""
    for file in indexed:
        if file.kinds & {"PreferenceRow", "RatedRow"}:
            kind = "preference data (chosen, rejected)" if "PreferenceRow" in file.kinds else "rated answers (label)"
            raise DataError(
                f"these rows are {kind}; objective sft learns from one good answer a row",
                where=str(file.read.path),
                remedy="name the layout of the good answer (data.format: messages, data.map), or keep only those rows",
            )


def _shards(parts: Sequence[EncodedPart], folder: Path, indexed: Sequence[IndexedFile]) -> tuple[Shard, Shard | None]:
    train, held_out = [part.train for part in parts], [part.held_out for part in parts]
    if not any(rows.rows for rows in train):
        raise DataError("no rows are left to train on", where=str(indexed[0].read.path), remedy="check data.overlong")
    shard = open_shard(write_token_rows(folder, "train", train))
    if not any(rows.rows for rows in held_out):
        return shard, None
    return shard, open_shard(write_token_rows(folder, "eval", held_out))


def _token_notes(parts: Sequence[EncodedPart], settings: EncodeSettings, has_conversations: bool) -> tuple[str, ...]:
    tally: Counter[str] = Counter()
    for part in parts:
        tally.update(part.tally)
    notes = EncodedCounts(**tally).notes()
    return (*notes, *source_notes(settings.tokenizer, settings.template, has_conversations))


def _held_out_file(config: Config, folder: Path) -> Path | None:
    """`data.eval` as a file; None when it is a share, a count or null."""
    wish = config.data.eval
    if not isinstance(wish, str) or wish.rstrip().endswith("%"):
        return None
    files = resolve_names([wish], folder)
    if len(files) != 1:
        raise DataError(f"data.eval names {len(files)} files", where=wish, remedy="name one file of held-out rows")
    return files[0].absolute()


def _template(config: Config, base: Path, folder: Path) -> ChatTemplate | None:
    wish = config.data.template
    beside = folder / wish
    return load_template(base, str(beside) if wish != "auto" and beside.is_file() else wish)


def _file_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    for path in paths:
        if not path.is_file():
            raise DataError(
                "no such file", where=str(path), remedy="paths in the config are relative to the config file"
            )
    return [{"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in paths]


def _key(
    config: Config,
    sources: Sequence[Source],
    files: list[dict[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
) -> str:
    section = config.data.model_dump(mode="json", exclude={"train", "max_length", "num_proc"})
    section["eval"] = str(config.data.eval) if is_share_or_count(config.data.eval) else None
    made_of = {
        "data": section,
        "seed": config.training.seed,
        "max_length": max_length,
        "files": [file["sha256"] for file in files],
        "sources": [[source.weight, source.map] for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "template": template.text if template else None,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _file_notes(indexed: Sequence[IndexedFile]) -> list[str]:
    notes = []
    for file in indexed:
        read = file.read
        notes.append(f"{read.path.name}: {read.row_count} rows of format {read.format}")
        notes += [f"{read.path.name}: {text}" for text in read.notes]
        notes += [f"{read.path.name}: {count} x {kind} (warning)" for kind, count in read.warning_counts]
    return notes
