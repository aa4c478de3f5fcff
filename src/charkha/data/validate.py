"""One record to one row, or to the first reason why it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from charkha.data.fields import Fields, RowFault, answer_text, clean, list_field, optional_text, parsed_list
from charkha.data.preferences import preference_row, rated_row
from charkha.data.records import Record
from charkha.data.rows import ChatRow, PromptRow, Row, TextRow, Turn
from charkha.data.strict_json import json_type
from charkha.data.trees import tree_row
from charkha.data.turns import check_order, read_tools, read_turns
from charkha.errors import Problem


def read_row(record: Record, layout: str) -> Row | Problem:
    """The row in the given layout, or the first thing wrong with it."""
    try:
        if not isinstance(record.value, dict):
            raise RowFault(None, f"not an object: the row is of type {json_type(record.value)}")
        return _READERS[layout](record.value, record.line)
    except RowFault as fault:
        return Problem(fault.reason, record.line, fault.field)


def _messages_row(fields: Fields, line: int) -> ChatRow:
    turns = read_turns(list_field(fields, "messages"), "messages")
    check_order(turns, "messages")
    return ChatRow(turns, line, read_tools(fields))


def _sharegpt_row(fields: Fields, line: int) -> ChatRow:
    turns = read_turns(list_field(fields, "conversations"), "conversations")
    system = optional_text(fields, "system")
    if system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    check_order(turns, "conversations")
    return ChatRow(turns, line, read_tools(fields))


def _alpaca_row(fields: Fields, line: int) -> ChatRow:
    """User = instruction and input with a blank line between; `history` is earlier [question, answer] pairs."""
    parts = [optional_text(fields, "instruction", required=True), optional_text(fields, "input")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise RowFault("instruction", "missing prompt: instruction and input are empty")
    answer = answer_text(fields, "output")
    system = optional_text(fields, "system")
    opening = (Turn("system", system),) if system.strip() else ()
    return ChatRow((*opening, *_history(fields), Turn("user", prompt), Turn("assistant", answer)), line)


def _history(fields: Fields) -> tuple[Turn, ...]:
    history = fields.get("history")
    if history in (None, "", []):
        return ()
    if isinstance(history, str):
        history = parsed_list(history, "history")
    if not isinstance(history, list):
        raise RowFault("history", f"wrong type: {json_type(history)} where an array of pairs is needed")
    turns: list[Turn] = []
    for index, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part.strip() for part in pair)
        ):
            raise RowFault(f"history[{index}]", "wrong type: each entry is a pair of texts, question and answer")
        turns += [Turn("user", clean(pair[0], "history")), Turn("assistant", clean(pair[1], "history"))]
    return tuple(turns)


def _prompt_completion_row(fields: Fields, line: int) -> PromptRow | ChatRow:
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        return _conversational_prompt(fields, line)
    prompt = optional_text(fields, "prompt", required=True)
    if not prompt.strip():
        raise RowFault(
            "prompt", "missing prompt: it is empty" if not prompt else "missing prompt: it is only white space"
        )
    return PromptRow(prompt, answer_text(fields, "completion"), line)


def _conversational_prompt(fields: Fields, line: int) -> ChatRow:
    """Prompt and completion as lists of messages: only the completion is trained, as TRL does it."""
    prompt = read_turns(list_field(fields, "prompt"), "prompt")
    completion = read_turns(list_field(fields, "completion"), "completion")
    earlier = tuple(replace(turn, weight=0 if turn.role == "assistant" else None) for turn in prompt)
    check_order((*earlier, *completion), "completion")
    return ChatRow((*earlier, *completion), line, read_tools(fields))


def _text_row(fields: Fields, line: int) -> TextRow:
    text = optional_text(fields, "text", required=True)
    if not text.strip():
        raise RowFault("text", "empty text" if not text else "empty text: only white space")
    return TextRow(text, line)


_READERS: dict[str, Callable[[Fields, int], Row]] = {
    "messages": _messages_row,
    "sharegpt": _sharegpt_row,
    "alpaca": _alpaca_row,
    "prompt_completion": _prompt_completion_row,
    "text": _text_row,
    "preference": preference_row,
    "kto": rated_row,
    "oasst": tree_row,
}
