"""Messages to turns: the names that tools give to roles, content in parts, function calls, and the order of turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from charkha.data.fields import Fields, RowFault, clean
from charkha.data.rows import Role, ToolCall, Turn
from charkha.data.strict_json import json_type

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "agent": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tools": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_CALLING_ROLES = frozenset({"function_call", "tool_call"})
# Spellings of (role, content) in one message, the first that fits is taken.
_SPELLINGS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("role", "text"),
              ("from", "text"), ("speaker", "text"), ("user", "text"))  # fmt: skip


def read_turns(messages: list[object], field: str) -> tuple[Turn, ...]:
    """The turns of an array of messages."""
    return tuple(_turn(message, f"{field}[{index}]") for index, message in enumerate(messages))


def _turn(message: object, place: str) -> Turn:
    """A message written as {role, content}, {from, value}, or in another of the known spellings."""
    if not isinstance(message, dict):
        raise RowFault(place, f"wrong type: {json_type(message)} where a message object is needed")
    role_key, content_key = _spelling(message)
    role, is_call = _role(message, role_key, place)
    calls = _calls(message, place)
    if calls and role != "assistant":
        raise RowFault(place, f"wrong order: a {role} turn calls a tool; only the assistant does")
    if not calls or content_key in message:
        content = _content(message, content_key, place)
    else:
        content = ""
    if is_call:
        calls, content = _written_calls(content, f"{place}.{content_key}"), ""
    if not content.strip() and not calls and role != "tool":
        kind = "missing answer" if role == "assistant" else f"empty {role} turn"
        raise RowFault(f"{place}.{content_key}", f"{kind}: it is {'only white space' if content else 'empty'}")
    name, call_id = _text_or_none(message, "name"), _text_or_none(message, "tool_call_id")
    return Turn(role, content, _weight(message, place), calls, *((name, call_id) if role == "tool" else (None, None)))


def _spelling(message: Fields) -> tuple[str, str]:
    if "role" in message and "content" in message:
        return _SPELLINGS[0]
    role = "from" if "role" not in message and "from" in message else "role"
    usual = (role, "value" if role == "from" else "content")
    return next((names for names in _SPELLINGS if set(names) <= set(message)), usual)


def _role(message: Fields, key: str, place: str) -> tuple[Role, bool]:
    """(role, whether the message is nothing but a call)."""
    if key not in message:
        raise RowFault(f"{place}.{key}", "missing field")
    name = message[key]
    if not isinstance(name, str):
        raise RowFault(f"{place}.{key}", f"wrong type: {json_type(name)} where a role is needed")
    role = _ROLES.get(name.strip().lower())
    if role is None:
        known = "system, user, assistant, tool, human, gpt"
        raise RowFault(f"{place}.{key}", f"unknown role: {name[:40]!r} (known: {known})")
    return role, name.strip().lower() in _CALLING_ROLES


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
    return clean(content, f"{place}.{key}")


def _joined_parts(parts: list[object], place: str) -> str:
    """Content as `[{"type": "text", "text": ...}]`, the form of several hosted APIs."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowFault(place, "wrong type: a list of parts that are not all text")
    return "".join(cast(list[str], texts))


def _text_or_none(message: Fields, key: str) -> str | None:
    value = message.get(key)
    return value if isinstance(value, str) and value else None


def _weight(message: Fields, place: str) -> int | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowFault(f"{place}.weight", f"wrong value: weight is 0 or 1, not {weight!r}")
    return 1 if weight else 0


def _calls(message: Fields, place: str) -> tuple[ToolCall, ...]:
    """`tool_calls` of OpenAI's chat API, or its older `function_call`."""
    calls = message.get("tool_calls")
    single = message.get("function_call")
    if not calls and single:
        return (_call(single, None, f"{place}.function_call"),)
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise RowFault(f"{place}.tool_calls", f"wrong type: {json_type(calls)} where an array of calls is needed")
    found = []
    for index, call in enumerate(calls):
        where = f"{place}.tool_calls[{index}]"
        if not isinstance(call, dict):
            raise RowFault(where, f"wrong type: {json_type(call)} where a call object is needed")
        identity = call.get("id")
        found.append(_call(call.get("function", call), identity if isinstance(identity, str) else None, where))
    return tuple(found)


def _call(call: object, identity: str | None, place: str) -> ToolCall:
    """A call `{name, arguments}`; the arguments are an object, or the JSON text of one."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise RowFault(place, "broken tool call: it names no function")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json_object(arguments or "{}", f"{place}.arguments")
    if not isinstance(arguments, dict):
        raise RowFault(f"{place}.arguments", f"broken tool call: the arguments are a JSON {json_type(arguments)}")
    return ToolCall(call["name"], clean(json.dumps(arguments, ensure_ascii=False), place), identity)


def _written_calls(content: str, place: str) -> tuple[ToolCall, ...]:
    """A turn that is the JSON text of one call or of a list of them, as ShareGPT data has it."""
    value = _json_object(content, place)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowFault(place, "broken tool call: the list is empty")
    return tuple(_call(call, None, place) for call in calls)


def _json_object(text: str, place: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowFault(place, f"broken tool call: not JSON: {reason}") from None


def read_tools(fields: Fields) -> str | None:
    """The functions of a row as JSON text, None where it has none. A column may hold them as text."""
    tools = fields.get("tools", fields.get("functions"))
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowFault("tools", f"broken tool call: the list of tools is not JSON: {error}") from None
    if tools in (None, [], {}):
        return None
    listed = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in listed):
        raise RowFault("tools", "broken tool call: each tool is an object that describes a function")
    return clean(json.dumps(listed, ensure_ascii=False), "tools")


def check_order(turns: Sequence[Turn], field: str) -> None:
    """System first if at all, then user and assistant in turn, ending with the assistant; tools answer calls.

    A greeting by the assistant before the first user turn is let pass here; templates that cannot render it say so.
    """
    roles = [turn.role for turn in turns]
    if set(roles) == {"system"}:
        raise RowFault(field, "only a system turn: there is nothing to train")
    if "assistant" not in roles:
        raise RowFault(field, "no assistant turn: there is nothing to train")
    if "user" not in roles:
        raise RowFault(field, "no user turn")
    for index, turn in enumerate(turns):
        _check_place(turns, index, turn, f"{field}[{index}]")
    if roles[-1] != "assistant":
        raise RowFault(field, f"no answer at the end: the conversation ends with a {roles[-1]} turn")


def _check_place(turns: Sequence[Turn], index: int, turn: Turn, place: str) -> None:
    before = turns[index - 1] if index else None
    if turn.role == "system" and before is not None:
        raise RowFault(place, "wrong order: a system turn after the first place")
    if turn.role == "tool" and (before is None or not (before.role == "tool" or before.calls)):
        raise RowFault(place, "wrong order: a tool turn that no call stands before")
    if before is not None and turn.role == before.role != "tool":
        raise RowFault(place, f"wrong order: two {turn.role} turns in a row")
    if before is not None and before.calls and turn.role == "user":
        raise RowFault(place, "wrong order: a user turn where the tool's answer is due")
