"""The run's data: files to rows to finished tokens in shards, once, and opened again by everything that comes after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.config import Config, DataSource
from charkha.config_file import LoadedConfig
from charkha.data.encoded import EncodedRow, EncodedSet
from charkha.data.formats import ReadFile, raise_for_problems, raise_for_reports, read_rows
from charkha.data.prepare import split_rows
from charkha.data.rows import ChatRow, Row
from charkha.data.shards import Shard, open_shard, write_shard
from charkha.data.templates import ChatTemplate, load_template
from charkha.data.tokenize import encode_rows, end_ids
from charkha.data.tokenizer import Tokenizer, load_tokenizer
from charkha.errors import ConfigError, ConfigProblem, DataError, FileProblems, RunDamaged
from charkha.store.durable import sha256_of_file, write_durably
from charkha.training.personal_gate import decide_personal

PERSONAL_REPORT = "personal_data.md"  # in the run's data folder, where anything was found


@dataclass(frozen=True)
class PreparedData:
    """Finished tokens and what made them. `key` identifies the inputs, `fingerprint` the tokens that came out."""

    train: Shard
    eval: Shard | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    key: str
    files: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    has_conversations: bool  # whether any row was rendered by the chat template
    personal: dict[str, Any] | None = None  # what was found and decided; None in runs from before the scan

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.train.path.name} {self.eval.path.name if self.eval else ''}".encode()).hexdigest()

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token on which an answer ends, the template's end of turn among them."""
        return end_ids(self.tokenizer, self.template if self.has_conversations else None)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def record(self) -> dict[str, Any]:
        """The `data` part of manifest.json, from which `open_prepared` opens it again."""
        template = self.template
        return {
            "key": self.key,
            "fingerprint": self.fingerprint,
            "train_shard": self.train.path.name,
            "eval_shard": self.eval.path.name if self.eval else None,
            "train_rows": len(self.train.lengths),
            "eval_rows": len(self.eval.lengths) if self.eval else 0,
            "train_tokens": int(self.train.lengths.sum()),
            "files": list(self.files),
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "template": None if template is None else {"source": template.source, "text": template.text},
            "notes": list(self.notes),
            "has_conversations": self.has_conversations,
            "personal": self.personal,
        }


def prepare_data(
    loaded: LoadedConfig, base: Path, folder: Path, max_length: int, previous: dict[str, Any] | None
) -> PreparedData:
    """Reads, splits and tokenizes what the config names; writes shards into `folder`.

    `previous` is the `data` record of the run in that folder: when nothing that made it has changed, its shards are
    opened instead. Raises DataError (every problem of every file), and the errors of templates and tokenizers.
    """
    config = loaded.config
    sources = [_source(source, loaded.folder) for source in config.data.train]
    held_out = _held_out_file(config, loaded.folder)
    tokenizer = load_tokenizer(base)
    template = _template(config, base, loaded.folder)
    files = _file_records([source.path for source in sources] + ([str(held_out)] if held_out else []))
    key = _key(config, files, tokenizer, template, max_length)
    if previous is not None and previous["key"] == key:
        with suppress(RunDamaged):  # a shard that was lost or cut short is made again from the same files
            return _open(previous, folder, tokenizer, template)
    read = [_read(Path(source.path), config, source.map) for source in sources]
    read_held_out = [_read(held_out, config, {})] if held_out else []
    raise_for_problems([*read, *read_held_out])
    decided = decide_personal([*read, *read_held_out], config.data, is_stated="data.personal" in loaded.keys_set)
    if decided.report is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / PERSONAL_REPORT, decided.report.encode("utf-8", "backslashreplace"))
    everything = decided.files
    train_rows, eval_rows, notes = _split(config, everything[: len(read)], everything[len(read) :])
    notes += decided.notes

    def encode(rows: Sequence[Row], name: str) -> Shard | None:
        return _encode(rows, everything, name, folder, notes, config, tokenizer, template, max_length)

    train, held_out_shard = encode(train_rows, "train"), encode(eval_rows, "eval")
    if train is None:
        raise DataError("no rows are left to train on", where=str(everything[0].path), remedy="hold out fewer rows")
    return PreparedData(
        train=train,
        eval=held_out_shard,
        tokenizer=tokenizer,
        template=template,
        key=key,
        files=tuple(
            record | {"format": file.format, "rows": len(file.rows)}
            for record, file in zip(files, everything, strict=True)
        ),
        notes=tuple(dict.fromkeys(_file_notes(everything) + notes)),
        has_conversations=any(isinstance(row, ChatRow) for row in train_rows),
        personal=decided.record,
    )


def open_prepared(record: dict[str, Any], folder: Path, base: Path) -> PreparedData:
    """The data of a run as its manifest records it. Raises RunDamaged when a shard or the tokenizer differs."""
    tokenizer = load_tokenizer(base)
    if tokenizer.fingerprint != record["tokenizer_fingerprint"]:
        raise RunDamaged("the base model's tokenizer is not the one of this run any more", where=str(base))
    template = record["template"]
    chat = None
    if template is not None:
        own = load_template(base)
        chat = ChatTemplate(template["source"], template["text"], own.bos_token, own.eos_token)
    return _open(record, folder, tokenizer, chat)


