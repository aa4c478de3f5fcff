"""Train the starter tokenizer: byte-level BPE whose pieces of a name are the same wherever the name stands.

A space before a capital letter or a digit is a piece of its own, so `Asha` after a space and `Asha` after a quotation
mark are the same tokens, and copying a name into JSON is copying tokens. Digits stand alone for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from make_text import FIRST_DOCUMENTS, documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 1024
_PIECES = (
    r" ?[\p{Ll}\p{Lo}\p{Lm}\p{M}]+|\p{Lu}\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{N}"
    r"|[^\s\p{L}\p{M}\p{N}]+(?: [^\s\p{L}\p{M}\p{N}]+)*|\s"
)
# The text of pretraining has no JSON; a few lines of bare punctuation keep an answer from costing a token per sign.
_PUNCTUATION = ('{"a": "b", "c": "d"}', '{"a": 1, "b": "c", "d": 2}')


def train_tokenizer(count: int = 20_000) -> Tokenizer:
    """A tokenizer trained on the first `count` documents of the pretraining text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, END_OF_TEXT)]
        + [AddedToken(token, special=True, normalized=False) for token in (TURN_START, TURN_END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(count), trainer)
    return tokenizer


def _lines(count: int) -> Iterator[str]:
    for document in documents(count, start=FIRST_DOCUMENTS):
        yield document.replace(TURN_START, "").replace(TURN_END, "")
    for _ in range(count // 20):
        yield from _PUNCTUATION


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
