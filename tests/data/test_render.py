from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from charkha.data.jinja_sandbox import TemplateFault, render_template
from charkha.data.model_files import SpecialTokens
from charkha.data.render import Rendered, end_of_turn, render_prompt, render_row
from charkha.data.rows import ChatRow, PromptRow, TextRow, Turn
from charkha.data.templates import FAMILIES, ChatTemplate, load_template
from charkha.errors import DataError, UsageError

SPECIAL = SpecialTokens(bos="<s>", eos="</s>", prepends_bos=True)
SHARED_TEMPLATES = [
    "alpaca", "chatml", "falcon-instruct", "gemma-it", "llama-2-chat", "llama-3-instruct", "mistral-instruct",
    "phi-3", "qwen2.5-instruct", "vicuna", "zephyr",
]  # fmt: skip
ENDS = {
    "alpaca": "</s>",
    "chatml": "<|im_end|>",
    "falcon-instruct": "",
    "gemma-it": "<end_of_turn>",
    "llama-2-chat": " </s>",
    "llama-3": "<|eot_id|>",
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": "</s>",
    "phi-3": "<|end|>",
    "plain": "</s>",
    "qwen2.5-instruct": "<|im_end|>",
    "vicuna": "</s>",
    "zephyr": "</s>",
    "falcon": "",
    "gemma": "<end_of_turn>",
    "llama-2": " </s>",
    "mistral": "</s>",
    "qwen2.5": "<|im_end|>",
}


def conversation(*contents: str, line: int | None = 1) -> ChatRow:
    roles = ("user", "assistant")
    return ChatRow(tuple(Turn(roles[index % 2], content) for index, content in enumerate(contents)), line)


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.trained]


def template(text: str) -> ChatTemplate:
    return ChatTemplate("test", text)


@pytest.fixture(params=[*(f"shared {name}" for name in SHARED_TEMPLATES), *(f"built-in {name}" for name in FAMILIES)])
def any_template(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTemplate, str]:
    """(template, the end of turn it writes): real ones where they are present, and our own."""
    kind, name = request.param.split(" ")
    if kind == "built-in":
        return load_template(tmp_path, name), ENDS[name]
    text = (request.getfixturevalue("shared") / "chat_templates" / f"{name}.jinja").read_text()
    if name != "qwen2.5-instruct":  # the others are laid out for reading, as their README says
        text = text.replace("    ", "").replace("\n", "")
    return ChatTemplate(name, text, "<s>", "</s>"), ENDS[name]


# Chat templates

SAME = {
    "falcon-instruct": "falcon", "gemma-it": "gemma", "llama-2-chat": "llama-2", "llama-3-instruct": "llama-3",
    "mistral-instruct": "mistral", "phi-3": "phi-3", "qwen2.5-instruct": "qwen2.5", "vicuna": "vicuna",
    "zephyr": "zephyr",
}  # fmt: skip


@pytest.mark.parametrize("published", SAME)
def test_a_built_in_family_writes_what_its_published_template_writes(
    published: str, shared: Path, tmp_path: Path
) -> None:
    text = (shared / "chat_templates" / f"{published}.jinja").read_text()
    if published != "qwen2.5-instruct":
        text = text.replace("    ", "").replace("\n", "")
    theirs = ChatTemplate(published, text, "<s>", "</s>")
    ours = replace(load_template(tmp_path, SAME[published]), bos_token="<s>", eos_token="</s>")
    system = Turn("system", " Be kind.\n")
    for turns in (
        conversation("What?", "This.").turns,
        conversation("a\n\nb ", " c\n\nd", "e", "f").turns,
        (system, *conversation(" x", "y ", "z", "w").turns),
    ):
        assert render_row(ChatRow(turns, 1), ours, SPECIAL).text == render_row(ChatRow(turns, 1), theirs, SPECIAL).text
        prompt = turns[:-1]
        assert render_prompt(prompt, ours, SPECIAL).text == render_prompt(prompt, theirs, SPECIAL).text


