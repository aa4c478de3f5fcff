"""Messages of a chat export to conversations: who answers, where one conversation ends, what is left out.

One person of the export becomes the assistant, everybody else the user. Messages of one side in a row are one turn.
A new conversation begins after a silence of a day, once the one before holds an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from charkha.data.records import ParsedBlock, Record
from charkha.errors import DataError

_SILENCE_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `time_s` counts seconds from any one moment; None where the export does not tell it."""

    author: str
    text: str
    time_s: float | None
    line: int


def choose_assistant(messages: Sequence[Message], wanted: str | None, where: str) -> tuple[str, str]:
    """(author, sentence that tells the choice). Without a wish it is the first to answer somebody else.

    Raises DataError for a name that did not write, and for an export in which only one person did.
    """
    counts = Counter(message.author for message in messages)
    if wanted is not None:
        if wanted not in counts:
            raise DataError(
                f"{wanted!r} wrote no message", where=where, remedy=f"name one of {', '.join(map(repr, counts))}"
            )
        return wanted, f"the assistant is {wanted!r}, everybody else the user"
    first = messages[0].author if messages else ""
    answering = next((message.author for message in messages if message.author != first), None)
    if answering is None:
        raise DataError(
            "nobody answers: the export holds messages of " + (f"{first!r} only" if messages else "nobody"),
            where=where,
            remedy="export a chat between at least two people",
        )
    others = ", ".join(f"{name!r} ({count})" for name, count in counts.most_common(6))
    return answering, f"{answering!r} is taken as the assistant (the first to answer); --assistant NAME: {others}"


def as_conversations(messages: Sequence[Message], assistant: str) -> tuple[ParsedBlock, tuple[str, ...]]:
    """(records of the layout `messages`, notes). Each ends with the assistant; what stands behind is counted."""
    records: list[Record] = []
    left_out = 0
    for part in _cut_at_silences(messages, assistant):
        turns, unused = _turns(part, assistant)
        left_out += unused
        if turns:
            records.append(Record({"messages": turns}, part[0].line))
    notes = (f"{left_out} messages without an answer were left out",) if left_out else ()
    return ParsedBlock(tuple(records)), notes


def _cut_at_silences(messages: Sequence[Message], assistant: str) -> list[list[Message]]:
    parts: list[list[Message]] = [[]]
    for message in messages:
        current = parts[-1]
        if current and _is_silence(current[-1], message) and _holds_an_answer(current, assistant):
            current = []
            parts.append(current)
        current.append(message)
    return [part for part in parts if part]


def _is_silence(before: Message, after: Message) -> bool:
    if before.time_s is None or after.time_s is None:
        return False
    return after.time_s - before.time_s > _SILENCE_S and after.author != before.author


def _holds_an_answer(part: Sequence[Message], assistant: str) -> bool:
    first = next((index for index, message in enumerate(part) if message.author != assistant), len(part))
    return any(message.author == assistant for message in part[first:])


def _turns(part: Sequence[Message], assistant: str) -> tuple[list[dict[str, str]], int]:
    """(turns from the first user's to the last assistant's, messages that are not among them)."""
    authored = [message.author == assistant for message in part]
    if False not in authored or True not in authored[authored.index(False) :]:
        return [], len(part)
    first, last = authored.index(False), len(authored) - authored[::-1].index(True)
    turns: list[dict[str, str]] = []
    for message in part[first:last]:
        role = "assistant" if message.author == assistant else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + message.text
        else:
            turns.append({"role": role, "content": message.text})
    return turns, len(part) - (last - first)
