"""Open Assistant's message trees to conversations: from each tree the path of best-ranked replies."""

from __future__ import annotations

from charkha.data.fields import Fields, RowFault
from charkha.data.rows import ChatRow
from charkha.data.turns import check_order, read_turns


def tree_row(fields: Fields, line: int) -> ChatRow:
    """The best-ranked conversation of a tree, up to its last answer; other replies are not used.

    A reply without a rank comes after those with one; deleted messages are passed over.
    """
    message = fields.get("prompt")
    if not isinstance(message, dict):
        raise RowFault("prompt", "missing field")
    messages: list[object] = []
    while message is not None:
        messages.append({"role": message.get("role"), "content": message.get("text")})
        message = _best_reply(message)
    while len(messages) > 1 and _is_user(messages[-1]):
        messages.pop()
    turns = read_turns(messages, "prompt")
    check_order(turns, "prompt")
    return ChatRow(turns, line)


def _is_user(message: object) -> bool:
    return isinstance(message, dict) and message["role"] in ("prompter", "user")


def _best_reply(message: Fields) -> Fields | None:
    replies = message.get("replies")
    if not isinstance(replies, list):
        return None
    usable = [reply for reply in replies if isinstance(reply, dict) and not reply.get("deleted")]
    if not usable:
        return None
    return min(usable, key=lambda reply: reply["rank"] if isinstance(reply.get("rank"), int) else 1 << 30)
