"""Rows to token sequences that say of each token whether it is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.encoded import EncodedCounts, EncodedRow, EncodedSet
from charkha.data.formats import raise_for_reports
from charkha.data.jinja_sandbox import FIXED_DATE
from charkha.data.joint import encode_guarded, guard_turns, restore
from charkha.data.overlong import Overlong, fit_row
from charkha.data.render import Rendered, TrainOn, end_of_turn, render_prompt, render_row
from charkha.data.rows import ChatRow, PromptRow, Row, Turn
from charkha.data.templates import ChatTemplate
from charkha.data.tokenizer import Encoding, Tokenizer
from charkha.errors import DataError, FileProblems, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows are tokenized some hundred at a time: enough for every thread, little enough to keep memory flat.
_BATCH_ROWS = 512


@lru_cache(maxsize=8)
def end_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> frozenset[int]:
    """Every token on which an answer ends: the tokenizer's, the model's, and the template's end of turn."""
    text = "" if template is None else end_of_turn(template, tokenizer.special)
    token = tokenizer.token_id(text) if text else None
    return tokenizer.end_ids if token is None else tokenizer.end_ids | {token}


def encode_row(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn = "responses"
) -> EncodedRow:
    """One row's tokens, whatever their number. Raises DataError where the template refuses the row."""
    return encode_row_with_texts(row, tokenizer, template, train_on)[0]


def encode_row_with_texts(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn = "responses"
) -> tuple[EncodedRow, tuple[str, ...]]:
    """The encoded row and the characters each token stands for.

    Together the texts are the rendered text. A token that continues a character begun by an earlier one has none.
    """
    prepared = _prepare(row, tokenizer, template, train_on)
    encoding = _encode_prepared([prepared], tokenizer)[0]
    text = _real_rendering(prepared).text
    reached = np.concatenate([[0], np.maximum.accumulate(encoding.offsets[:, 1])])
    starts = np.maximum(encoding.offsets[:, 0], reached[:-1])
    texts = tuple(text[start:stop] for start, stop in zip(starts, encoding.offsets[:, 1], strict=True))
    return _finish(prepared, encoding, end_ids(tokenizer, template)), texts


def encode_prompt(
    prompt: str | Sequence[Turn], tokenizer: Tokenizer, template: ChatTemplate | None
) -> NDArray[np.int32]:
    """Token ids to generate from: what a row with this prompt begins with, up to the first trained token."""
    if isinstance(prompt, str):
        rendered = render_prompt(prompt, template, tokenizer.special)
        ids, _ = tokenizer.encode(rendered.text, rendered.add_special_tokens)
        return ids[:-1] if tokenizer.special.appends_eos else ids
    guarded = guard_turns(prompt, tokenizer)
    rendered = render_prompt(guarded.turns, template, tokenizer.special)
    if guarded.words:
        return encode_guarded(rendered, guarded.words, tokenizer).ids
    return tokenizer.encode(rendered.text, rendered.add_special_tokens)[0]


