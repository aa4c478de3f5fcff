"""Rows that compare or rate answers: pairs of a chosen and a rejected one, and single ones with a label."""

from __future__ import annotations

import re

from charkha.data.fields import Fields, RowFault, answer_text, label_field, list_field, optional_text, parsed_list
from charkha.data.rows import PreferenceRow, RatedRow, Turn
from charkha.data.turns import check_order, read_tools, read_turns

_PROMPTS = ("messages", "conversations", "prompt", "question", "instruction", "input")
_DIALOGUE = re.compile(r"\n\n(Human|Assistant): ?")


def preference_row(fields: Fields, line: int) -> PreferenceRow:
    """A pair. Chosen and rejected are texts, messages, or whole conversations that begin alike.

    With whole conversations and no prompt, what both begin with is the prompt.
    """
    chosen, rejected = _side(fields, "chosen"), _side(fields, "rejected")
    prompt = _prompt(fields)
    if not prompt:
        shared = next(
            (index for index, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif all(_never_trained(side[: len(prompt)]) == prompt for side in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if chosen == rejected or not chosen or not rejected:
        raise RowFault("rejected", "no preference: chosen and rejected say the same")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_order((*prompt, *side), name)
    return PreferenceRow(prompt, chosen, rejected, line, read_tools(fields))


def _side(fields: Fields, name: str) -> tuple[Turn, ...]:
    """One answer: a text, a message, or an array of messages."""
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith(("[{", "{")):
        value = _as_json(value, name)
    if isinstance(value, dict):
        return read_turns([value], name)
    if isinstance(value, list):
        return read_turns(list_field({name: value}, name), name)
    text = answer_text(fields, name)
    if _DIALOGUE.match(text):
        return _dialogue(text)
    return (Turn("assistant", text),)


def _as_json(text: str, name: str) -> object:
    """A table's cell that may hold messages; words that only look like it stay words."""
    try:
        return parsed_list(text, name)
    except RowFault:
        return text


def _dialogue(text: str) -> tuple[Turn, ...]:
    r"""Turns of a text written `\n\nHuman: ... \n\nAssistant: ...`."""
    parts = _DIALOGUE.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages: list[object] = [
        {"role": roles[role], "content": words.strip()} for role, words in zip(parts[::2], parts[1::2], strict=True)
    ]
    return read_turns(messages, "chosen")


def _prompt(fields: Fields) -> tuple[Turn, ...]:
    """The turns before the answer, the system's first; empty where the row names none."""
    name = next((name for name in _PROMPTS if fields.get(name)), None)
    if name is None:
        return ()
    value = fields[name]
    if isinstance(value, str) and name in ("messages", "conversations"):
        value = parsed_list(value, name)
    if isinstance(value, list):
        turns = read_turns(value, name)
    elif isinstance(value, str) and _DIALOGUE.match(value):
        turns = _dialogue(value.removesuffix("\n\nAssistant:"))
    else:
        words = optional_text(fields, name)
        more = optional_text(fields, "input") if name == "instruction" else ""
        turns = (Turn("user", "\n\n".join(part for part in (words, more) if part.strip())),)
    system = optional_text(fields, "system")
    opening = (Turn("system", system),) if system.strip() and turns[0].role != "system" else ()
    return (*opening, *_never_trained(turns))


def _never_trained(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Earlier answers stand in the prompt and carry no loss."""
    return tuple(Turn(turn.role, turn.content, 0, turn.calls) if turn.role == "assistant" else turn for turn in turns)


def rated_row(fields: Fields, line: int) -> RatedRow:
    """A conversation, or a prompt and its completion, with a label."""
    name = "kto_tag" if "kto_tag" in fields and "label" not in fields else "label"
    label = label_field(fields, name)
    field = next((name for name in ("messages", "conversations") if fields.get(name)), None)
    if field is not None:
        turns = read_turns(list_field(fields, field), field)
        system = optional_text(fields, "system")
        if system.strip() and turns[0].role != "system":
            turns = (Turn("system", system), *turns)
    else:
        turns = (*_prompt(fields), *_side(fields, "completion" if "completion" in fields else "output"))
    check_order(turns, field or "completion")
    return RatedRow(turns, label, line, read_tools(fields))
