"""Our templates and tokens against those of transformers, which people will use the tuned model with."""

from __future__ import annotations

from pathlib import Path

import pytest

from charkha.data.formats import read_rows
from charkha.data.render import render_row
from charkha.data.rows import ChatRow, Turn
from charkha.data.templates import ChatTemplate
from charkha.data.tokenize import encode_row
from charkha.data.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "user", "content": "What is <it> & why?"},
    {"role": "assistant", "content": "A wheel, एक चरखा 🧵"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "It spins."},
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["models/stories260K", "models/gpt2-tokenizer", "model_configs/tiiuae--falcon-7b"])
def test_tokens_and_rendered_conversations_are_the_same(
    shared: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(shared / name)), load_tokenizer(shared / name)
    files = ("indic/story_openings_hindi.txt", "pretrain/c4_demo.jsonl")
    texts = [row.text for file in files for row in read_rows(shared / "data" / file).rows[:100]]
    for text in [*texts, "  leading", "trailing  ", "a\n\n b", "<s>x</s>", ""]:
        for added in (True, False):
            assert list(ours.encode(text, added)[0]) == theirs(text, add_special_tokens=added)["input_ids"]
    theirs.bos_token = theirs.bos_token or "<s>"
    row = ChatRow(tuple(Turn(message["role"], message["content"]) for message in MESSAGES))
    for path in sorted((shared / "chat_templates").glob("*.jinja")):
        template = ChatTemplate(path.stem, path.read_text(), theirs.bos_token, theirs.eos_token)
        wanted = theirs.apply_chat_template(MESSAGES, chat_template=template.text, tokenize=False)
        tokens = theirs.apply_chat_template(MESSAGES, chat_template=template.text, return_dict=True)["input_ids"]
        assert render_row(row, template, ours.special, "all").text == wanted
        assert list(encode_row(row, ours, template, "all").input_ids) == tokens
