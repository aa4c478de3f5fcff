"""Rendered text to tokens: one joint tokenization, in which a message cannot smuggle in a special token.

A user who writes `<|im_end|>` in a message means ten characters, not the end of the turn. Such messages are rendered
with a placeholder in the word's place; the template's own special tokens are then cut out, and what lies between them
is tokenized by a tokenizer that is blind to special tokens. All other rows take the ordinary way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from charkha.data.render import Rendered
from charkha.data.rows import Turn
from charkha.data.tokenizer import Encoding, Tokenizer

_FIRST_PLACEHOLDER = 0xF0000  # supplementary private use area: no language writes these


@dataclass(frozen=True)
class Guarded:
    """Turns whose special-token words are placeholders. `words` maps each placeholder back."""

    turns: tuple[Turn, ...]
    words: dict[str, str]
    tools: str | None = None


@lru_cache(maxsize=8)
def _names_pattern(texts: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(re.escape(text) for text in longest_first)) if longest_first else None


def special_texts_in(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The names of special tokens that stand in these messages as plain text."""
    return tuple(guard_turns(turns, tokenizer).words.values())


def guard_turns(turns: Sequence[Turn], tokenizer: Tokenizer, tools: str | None = None) -> Guarded:
    """The turns with every name of a special token replaced; `words` is empty where there is none, as nearly always."""
    pattern = _names_pattern(tokenizer.special_texts)
    if pattern is None or not any(pattern.search(text) for text in _texts(turns, tools)):
        return Guarded(tuple(turns), {}, tools)
    words: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        known = next((mark for mark, word in words.items() if word == match[0]), None)
        mark = known or chr(_FIRST_PLACEHOLDER + len(words))
        words[mark] = match[0]
        return mark

    guarded = tuple(
        replace(
            turn,
            content=pattern.sub(placeholder, turn.content),
            calls=tuple(replace(call, arguments=pattern.sub(placeholder, call.arguments)) for call in turn.calls),
        )
        for turn in turns
    )
    return Guarded(guarded, words, None if tools is None else pattern.sub(placeholder, tools))


def _texts(turns: Sequence[Turn], tools: str | None) -> Iterator[str]:
    for turn in turns:
        yield turn.content
        yield from (call.arguments for call in turn.calls)
    if tools is not None:
        yield tools


def restore(rendered: Rendered, words: dict[str, str]) -> Rendered:
    """The rendered row with the words back in place and its spans moved along."""
    places = [match.start() for match in re.finditer("[" + "".join(words) + "]", rendered.text)]
    growth = [len(words[rendered.text[place]]) - 1 for place in places]

    def moved(position: int) -> int:
        return position + sum(more for place, more in zip(places, growth, strict=True) if place < position)

    spans = tuple((moved(start), moved(end)) for start, end in rendered.trained)
    return replace(rendered, text=_restored(rendered.text, words), trained=spans)


def _restored(text: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text


def encode_guarded(rendered: Rendered, words: dict[str, str], tokenizer: Tokenizer) -> Encoding:
    """Tokens of a row still holding placeholders; offsets are of the restored text."""
    blind = tokenizer.blind_to_special_tokens()
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for piece, is_special in _pieces(rendered.text, tokenizer):
        text = _restored(piece, words)
        token = _special_id(piece, tokenizer) if is_special else None
        if token is not None:
            ids.append(token)
            offsets.append((position, position + len(text)))
        else:
            found, places = blind.encode(text, add_special_tokens=False)
            ids.extend(int(one) for one in found)
            offsets.extend((position + int(start), position + int(end)) for start, end in places)
        position += len(text)
    return Encoding(np.asarray(ids, dtype=np.int32), known=np.asarray(offsets, dtype=np.int64).reshape(-1, 2))


def _special_id(piece: str, tokenizer: Tokenizer) -> int | None:
    """The id of a special token that may have swallowed white space around it."""
    found = tokenizer.token_id(piece)
    return tokenizer.token_id(piece.strip()) if found is None else found


def _pieces(text: str, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text cut at the special tokens that the template itself wrote; each piece with whether it is one."""
    pieces: list[tuple[str, bool]] = []
    position = 0
    for match in re.finditer(tokenizer.special_pattern, text):
        pieces += [(text[position : match.start()], False), (match[0], True)]
        position = match.end()
    return [piece for piece in (*pieces, (text[position:], False)) if piece[0]]