def test_exactly_the_answers_and_their_end_tokens_are_trained(any_template: tuple[ChatTemplate, str]) -> None:
    chosen, end = any_template
    rendered = render_row(conversation("What?", "This.", "And e?", "e", "So?", "d>"), chosen, SPECIAL)
    assert [part.lstrip() for part in trained(rendered)] == [f"This.{end}", f"e{end}", f"d>{end}"]
    assert not rendered.add_special_tokens
    assert rendered.continues_prompt


def test_a_prompt_is_the_beginning_of_its_row_up_to_the_trained_answer(any_template: tuple[ChatTemplate, str]) -> None:
    chosen, _ = any_template
    row = conversation("What?", "This.", "And?", "That.")
    rendered = render_row(row, chosen, SPECIAL)
    for number, answer in enumerate((1, 3)):
        assert rendered.text[: rendered.trained[number][0]] == render_prompt(row.turns[:answer], chosen, SPECIAL).text


def test_a_system_turn_is_never_trained(any_template: tuple[ChatTemplate, str]) -> None:
    chosen, end = any_template
    row = ChatRow((Turn("system", "Be kind."), *conversation("What?", "This.").turns), 1)
    rendered = render_row(row, chosen, SPECIAL)
    assert [part.lstrip() for part in trained(rendered)] == [f"This.{end}"]
    assert "Be kind." in rendered.text


def test_the_end_of_turn_is_known(any_template: tuple[ChatTemplate, str]) -> None:
    chosen, end = any_template
    assert end_of_turn(chosen, SPECIAL) == end.strip()


def test_a_weight_of_zero_leaves_an_answer_out(any_template: tuple[ChatTemplate, str]) -> None:
    chosen, end = any_template
    turns = (Turn("user", "a"), Turn("assistant", "same", 0), Turn("user", "a"), Turn("assistant", "same"))
    rendered = render_row(ChatRow(turns, 1), chosen, SPECIAL)
    assert [part.lstrip() for part in trained(rendered)] == [f"same{end}"]
    assert rendered.trained[0][0] > rendered.text.index("same")


def test_train_on_all_trains_every_character(any_template: tuple[ChatTemplate, str]) -> None:
    rendered = render_row(conversation("What?", "This."), any_template[0], SPECIAL, "all")
    assert trained(rendered) == [rendered.text]


THINKING = template(
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages if m.role == 'user' -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- set text = m.content -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set thought = '' -%}"
    "{%- if '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip() -%}"
    "{%- set text = text.split('</think>')[-1].lstrip() -%}"
    "{%- endif -%}"
    "{%- if loop.index0 > ns.last -%}{%- set text = '<think>\n' + thought + '\n</think>\n\n' + text -%}{%- endif -%}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def test_a_template_that_strips_earlier_thinking_trains_what_it_renders() -> None:
    row = conversation("a", "<think>\nhmm\n</think>\n\nfirst", "b", "<think>\nwell\n</think>\n\nsecond")
    rendered = render_row(row, THINKING, SPECIAL)
    assert trained(rendered) == ["first<|im_end|>", "<think>\nwell\n</think>\n\nsecond<|im_end|>"]
    assert trained(render_row(conversation("a", "plain"), THINKING, SPECIAL)) == [
        "<think>\n\n</think>\n\nplain<|im_end|>"
    ]


