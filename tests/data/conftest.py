"""Real material outside the repository, and a small tokenizer made here so that tests run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from charkha.data.tokenizer import Tokenizer, load_tokenizer

CHATML_SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository; tests that need it are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "data" / "README.md").is_file():
        pytest.skip("no shared folder beside the repository")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Tokenizer:
    """A Llama-style tokenizer with byte fallback, a begin token and no chat template."""
    return load_tokenizer(shared / "models" / "stories260K")


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> Tokenizer:
    """A byte-level tokenizer of full size, from vocab.json and merges.txt."""
    return load_tokenizer(shared / "models" / "gpt2-tokenizer")


def write_byte_level_model(folder: Path, *, around: tuple[str, ...] = ("A",), **config: object) -> Path:
    """A model folder with a byte-level tokenizer: 256 bytes, a few merges and ChatML's special tokens.

    `around` is what the post-processor puts around the text "A": `("<s>", "A")`.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [["Ġ", "h"], ["Ġh", "i"], ["y", "e"], ["ye", "s"], ["Ġ", "yes"]]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    added = [
        {"id": len(vocab) + index, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, text in enumerate(CHATML_SPECIALS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level if around == ("A",) else surrounding(*around),
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def surrounding(*parts: str) -> dict:
    """A post-processor that puts `<s>` or `</s>` around the text: `surrounding("<s>", "A")`."""
    first = 256 + 5
    ids = {text: first + index for index, text in enumerate(CHATML_SPECIALS)}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    tokens = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part != "A"}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


@pytest.fixture
def write_model() -> Callable[..., Path]:
    """Writes a model folder with a small byte-level tokenizer."""
    return write_byte_level_model


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    """A byte-level tokenizer made on the spot, with trimmed offsets and truncation set, as real files have them."""
    return load_tokenizer(write_byte_level_model(tmp_path / "tiny"))
