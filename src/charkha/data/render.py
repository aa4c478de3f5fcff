"""Rows to the exact text that is trained, and which characters of it.

One function renders for training, held-out evaluation and chat, so that a model is asked in the words it was taught.
Prompt/completion and text rows stand as they are plus one end token; conversations go through the chat template, and
what of them is trained is taken from the template's own `{% generation %}` blocks or found by rendering twice.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from charkha.data.jinja_sandbox import TemplateFault, render_template, take_marks
from charkha.data.model_files import SpecialTokens
from charkha.data.rows import ChatRow, PromptRow, Row, TextRow, ToolCall, Turn
from charkha.data.templates import ChatTemplate
from charkha.errors import DataError

TrainOn = Literal["responses", "all"]
Span = tuple[int, int]

_SENTINEL = "\ue0f3\ue0f4\ue0f3"  # private use area: stands for an answer whose place is sought


@dataclass(frozen=True)
class Rendered:
    """Text and the character spans that are trained.

    `add_special_tokens`: the tokenizer's post-processor puts the begin token (templates write their own).
    `continues_prompt` is False where the template's generation prompt is not how it opens an answer.
    """

    text: str
    trained: tuple[Span, ...]
    add_special_tokens: bool
    continues_prompt: bool = True


def render_row(
    row: Row, template: ChatTemplate | None, special: SpecialTokens, train_on: TrainOn = "responses"
) -> Rendered:
    """The row as it is trained.

    A trained span is the assistant's text with its end-of-turn token, without the white space after it; for a
    completion it is the completion with the end token. Raises DataError with the row's line where the template
    refuses the row, or where it cannot be told which characters are the assistant's.
    """
    if isinstance(row, ChatRow):
        return _render_chat(row, template, special, train_on)
    if isinstance(row, PromptRow):
        prompt = _without_bos(row.prompt, special)
        text = _with_end(prompt + row.completion, special)
        start = 0 if train_on == "all" else len(prompt)
        return Rendered(text, ((start, len(text)),), add_special_tokens=True)
    if not isinstance(row, TextRow):
        raise DataError(
            "a row that compares or rates answers is not rendered whole", remedy="render each of its conversations"
        )
    text = _with_end(_without_bos(row.text, special), special)
    return Rendered(text, ((0, len(text)),), add_special_tokens=True)


def render_prompt(prompt: str | Sequence[Turn], template: ChatTemplate | None, special: SpecialTokens) -> Rendered:
    """What the model is given before it answers: the same text that a row with this prompt begins with."""
    if isinstance(prompt, str):
        return Rendered(_without_bos(prompt, special), (), add_special_tokens=True)
    conversation = _Conversation(_required(template, None), tuple(prompt), special)
    try:
        text = conversation.render(conversation.turns, add_generation_prompt=True).text
    except TemplateFault as fault:
        raise _template_error(conversation.template, fault, None) from fault
    return Rendered(text, (), add_special_tokens=False)


def end_of_turn(template: ChatTemplate, special: SpecialTokens) -> str:
    """The text with which the template closes an answer (`<|im_end|>`), empty where it writes none."""
    turns = (Turn("user", "a"), Turn("assistant", _SENTINEL))
    try:
        text = _Conversation(template, turns, special).render(turns).text
    except TemplateFault:
        return ""
    return _first_run(text.partition(_SENTINEL)[2]).strip()


def _without_bos(text: str, special: SpecialTokens) -> str:
    """Text that already begins with the begin token must not get a second one from the post-processor."""
    return text.removeprefix(special.bos) if special.bos and special.prepends_bos else text


def _with_end(text: str, special: SpecialTokens) -> str:
    """The text with the end token exactly once, whoever puts it there."""
    if special.eos is None:
        return text
    text = text.removesuffix(special.eos)
    return text if special.appends_eos else text + special.eos


@dataclass(frozen=True)
class _Marked:
    """A rendered conversation and the spans its template marked itself."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Conversation:
    """Renders any part of one conversation."""

    template: ChatTemplate
    turns: tuple[Turn, ...]
    special: SpecialTokens
    tools: str | None = None

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> _Marked:
        """Text of these turns. Raises TemplateFault."""
        variables: dict[str, object] = {
            "messages": [_message(turn) for turn in turns],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.template.bos_token or self.special.bos or "",
            "eos_token": self.template.eos_token or self.special.eos or "",
            "pad_token": self.special.pad or "",
            "unk_token": self.special.unk or "",
            "tools": None if self.tools is None else json.loads(self.tools),
            "documents": None,
        }
        size = sum(len(turn.content) + sum(len(call.arguments) for call in turn.calls) for turn in turns)
        size += len(self.tools or "")
        return _Marked(*take_marks(render_template(self.template.text, variables, size)))

    def try_text(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str | None:
        """The text, or None where the template refuses these turns: a part of a conversation may be no conversation."""
        try:
            return self.render(turns, add_generation_prompt=add_generation_prompt).text if turns else None
        except TemplateFault:
            return None

    def with_sentinel(self, index: int) -> tuple[Turn, ...]:
        """The turns with the answer at `index` replaced by the sentinel."""
        return (*self.turns[:index], Turn(self.turns[index].role, _SENTINEL), *self.turns[index + 1 :])


def _message(turn: Turn) -> dict[str, object]:
    """A turn as chat templates expect it; arguments of a call are an object, as Hugging Face has it."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    if turn.name is not None:
        message["name"] = turn.name
    if turn.call_id is not None:
        message["tool_call_id"] = turn.call_id
    return message


def _call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    record: dict[str, object] = {"type": "function", "function": function}
    return record if call.id is None else {**record, "id": call.id}


def _require_calls(text: str, turns: Sequence[Turn]) -> None:
    """Raises TemplateFault where a call is not in the text: many templates know no tools and write nothing for it."""
    missing = next((call.name for turn in turns for call in turn.calls if call.name not in text), None)
    if missing is not None:
        raise TemplateFault(f"it does not write tool calls (the call of {missing!r} is missing)")


def _render_chat(row: ChatRow, template: ChatTemplate | None, special: SpecialTokens, train_on: TrainOn) -> Rendered:
    conversation = _Conversation(_required(template, row.line), row.turns, special, row.tools)
    try:
        full = conversation.render(row.turns)
        _require_calls(full.text, row.turns)
        if train_on == "all":
            return Rendered(full.text, ((0, len(full.text)),), add_special_tokens=False)
        return _answers(conversation, full)
    except TemplateFault as fault:
        raise _template_error(conversation.template, fault, row.line) from fault


def _required(template: ChatTemplate | None, line: int | None) -> ChatTemplate:
    if template is None:
        where = None if line is None else f"line {line}"
        raise DataError("conversations need a chat template", where=where, remedy="set data.template: chatml")
    return template


def _template_error(template: ChatTemplate, fault: TemplateFault, line: int | None) -> DataError:
    return DataError(
        f"the chat template refuses the row: {fault} (template: {template.source})",
        where=None if line is None else f"line {line}",
        remedy="correct the row, or choose another template (data.template: chatml)",
    )


def _answers(conversation: _Conversation, full: _Marked) -> Rendered:
    """The rendered conversation with the spans of all answers that are to be trained."""
    answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    trained = [index for index in answers if conversation.turns[index].is_trained]
    if len(full.spans) == len(answers):
        by_turn = dict(zip(answers, full.spans, strict=True))
        spans = [_without_white_space_after(full.text, by_turn[index], conversation.turns[index]) for index in trained]
        return Rendered(full.text, tuple(spans), add_special_tokens=False)
    if full.spans and len(trained) == len(answers):
        return Rendered(full.text, full.spans, add_special_tokens=False)
    found = [_find_answer(conversation, full.text, index) for index in trained]
    spans = [span for span, _ in found]
    if any(earlier[1] > later[0] for earlier, later in itertools.pairwise(spans)):
        raise _no_spans()
    return Rendered(full.text, tuple(spans), False, all(continues for _, continues in found))


def _without_white_space_after(text: str, span: Span, turn: Turn) -> Span:
    """A marked span without a newline behind its end token; white space that the answer itself ends with stays."""
    inside = text[span[0] : span[1]]
    if not turn.calls and inside.rstrip().endswith(turn.content.rstrip()):
        return span
    return span[0], span[0] + len(inside.rstrip())


def _find_answer(conversation: _Conversation, text: str, index: int) -> tuple[Span, bool]:
    """The span of one answer, and whether it begins where the generation prompt ends."""
    earlier = conversation.turns[:index]
    opening = conversation.try_text(earlier, add_generation_prompt=True)
    start = len(opening) if opening is not None and text.startswith(opening) else None
    is_last = index == len(conversation.turns) - 1
    closing = text if is_last else conversation.try_text(conversation.turns[: index + 1])
    if start is not None and closing is not None and text.startswith(closing):
        end = _end_between(text, start, len(closing), conversation.turns[index])
        if end is not None:
            return (start, end), True
    return _find_by_sentinel(conversation, text, index, start), start is not None


def _end_between(text: str, start: int, stop: int, turn: Turn) -> int | None:
    """Where the answer and its end-of-turn token end inside `text[start:stop]`; None if the answer was rewritten.

    How a call is written is the template's own: all of it but the white space after it belongs to the answer.
    """
    segment = text[start:stop]
    if turn.calls:
        return start + len(segment.rstrip())
    content = turn.content
    lead = len(segment) - len(segment.lstrip())
    body = content.strip()
    if not segment.startswith(body, lead):
        return None
    content_end = start + lead + len(body)
    return content_end + len(_first_run(text[content_end:stop]))


def _first_run(text: str) -> str:
    """Leading white space and the first word after it: an end-of-turn token; empty when there is only white space."""
    match = re.match(r"\s*\S+", text)
    return match[0] if match else ""


def _find_by_sentinel(conversation: _Conversation, text: str, index: int, start: int | None) -> Span:
    """For templates that rewrite turns: put a mark in the answer's place and compare what stands around it.

    Qwen3, for one, leaves the thinking out of earlier answers, so that a conversation does not begin with the text of
    its own first half.
    """
    turns = conversation.with_sentinel(index)
    before, mark, after = conversation.render(turns).text.partition(_SENTINEL)
    if not mark or _SENTINEL in after or not text.endswith(after):
        raise _no_spans()
    if start is None:
        if not text.startswith(before):
            raise _no_spans()
        start = len(before)
    content_end = len(text) - len(after)
    if content_end < start:
        raise _no_spans()
    alone = conversation.try_text(turns[: index + 1]) or ""
    return start, content_end + len(_shared_end(_first_run(alone.partition(_SENTINEL)[2]), after))


def _shared_end(end_of_last_turn: str, after: str) -> str:
    """The end-of-turn token as it stands here: templates may close only the last turn, or close it twice."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(end_of_last_turn, after, strict=False))
    shared = "".join(letter for letter, _ in same)
    return shared if shared == end_of_last_turn else shared[: shared.rfind(">") + 1]


def _no_spans() -> TemplateFault:
    return TemplateFault(
        "it rewrites the conversation so that the assistant's words cannot be told from the rest; "
        "set data.train_on: all, or mark them in the template with {% generation %}"
    )