@dataclass(frozen=True)
class EncodeSettings:
    """All that decides what tokens rows become. `max_length` None sets no limit."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    train_on: TrainOn = "responses"
    max_length: int | None = None
    overlong: Overlong = "error"


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """`rows[i]` is what row i became: one row, none, or several pieces. `tally` counts what has to be told."""

    rows: tuple[tuple[EncodedRow, ...], ...]
    problems: tuple[Problem, ...]
    tally: Counter[str]


def encode_block(rows: Sequence[Row], settings: EncodeSettings) -> EncodedBlock:
    """Rows with their tokens; a row that cannot be used has none and stands in `problems`. Never raises DataError."""
    problems: list[Problem] = []
    tally: Counter[str] = Counter()
    kept: list[tuple[EncodedRow, ...]] = [() for _ in rows]
    for index, encoded, has_words in _encoded(rows, settings, problems):
        row = rows[index]
        fitted = fit_row(encoded, row, settings.max_length, settings.overlong)
        kept[index] = fitted.rows
        if fitted.problem is not None:
            problems.append(fitted.problem)
        if fitted.fate is not None:
            tally[fitted.fate] += 1
        tally.update(_particulars(row, encoded, has_words))
    problems.sort(key=lambda problem: problem.line or 0)
    return EncodedBlock(tuple(kept), tuple(problems), tally)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    train_on: TrainOn = "responses",
    max_length: int | None = None,
    overlong: Overlong = "error",
    source: str = "data",
) -> EncodedSet:
    """All rows, in their order; `max_length` None sets no limit.

    Raises DataError with every row that the template refuses, that is too long (`overlong="error"`), or in which
    nothing is trained; `source` is the file named there. What is cut or left out is counted in the notes.
    """
    block = encode_block(rows, EncodeSettings(tokenizer, template, train_on, max_length, overlong))
    if block.problems:
        good = len(rows) - len(block.problems)
        raise_for_reports((FileProblems(source, None, None, good, block.problems),))
    kept = [encoded for pieces in block.rows for encoded in pieces]
    counts = _counts(kept, block.tally)
    has_conversations = any(isinstance(row, ChatRow) for row in rows)
    return EncodedSet(tuple(kept), counts, (*counts.notes(), *source_notes(tokenizer, template, has_conversations)))


def source_notes(tokenizer: Tokenizer, template: ChatTemplate | None, has_conversations: bool) -> tuple[str, ...]:
    """What has to be told of tokenizer and template themselves."""
    notes: list[str] = []
    if template is not None and has_conversations:
        notes.append(f"chat template: {template.source}")
        if "strftime_now" in template.text:
            notes.append(f"the template asks for today's date: it is given {FIXED_DATE:%d %b %Y}, always")
    return (*notes, *tokenizer.notes)


@dataclass(frozen=True)
class _Prepared:
    """A rendered row. `words` is not empty where messages hold names of special tokens."""

    row: Row
    rendered: Rendered
    words: dict[str, str]


def _prepare(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn) -> _Prepared:
    words: dict[str, str] = {}
    guarded: Row = row
    if isinstance(row, ChatRow):
        guard = guard_turns(row.turns, tokenizer, row.tools)
        words, guarded = guard.words, replace(row, turns=guard.turns, tools=guard.tools)
    return _Prepared(row, render_row(guarded, template, tokenizer.special, train_on), words)


def _encoded(
    rows: Sequence[Row], settings: EncodeSettings, problems: list[Problem]
) -> Iterator[tuple[int, EncodedRow, bool]]:
    """(number of the row, its tokens, whether its words name special tokens), batch by batch.

    Rows that cannot be rendered go to `problems`.
    """
    tokenizer, template = settings.tokenizer, settings.template
    ends = end_ids(tokenizer, template)
    for first in range(0, len(rows), _BATCH_ROWS):
        batch: list[_Prepared] = []
        numbers: list[int] = []
        for index in range(first, min(first + _BATCH_ROWS, len(rows))):
            try:
                batch.append(_prepare(rows[index], tokenizer, template, settings.train_on))
                numbers.append(index)
            except DataError as error:
                problems.append(Problem(error.message, rows[index].line))
        for index, prepared, encoding in zip(numbers, batch, _encode_prepared(batch, tokenizer), strict=True):
            yield index, _finish(prepared, encoding, ends), bool(prepared.words)


def _encode_prepared(batch: Sequence[_Prepared], tokenizer: Tokenizer) -> list[Encoding]:
    """One encoding a row. Rows with and without the post-processor's tokens go to the library separately."""
    encodings: dict[int, Encoding] = {}
    for add_special_tokens in (False, True):
        chosen = [
            index
            for index, prepared in enumerate(batch)
            if not prepared.words and prepared.rendered.add_special_tokens == add_special_tokens
        ]
        texts = [batch[index].rendered.text for index in chosen]
        encodings.update(zip(chosen, tokenizer.encode_batch(texts, add_special_tokens), strict=True))
    for index, prepared in enumerate(batch):
        if prepared.words:
            encodings[index] = encode_guarded(prepared.rendered, prepared.words, tokenizer)
    return [encodings[index] for index in range(len(batch))]


