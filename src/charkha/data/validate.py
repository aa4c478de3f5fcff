"""One record to one row, or to every reason why it cannot be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

from charkha.data.json_files import json_type
from charkha.data.records import Record
from charkha.data.rows import ChatRow, PromptRow, Role, Row, TextRow, Turn
from charkha.errors import Problem

Fields = dict[str, object]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = frozenset({"tool", "tools", "function", "function_call", "function_response", "observation", "tool_call"})


class RowFault(Exception):
    """Internal to this file: the row being read has this problem. Never reaches a caller."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def read_row(record: Record, layout: str) -> Row | Problem:
    """The row in the given layout, or the first thing wrong with it."""
    try:
        if not isinstance(record.value, dict):
            raise RowFault(None, f"not an object: the row is of type {json_type(record.value)}")
        return _READERS[layout](record.value, record.line)
    except RowFault as fault:
        return Problem(fault.reason, record.line, fault.field)


def _messages_row(fields: Fields, line: int) -> ChatRow:
    turns = _turns(_list_field(fields, "messages"), "messages")
    _check_order(turns, "messages")
    return ChatRow(turns, line)


def _sharegpt_row(fields: Fields, line: int) -> ChatRow:
    turns = _turns(_list_field(fields, "conversations"), "conversations")
    system = _optional_text(fields, "system")
    if system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    _check_order(turns, "conversations")
    return ChatRow(turns, line)


def _alpaca_row(fields: Fields, line: int) -> ChatRow:
    """User = instruction and input with a blank line between; `history` is earlier [question, answer] pairs."""
    parts = [_optional_text(fields, "instruction", required=True), _optional_text(fields, "input")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise RowFault("instruction", "missing prompt: instruction and input are empty")
    answer = _answer(fields, "output")
    system = _optional_text(fields, "system")
    opening = (Turn("system", system),) if system.strip() else ()
    return ChatRow((*opening, *_history(fields), Turn("user", prompt), Turn("assistant", answer)), line)


def _history(fields: Fields) -> tuple[Turn, ...]:
    history = fields.get("history")
    if history in (None, "", []):
        return ()
    if isinstance(history, str):
        history = _parsed_list(history, "history")
    if not isinstance(history, list):
        raise RowFault("history", f"wrong type: {json_type(history)} where an array of pairs is needed")
    turns: list[Turn] = []
    for index, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part.strip() for part in pair)
        ):
            raise RowFault(f"history[{index}]", "wrong type: each entry is a pair of texts, question and answer")
        turns += [Turn("user", _clean(pair[0], "history")), Turn("assistant", _clean(pair[1], "history"))]
    return tuple(turns)


def _prompt_completion_row(fields: Fields, line: int) -> PromptRow | ChatRow:
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        return _conversational_prompt(fields, line)
    prompt = _optional_text(fields, "prompt", required=True)
    if not prompt.strip():
        raise RowFault(
            "prompt", "missing prompt: it is empty" if not prompt else "missing prompt: it is only white space"
        )
    return PromptRow(prompt, _answer(fields, "completion"), line)


def _conversational_prompt(fields: Fields, line: int) -> ChatRow:
    """Prompt and completion as lists of messages: only the completion is trained, as TRL does it."""
    prompt = _turns(_list_field(fields, "prompt"), "prompt")
    completion = _turns(_list_field(fields, "completion"), "completion")
    earlier = tuple(Turn(turn.role, turn.content, 0 if turn.role == "assistant" else None) for turn in prompt)
    _check_order((*earlier, *completion), "completion")
    return ChatRow((*earlier, *completion), line)


def _text_row(fields: Fields, line: int) -> TextRow:
    text = _optional_text(fields, "text", required=True)
    if not text.strip():
        raise RowFault("text", "empty text" if not text else "empty text: only white space")
    return TextRow(text, line)


_READERS: dict[str, Callable[[Fields, int], Row]] = {
    "messages": _messages_row,
    "sharegpt": _sharegpt_row,
    "alpaca": _alpaca_row,
    "prompt_completion": _prompt_completion_row,
    "text": _text_row,
}


def _optional_text(fields: Fields, name: str, *, required: bool = False) -> str:
    """The field's text; null and, unless required, a missing field are the empty text."""
    if required and name not in fields:
        raise RowFault(name, "missing field")
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(name, f"wrong type: {json_type(value)} where text is needed")
    return _clean(value, name)