def encode_file(path: Path, config: Config, data: PreparedData) -> EncodedSet:
    """Another file's rows as tokens, read, rendered and masked as the run's own."""
    file = _read(path, config, {})
    raise_for_problems([file])
    limit = config.data.max_length
    assert isinstance(limit, int)  # frozen in the run folder
    return encode_rows(
        file.rows, data.tokenizer, data.template, train_on=config.data.train_on, max_length=limit, source=str(path)
    )


def _open(record: dict[str, Any], folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> PreparedData:
    return PreparedData(
        train=open_shard(folder / record["train_shard"]),
        eval=open_shard(folder / record["eval_shard"]) if record["eval_shard"] else None,
        tokenizer=tokenizer,
        template=template,
        key=record["key"],
        files=tuple(record["files"]),
        notes=tuple(record["notes"]),
        has_conversations=record["has_conversations"],
        personal=record.get("personal"),
    )


def _source(source: str | DataSource, folder: Path) -> DataSource:
    entry = DataSource(path=source) if isinstance(source, str) else source
    if entry.weight != 1.0:
        problem = ConfigProblem(
            "data.train.weight", f"{entry.weight:g} is not carried out by this version", None, "use 1"
        )
        raise ConfigError("config", [problem])
    return entry.model_copy(update={"path": str((folder / Path(entry.path).expanduser()).resolve())})


def _held_out_file(config: Config, folder: Path) -> Path | None:
    """`data.eval` as a file; None when it is a share, a count or null."""
    wish = config.data.eval
    if not isinstance(wish, str) or wish.rstrip().endswith("%"):
        return None
    return (folder / Path(wish).expanduser()).resolve()


def _template(config: Config, base: Path, folder: Path) -> ChatTemplate | None:
    wish = config.data.template
    beside = folder / wish
    return load_template(base, str(beside) if wish != "auto" and beside.is_file() else wish)


def _read(path: Path, config: Config, mapping: dict[str, str]) -> ReadFile:
    return read_rows(path, format=config.data.format, mapping={**config.data.map, **mapping})


def _file_records(paths: Sequence[str]) -> list[dict[str, Any]]:
    for path in paths:
        if not Path(path).is_file():
            raise DataError("no such file", where=path, remedy="paths in the config are relative to the config file")
    return [{"path": path, "bytes": Path(path).stat().st_size, "sha256": sha256_of_file(Path(path))} for path in paths]


def _key(
    config: Config, files: list[dict[str, Any]], tokenizer: Tokenizer, template: ChatTemplate | None, max_length: int
) -> str:
    section = config.data.model_dump(mode="json", exclude={"train", "max_length"})
    section["eval"] = str(config.data.eval) if _is_share_or_count(config.data.eval) else None
    made_of = {
        "data": section,
        "seed": config.training.seed,
        "max_length": max_length,
        "files": [file["sha256"] for file in files],
        "maps": [source.map if isinstance(source, DataSource) else {} for source in config.data.train],
        "tokenizer": tokenizer.fingerprint,
        "template": template.text if template else None,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _is_share_or_count(wish: object) -> bool:
    return not isinstance(wish, str) or wish.rstrip().endswith("%")


def _split(
    config: Config, read: list[ReadFile], read_held_out: list[ReadFile]
) -> tuple[Sequence[Row], Sequence[Row], list[str]]:
    rows = [row for file in read for row in file.rows]
    if read_held_out:
        return rows, read_held_out[0].rows, []
    if config.data.eval in (None, 0):
        return rows, [], ["no held-out rows: nothing will show whether the model got better"]
    train, held_out = split_rows(rows, config.data.eval, config.training.seed)
    return train, held_out, [f"held out {len(held_out)} of {len(rows)} rows (data.eval {config.data.eval})"]


def _encode(
    rows: Sequence[Row],
    files: Sequence[ReadFile],
    name: str,
    folder: Path,
    notes: list[str],
    config: Config,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
) -> Shard | None:
    """The rows as a shard, in the order of their files; None for no rows. Problems of all files are raised together."""
    chosen = {id(row) for row in rows}
    encoded: list[EncodedRow] = []
    reports: list[FileProblems] = []
    for file in files:
        own = [row for row in file.rows if id(row) in chosen]
        try:
            part = encode_rows(
                own, tokenizer, template, train_on=config.data.train_on, max_length=max_length,
                overlong=config.data.overlong, source=str(file.path),
            )  # fmt: skip
        except DataError as error:
            reports += error.files
            continue
        encoded += part.rows
        notes += part.notes if own else ()
    if reports:
        raise_for_reports(tuple(reports))
    if not encoded:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return open_shard(write_shard(folder, name, encoded, write=write_durably))


def _file_notes(files: Sequence[ReadFile]) -> list[str]:
    notes = []
    for file in files:
        notes.append(f"{file.path.name}: {len(file.rows)} rows of format {file.format}")
        notes += [f"{file.path.name}: {text}" for text in file.notes]
    return notes
