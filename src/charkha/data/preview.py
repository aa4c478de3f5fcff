"""Which tokens of a row are trained, as plain data for the terminal to colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from charkha.data.encoded import EncodedRow
from charkha.data.joint import special_texts_in
from charkha.data.render import TrainOn
from charkha.data.rows import ChatRow, Row
from charkha.data.templates import ChatTemplate
from charkha.data.tokenize import encode_row_with_texts, end_ids
from charkha.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreviewToken:
    """One token. `text` is what it stands for; empty where it only continues the character of the token before."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewRow:
    """One row as the model sees it. `end_token` is the end token's text if one is trained last, else None."""

    line: int | None
    tokens: tuple[PreviewToken, ...]
    trained_tokens: int
    end_token: str | None
    template: str | None
    special_texts: tuple[str, ...]

    @property
    def ends(self) -> bool:
        """Whether the model is taught to stop here."""
        return self.end_token is not None


def preview_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn = "responses",
    *,
    count: int = 3,
) -> list[PreviewRow]:
    """The first `count` rows, token by token. Raises DataError where the template refuses one."""
    return [_preview(row, tokenizer, template, train_on) for row in rows[:count]]


def _preview(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn) -> PreviewRow:
    encoded, texts = encode_row_with_texts(row, tokenizer, template, train_on)
    ids = [int(token) for token in encoded.input_ids]
    flags = [bool(flag) for flag in encoded.trained]
    tokens = tuple(PreviewToken(*parts) for parts in zip(ids, _with_added(ids, texts, tokenizer), flags, strict=True))
    is_chat = isinstance(row, ChatRow)
    return PreviewRow(
        line=row.line,
        tokens=tokens,
        trained_tokens=sum(flags),
        end_token=_end_token(encoded, tokenizer, template),
        template=template.source if template is not None and is_chat else None,
        special_texts=special_texts_in(row.turns, tokenizer) if isinstance(row, ChatRow) else (),
    )


def _with_added(ids: Sequence[int], texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The texts, with the names of the tokens that the post-processor put around them."""
    named = list(texts)
    for index in (0, len(ids) - 1):
        name = tokenizer.token_text(ids[index])
        if not named[index] and name in tokenizer.special_texts:
            named[index] = name
    return named


def _end_token(encoded: EncodedRow, tokenizer: Tokenizer, template: ChatTemplate | None) -> str | None:
    if not encoded.ends:
        return None
    ends = end_ids(tokenizer, template)
    trained = [int(token) for token in encoded.input_ids[encoded.trained]]
    return next(tokenizer.token_text(token) for token in reversed(trained) if token in ends)
