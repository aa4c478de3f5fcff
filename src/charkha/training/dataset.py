"""The run's data as everything after its preparation sees it: finished tokens, and what made them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charkha.config import Config
from charkha.data.encoded import EncodedSet
from charkha.data.formats import raise_for_problems, read_rows
from charkha.data.masking import treat_rows
from charkha.data.shards import Shard, open_shard
from charkha.data.templates import ChatTemplate, load_template
from charkha.data.tokenize import encode_rows, end_ids
from charkha.data.tokenizer import Tokenizer, load_tokenizer
from charkha.errors import RunDamaged
from charkha.training.sources import options_of


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
    split: dict[str, Any] = field(default_factory=dict)  # what was held out, and by what wish
    personal: dict[str, Any] | None = None  # what was found and decided; None in runs from before the scan
    personal_report: str | None = None  # the same for people, when the data was prepared and anything was found

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
            "split": self.split,
            "personal": self.personal,
        }


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
    return open_shards(record, folder, tokenizer, chat)


def encode_file(path: Path, config: Config, data: PreparedData) -> EncodedSet:
    """Another file's rows as tokens, read, rendered and masked as the run's own, personal data included."""
    file = read_rows(path, options=options_of(config, None))
    raise_for_problems([file])
    rows = treat_rows([(str(path), file.rows)], config.data.personal, config.data.personal_keep).files[0].rows
    limit = config.data.max_length
    assert isinstance(limit, int)  # frozen in the run folder
    return encode_rows(
        rows, data.tokenizer, data.template, train_on=config.data.train_on, max_length=limit, source=str(path)
    )


def open_shards(
    record: dict[str, Any], folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> PreparedData:
    """The data that the record describes. Raises RunDamaged where a shard is missing or altered."""
    return PreparedData(
        train=open_shard(folder / record["train_shard"]),
        eval=open_shard(folder / record["eval_shard"]) if record["eval_shard"] else None,
        tokenizer=tokenizer,
        template=template,
        key=record["key"],
        files=tuple(record["files"]),
        notes=tuple(record["notes"]),
        has_conversations=record["has_conversations"],
        split=record.get("split", {}),
        personal=record.get("personal"),
    )