def _answer(fields: Fields, name: str) -> str:
    answer = _optional_text(fields, name, required=True)
    if not answer.strip():
        raise RowFault(name, "missing answer: it is empty" if not answer else "missing answer: it is only white space")
    return answer


def _clean(text: str, field: str) -> str:
    """The text itself if it can be written as UTF-8, which tokenizers need."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RowFault(field, f"half a character: {code} without its other half at character {error.start}") from None
    return text


def _list_field(fields: Fields, name: str) -> list[object]:
    """The field's array; a CSV cell may hold it as JSON text."""
    if name not in fields:
        raise RowFault(name, "missing field")
    value = fields[name]
    if isinstance(value, str):
        value = _parsed_list(value, name)
    if not isinstance(value, list):
        raise RowFault(name, f"wrong type: {json_type(value)} where an array of messages is needed")
    if not value:
        raise RowFault(name, "no messages: the array is empty")
    return value


def _parsed_list(text: str, name: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError):
        raise RowFault(name, "wrong type: string where an array is needed, and it is not JSON") from None


def _turns(messages: list[object], field: str) -> tuple[Turn, ...]:
    return tuple(_turn(message, f"{field}[{index}]") for index, message in enumerate(messages))


def _turn(message: object, place: str) -> Turn:
    """A message written as {role, content} or {from, value}."""
    if not isinstance(message, dict):
        raise RowFault(place, f"wrong type: {json_type(message)} where a message object is needed")
    role_key, content_key = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    role = _role(message, role_key, place)
    if message.get("tool_calls") or message.get("function_call"):
        raise RowFault(place, "tool turns are not supported yet: the message calls a tool")
    content = _content(message, content_key, place)
    if not content.strip():
        kind = "missing answer" if role == "assistant" else f"empty {role} turn"
        raise RowFault(f"{place}.{content_key}", f"{kind}: it is {'only white space' if content else 'empty'}")
    return Turn(role, content, _weight(message, place))


def _role(message: Fields, key: str, place: str) -> Role:
    if key not in message:
        raise RowFault(f"{place}.{key}", "missing field")
    name = message[key]
    if not isinstance(name, str):
        raise RowFault(f"{place}.{key}", f"wrong type: {json_type(name)} where a role is needed")
    if name.lower() in _TOOL_ROLES:
        raise RowFault(f"{place}.{key}", f"tool turns are not supported yet: role {name!r}")
    role = _ROLES.get(name.lower())
    if role is None:
        raise RowFault(f"{place}.{key}", f"unknown role: {name[:40]!r} (known: system, user, assistant, human, gpt)")
    return role


def _content(message: Fields, key: str, place: str) -> str:
    if key not in message:
        raise RowFault(f"{place}.{key}", "missing field")
    content = message[key]
    if content is None:
        return ""
    if isinstance(content, list):
        content = _joined_parts(content, f"{place}.{key}")
    if not isinstance(content, str):
        raise RowFault(f"{place}.{key}", f"wrong type: {json_type(content)} where text is needed")
    return _clean(content, f"{place}.{key}")


def _joined_parts(parts: list[object], place: str) -> str:
    """Content as `[{"type": "text", "text": ...}]`, the form of several hosted APIs."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowFault(place, "wrong type: a list of parts that are not all text")
    return "".join(cast(list[str], texts))


def _weight(message: Fields, place: str) -> int | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowFault(f"{place}.weight", f"wrong value: weight is 0 or 1, not {weight!r}")
    return weight


def _check_order(turns: tuple[Turn, ...], field: str) -> None:
    """System first if at all, then user and assistant in turn, ending with the assistant.

    A greeting by the assistant before the first user turn is let pass here; templates that cannot render it say so.
    """
    if not any(turn.role == "assistant" for turn in turns):
        raise RowFault(field, "no assistant turn: there is nothing to train")
    if not any(turn.role == "user" for turn in turns):
        raise RowFault(field, "no user turn")
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise RowFault(f"{field}[{index}]", "wrong order: a system turn after the first place")
        if index and turn.role == turns[index - 1].role:
            raise RowFault(f"{field}[{index}]", f"wrong order: two {turn.role} turns in a row")
    if turns[-1].role != "assistant":
        raise RowFault(field, f"no answer at the end: the conversation ends with a {turns[-1].role} turn")
