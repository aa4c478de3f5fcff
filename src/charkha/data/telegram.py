"""Telegram Desktop's JSON export, of one chat or of all, to conversations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from charkha.data.conversations import Message, as_conversations, choose_assistant
from charkha.data.decoding import TextEncoding
from charkha.data.json_arrays import array_blocks
from charkha.data.records import OpenFile, ParsedBlock
from charkha.errors import DataError

_MESSAGES = re.compile(r'(?<!\\)"messages"\s*:\s*(?=\[)')


def is_telegram(value: object) -> bool:
    """Whether a JSON object is such an export: messages with `from` and `date`, at its top or under `chats.list`."""
    if not isinstance(value, dict):
        return False
    chats = value.get("chats")
    listed = chats.get("list") if isinstance(chats, dict) else None
    return any(_is_chat(chat) for chat in (value, *(listed if isinstance(listed, list) else ())))


def _is_chat(chat: object) -> bool:
    messages = chat.get("messages") if isinstance(chat, dict) else None
    return isinstance(messages, list) and any(_is_message(message) for message in messages[:100])


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and "text" in value and bool({"date", "date_unixtime"} & set(value))


def telegram_file(path: Path, text: str, encoding: TextEncoding, assistant: str | None) -> OpenFile:
    """Its chats as rows of the layout `messages`. Raises DataError where nobody answers."""
    chats = [list(_messages(text, match.end())) for match in _MESSAGES.finditer(text)]
    wordless = sum(message is None for chat in chats for message in chat)
    spoken = [[message for message in chat if message is not None] for chat in chats]
    blocks: list[ParsedBlock] = []
    notes = [f"Telegram export: {sum(map(len, spoken))} messages in {len(spoken)} chats"]
    for chat in spoken:
        try:
            name, told = choose_assistant(chat, assistant, str(path))
        except DataError:
            if len(spoken) == 1:
                raise
            notes.append(f"a chat of {len(chat)} messages in which nobody answers was left out")
            continue
        block, more = as_conversations(chat, name)
        blocks.append(block)
        notes += [told, *more]
    if wordless:
        notes.append(f"{wordless} entries without words (calls, pictures, people joining) were left out")
    return OpenFile("telegram", encoding.name, iter(blocks), (*encoding.notes, *dict.fromkeys(notes)))


def _messages(text: str, start: int) -> Iterator[Message | None]:
    """The messages of the array at `start`; None for an entry that holds no words."""
    line = text.count("\n", 0, start)
    decoded = iter([text[start:]])
    for block in array_blocks(decoded):
        for record in block.parse().records:
            yield _message(record.value, line + record.line)


def _message(value: object, line: int) -> Message | None:
    if not isinstance(value, dict) or value.get("type", "message") != "message":
        return None
    words = _words(value.get("text")).strip()
    author = value.get("from")
    if not words or not isinstance(author, str):
        return None
    return Message(author, words, _time(value), line)


def _words(text: Any) -> str:
    """The text: a string, or a list of strings and of `{type, text}` for what is bold, a link, ..."""
    if isinstance(text, str):
        return text
    if not isinstance(text, list):
        return ""
    parts = [part.get("text", "") if isinstance(part, dict) else part for part in text]
    return "".join(part for part in parts if isinstance(part, str))


def _time(value: dict[str, object]) -> float | None:
    try:
        if "date_unixtime" in value:
            return float(str(value["date_unixtime"]))
        return datetime.fromisoformat(str(value["date"])).timestamp()
    except (ValueError, OverflowError, KeyError):
        return None
