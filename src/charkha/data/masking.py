"""What is done about personal data in rows: reported, masked with stable stand-ins, or the row left out."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from charkha.data.folding import fold
from charkha.data.formats import ReadFile
from charkha.data.personal import DETECTORS_VERSION, find_personal
from charkha.data.personal_finds import Find
from charkha.data.rows import ChatRow, PromptRow, Row, TextRow
from charkha.data.scan import Finding, ScannedFile, ScanResult
from charkha.data.scan_report import decision_sentence, markdown_report

Action = Literal["report", "block", "mask", "drop"]


class StandIns:
    """Typed stand-ins: the same value is `<PAN_1>` wherever it stands, however it is written."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = {}

    def of(self, kind: str, value: str) -> str:
        """The stand-in for a value of this kind; numbers are given in the order in which values first appear."""
        known = self._numbers.setdefault(kind, {})
        number = known.setdefault(_same(kind, value), len(known) + 1)
        return f"<{kind.upper()}_{number}>"


def _same(kind: str, value: str) -> str:
    """The value without what may differ in writing: spaces, hyphens, scripts, letter case, a country code."""
    plain = fold(value).text
    if kind == "secret":
        return plain
    if kind in ("email", "upi", "ip_address"):
        return plain.lower()
    compact = re.sub(r"[^0-9A-Za-z\u0080-\uffff]", "", plain).upper()
    return compact[-10:] if kind == "mobile" else compact


@dataclass(frozen=True)
class TreatedFile:
    """The rows of one file after the decision, and what was found in them before. Positions are those before."""

    path: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    rows_with_findings: int

    def record(self) -> dict[str, object]:
        """Counts without values or text, as manifest.json keeps them."""
        by_kind = Counter((finding.kind, finding.confidence) for finding in self.findings)
        counts: dict[str, dict[str, int]] = {}
        for (kind, confidence), count in sorted(by_kind.items()):
            counts.setdefault(kind, {"high": 0, "medium": 0})[confidence] = count
        return {"path": self.path, "rows_with_findings": self.rows_with_findings, "counts": counts}


@dataclass(frozen=True)
class Treatment:
    """What was decided and done over all files of a data set."""

    action: Action
    kept_kinds: tuple[str, ...]
    files: tuple[TreatedFile, ...]
    masked: int
    dropped_rows: int

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding of every file, in order."""
        return tuple(finding for file in self.files for finding in file.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind, the most frequent first."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())

    def record(self) -> dict[str, object]:
        """The decision and its numbers, without any value, for manifest.json."""
        return {
            "action": self.action,
            "kept_kinds": list(self.kept_kinds),
            "detectors": DETECTORS_VERSION,
            "findings": len(self.findings),
            "counts": self.counts,
            "masked": self.masked,
            "dropped_rows": self.dropped_rows,
            "files": [file.record() for file in self.files],
        }


def treat_rows(files: Iterable[tuple[str, Sequence[Row]]], action: Action, kept_kinds: Sequence[str] = ()) -> Treatment:
    """Looks through rows and does what `action` says to all finds but those of `kept_kinds`; stand-ins go through all
    files. `report` and `block` leave the rows as they are: who asked for `block` looks at the findings.
    """
    stand_ins = StandIns()
    treated: list[TreatedFile] = []
    masked = dropped = 0
    for path, rows in files:
        kept: list[Row] = []
        findings: list[Finding] = []
        found_in = 0
        for row in rows:
            finds = [_wanted(find_personal(text), kept_kinds) for _, text in texts_of(row)]
            count = sum(map(len, finds))
            found_in += count > 0
            for (field, _), found in zip(texts_of(row), finds, strict=True):
                findings += (Finding(f.kind, path, row.line, field, f.start, f.end, f.confidence) for f in found)
            if count and action == "drop":
                dropped += 1
                continue
            if count and action == "mask":
                masked += count
                row = _masked(row, finds, stand_ins)
            kept.append(row)
        treated.append(TreatedFile(path, tuple(kept), tuple(findings), found_in))
    return Treatment(action, tuple(kept_kinds), tuple(treated), masked, dropped)


def treatment_report(treatment: Treatment, files: Sequence[ReadFile]) -> str:
    """The Markdown report of what was found in the files and done about it, dated now. `files` as they were read."""
    scanned = tuple(
        ScannedFile(
            file.report(),
            hashlib.sha256(file.path.read_bytes()).hexdigest(),
            sum(len(text) for row in file.rows for _, text in texts_of(row)),
        )
        for file in files
    )
    done = decision_sentence(treatment.action, treatment.masked, treatment.dropped_rows)
    if treatment.kept_kinds:
        done += f" Kinds that were left alone and not counted: {', '.join(treatment.kept_kinds)}."
    result = ScanResult(scanned, treatment.findings, None, None)
    return markdown_report(result, done, time.strftime("%Y-%m-%d %H:%M %z"))


def _wanted(finds: tuple[Find, ...], kept_kinds: Sequence[str]) -> tuple[Find, ...]:
    return tuple(find for find in finds if find.kind not in kept_kinds) if kept_kinds else finds


def texts_of(row: Row) -> tuple[tuple[str, str], ...]:
    """(field, text) of all that a row says, in the layout of our own JSONL files."""
    if isinstance(row, ChatRow):
        return tuple((f"messages[{index}].content", turn.content) for index, turn in enumerate(row.turns))
    if isinstance(row, PromptRow):
        return (("prompt", row.prompt), ("completion", row.completion))
    return (("text", row.text),)


def _with_texts(row: Row, texts: Sequence[str]) -> Row:
    if isinstance(row, ChatRow):
        turns = tuple(replace(turn, content=text) for turn, text in zip(row.turns, texts, strict=True))
        return replace(row, turns=turns)
    if isinstance(row, PromptRow):
        return replace(row, prompt=texts[0], completion=texts[1])
    assert isinstance(row, TextRow)
    return replace(row, text=texts[0])


def _masked(row: Row, finds: Sequence[Sequence[Find]], stand_ins: StandIns) -> Row:
    pairs = zip(texts_of(row), finds, strict=True)
    return _with_texts(row, [mask_text(text, found, stand_ins) for (_, text), found in pairs])


def mask_text(text: str, finds: Sequence[Find], stand_ins: StandIns) -> str:
    """The text with every find replaced by its stand-in. `finds` come left to right and do not overlap."""
    parts: list[str] = []
    done = 0
    for find in finds:
        parts += (text[done : find.start], stand_ins.of(find.kind, text[find.start : find.end]))
        done = find.end
    return "".join((*parts, text[done:]))