def _real_rendering(prepared: _Prepared) -> Rendered:
    return restore(prepared.rendered, prepared.words) if prepared.words else prepared.rendered


def _finish(prepared: _Prepared, encoding: Encoding, ends: frozenset[int]) -> EncodedRow:
    """Trained characters to trained tokens: a token that overlaps a span is trained."""
    rendered = _real_rendering(prepared)
    trained, straddles = _flags_by_ends(rendered, encoding) or _flags_by_offsets(rendered, encoding, ends)
    return EncodedRow(
        encoding.ids,
        trained,
        prepared.row.line,
        _ends(rendered.text, encoding, trained, ends),
        boundary_merge=straddles,
        continues_prompt=rendered.continues_prompt,
    )


def _flags_by_ends(rendered: Rendered, encoding: Encoding) -> tuple[NDArray[np.bool_], bool] | None:
    """As `_flags_by_offsets`, from the tokens at both ends of each span alone.

    None where that does not tell: the post-processor adds tokens, or a character at an end belongs to none.
    """
    if rendered.add_special_tokens or encoding.made is None:
        return None
    trained = np.zeros(len(encoding.ids), dtype=np.bool_)
    straddles = False
    for start, stop in rendered.trained:
        first, last = encoding.token_at(start), encoding.token_at(stop - 1)
        before = encoding.token_at(start - 1) if start else -1
        after = encoding.token_at(stop) if stop < len(rendered.text) else len(trained)
        if stop <= start or first is None or last is None or before is None or after is None:
            return None
        trained[first : after + (last == after)] = True
        straddles = straddles or before == first
    return trained, straddles


def _flags_by_offsets(rendered: Rendered, encoding: Encoding, ends: frozenset[int]) -> tuple[NDArray[np.bool_], bool]:
    """(which tokens are trained, whether one begins before its span)."""
    starts, stops = encoding.offsets[:, 0], encoding.offsets[:, 1]
    trained = np.zeros(len(encoding.ids), dtype=np.bool_)
    straddles = False
    for start, stop in rendered.trained:
        trained |= (starts < stop) & (stops > start)
        trained |= (starts == stops) & (starts >= start) & (starts < stop)
        straddles = straddles or bool(((starts < start) & (stops > start)).any())
        if stop == len(rendered.text) and len(starts) and starts[-1] == stop:
            trained[-1] |= int(encoding.ids[-1]) in ends  # an end token that the post-processor put behind the text
    return trained, straddles


def _ends(text: str, encoding: Encoding, trained: NDArray[np.bool_], ends: frozenset[int]) -> bool:
    """Whether the last trained token is an end token; white space behind one (`train_on: all`) does not count."""
    for index in np.flatnonzero(trained)[::-1]:
        if int(encoding.ids[index]) in ends:
            return True
        start, stop = encoding.characters_of(int(index))
        if not text[start:stop].isspace():
            return False
    return False


def _particulars(row: Row, encoded: EncodedRow, has_words: bool) -> list[str]:
    """The names of the counts that this row adds to."""
    found = {
        "boundary_merges": encoded.boundary_merge,
        "without_end": not encoded.ends,
        "other_opening": not encoded.continues_prompt,
        "glued": isinstance(row, PromptRow) and not (row.prompt[-1:].isspace() or row.completion[:1].isspace()),
        "special_text": has_words,
    }
    return [name for name, applies in found.items() if applies]


def _counts(kept: Sequence[EncodedRow], tally: Counter[str]) -> EncodedCounts:
    return EncodedCounts(
        rows=len(kept),
        tokens=sum(len(row) for row in kept),
        trained_tokens=sum(int(row.trained.sum()) for row in kept),
        longest=max((len(row) for row in kept), default=0),
        **tally,
    )