def test_a_template_that_closes_only_the_last_turn_trains_no_end_elsewhere() -> None:
    closing = template(
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if loop.last else '\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert trained(render_row(conversation("a", "b", "c", "d"), closing, SPECIAL)) == ["b", "d</s>"]


def test_an_end_of_text_after_the_last_turn_is_not_part_of_the_answer() -> None:
    twice = template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    assert trained(render_row(conversation("a", "b", "c", "d"), twice, SPECIAL)) == ["b<|end|>", "d<|end|>"]


def test_a_generation_prompt_that_differs_from_the_answers_opening_is_told() -> None:
    opening = template(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
    )
    rendered = render_row(conversation("a", "b"), opening, SPECIAL)
    assert trained(rendered) == ["b</s>"]
    assert not rendered.continues_prompt


def test_a_template_whose_answers_cannot_be_found_is_refused_with_the_remedy() -> None:
    shuffled = template("{{ messages | map(attribute='content') | join | sort | join }}")
    with pytest.raises(DataError, match="train_on: all"):
        render_row(conversation("ba", "ca", line=7), shuffled, SPECIAL)
    assert trained(render_row(conversation("ba", "ca"), shuffled, SPECIAL, "all")) == ["aabc"]


def test_generation_blocks_decide_and_lose_the_newline_behind_the_end_token() -> None:
    marked = template(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    )
    rendered = render_row(conversation("a", "b\n", "c", "d"), marked, SPECIAL)
    assert trained(rendered) == ["b\n<|im_end|>", "d<|im_end|>"]
    assert "\ue0f0" not in rendered.text


def test_a_template_that_refuses_a_row_names_line_and_template() -> None:
    strict = template("{% if messages|length > 1 %}{{ raise_exception('only one turn') }}{% endif %}")
    with pytest.raises(DataError) as caught:
        render_row(conversation("a", "b", line=12), strict, SPECIAL)
    assert str(caught.value).startswith("line 12: the chat template refuses the row: only one turn (template: test)")


def test_a_conversation_without_any_template_says_which_to_choose() -> None:
    with pytest.raises(DataError, match="chat template") as caught:
        render_row(conversation("a", "b"), None, SPECIAL)
    assert "data.template: chatml" in caught.value.remedy


# Templates are programs of strangers


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 1000000000 }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[9]['role'] }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_and_broken_templates_end_in_one_error(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TemplateFault):
        render_template(text, {"messages": [{"role": "user", "content": "a"}]}, 1)
    assert time.monotonic() - begun < 5


def test_todays_date_is_the_same_every_day() -> None:
    assert render_template("{{ strftime_now('%d %b %Y') }}", {}, 0) == "26 Jul 2024"


def test_tojson_leaves_letters_and_marks_as_they_are() -> None:
    assert render_template("{{ x | tojson }}", {"x": {"a": "<नमस्ते>"}}, 0) == '{"a": "<नमस्ते>"}'


# Which template


def test_the_model_folders_own_template_is_found_in_each_place(tmp_path: Path) -> None:
    assert load_template(tmp_path).source == "built-in plain (the tokenizer has no chat template)"
    assert load_template(tmp_path).is_fallback
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert load_template(tmp_path).text == "three"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    settings = {"chat_template": named, "eos_token": {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert (load_template(tmp_path).text, load_template(tmp_path).eos_token) == ("two", "<|end|>")
    (tmp_path / "chat_template.jinja").write_text("one")
    assert load_template(tmp_path).text == "one"
    assert not load_template(tmp_path).is_fallback


def test_a_template_can_be_named_or_given_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_template(tmp_path, str(tmp_path / "mine.jinja")).text == "mine"
    assert load_template(tmp_path, "ChatML").source == "built-in chatml"
    with pytest.raises(UsageError, match="'vicunna'"):
        load_template(tmp_path, "vicunna")


# Rows without a template


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("text", ["words", "words</s>", "<s>words", "<s>words</s>"])
def test_begin_and_end_token_stand_once_whoever_puts_them(text: str, appends: bool) -> None:
    special = SpecialTokens(bos="<s>", eos="</s>", prepends_bos=True, appends_eos=appends)
    rendered = render_row(TextRow(text), None, special)
    assert rendered.text == ("words" if appends else "words</s>")
    assert rendered.add_special_tokens


def test_a_written_begin_token_stays_where_the_tokenizer_puts_none() -> None:
    assert render_row(TextRow("<s>words"), None, SpecialTokens(bos="<s>", eos="</s>")).text == "<s>words</s>"


def test_a_completion_is_trained_with_its_end_and_the_prompt_is_not() -> None:
    rendered = render_row(PromptRow("<s>Q: ", "yes"), None, SPECIAL)
    assert (rendered.text, trained(rendered)) == ("Q: yes</s>", ["yes</s>"])
    assert trained(render_row(PromptRow("Q: ", "yes"), None, SPECIAL, "all")) == ["Q: yes</s>"]
    assert render_prompt("<s>Q: ", None, SPECIAL).text == "Q: "
