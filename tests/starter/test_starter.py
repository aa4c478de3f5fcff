"""The built-in model and data: small, regenerable, and with a held-out part that is truly held out."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from charkha.starter import paths

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "starter"
MAXIMUM_BYTES = 12_000_000
SAMPLE_DOCUMENTS = 12_000


@pytest.fixture(scope="module")
def tools():
    """The generator scripts, imported from their folder."""
    sys.path.insert(0, str(TOOLS))
    try:
        import make_data
        import make_text
        import names
    finally:
        sys.path.remove(str(TOOLS))
    return {"data": make_data, "text": make_text, "names": names}


@pytest.fixture(scope="module")
def train():
    return _records(paths.train_file())


@pytest.fixture(scope="module")
def heldout():
    return _records(paths.heldout_file())


@pytest.fixture(scope="module")
def text(tools):
    return "\n".join(tools["text"].documents(SAMPLE_DOCUMENTS))


def _records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _answer(record):
    return json.loads(record["messages"][-1]["content"])


def _words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def _private_words(records):
    return _words(" ".join(f"{_answer(r)['name']} {_answer(r)['town']}" for r in records))


def test_everything_packaged_stays_small():
    folder = paths.model_folder().parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= MAXIMUM_BYTES


def test_parameter_count_read_from_the_weights_header():
    with (paths.model_folder() / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert 1_000_000 <= sum(math.prod(entry["shape"]) for entry in header.values()) <= 4_000_000


def test_model_folder_holds_nothing_executable():
    suffixes = {p.suffix for p in paths.model_folder().iterdir()}
    assert suffixes == {".safetensors", ".json", ".jinja"}


def test_row_count(train, heldout):
    assert 1_000 <= len(train) + len(heldout) <= 2_000


def test_rows_are_messages_with_a_flat_json_answer(train, heldout):
    for record in train + heldout:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        answer = _answer(record)
        assert list(answer) == ["name", "town", "product", "issue", "amount"]
        said = record["messages"][0]["content"]
        assert answer["name"] in said
        assert answer["town"] in said
        assert str(answer["amount"]) in said


def test_heldout_names_and_towns_are_absent_from_training(train, heldout):
    said = " ".join(m["content"] for r in train for m in r["messages"])
    assert not _private_words(heldout) & _words(said)


def test_heldout_names_and_towns_are_absent_from_pretraining_text(text, heldout):
    assert not _private_words(heldout) & _words(text)


def test_generator_refuses_every_heldout_word(tools, heldout):
    assert _private_words(heldout) <= tools["names"].HELDOUT_WORDS
    known = tools["names"].KNOWN_FIRST + tools["names"].KNOWN_LAST + tools["names"].KNOWN_TOWN
    assert not {word.lower() for word in known} & tools["names"].HELDOUT_WORDS


def test_a_fifth_of_heldout_rows_has_phrases_that_stand_nowhere_else(train, heldout, text):
    new = [r for r in heldout if r["pattern"] == "new"]
    assert len(new) * 5 == len(heldout)
    assert all(r["pattern"] == "seen" for r in train)
    elsewhere = {_bare(r) for r in train} | {_bare(r) for r in heldout if r["pattern"] == "seen"}
    for record in new:
        assert _bare(record) not in elsewhere
    for phrase in _new_phrases():
        fixed = max(re.split(r"\{\w+\}", phrase), key=len)
        assert fixed not in text
        assert not any(fixed in r["messages"][0]["content"] for r in train)


def _bare(record):
    """The message with its facts taken out."""
    answer, said = _answer(record), record["messages"][0]["content"]
    for value in (answer["name"], answer["town"], str(answer["amount"])):
        said = said.replace(value, "_")
    return said


def _new_phrases():
    phrases = sys.modules["phrases"]
    return [*phrases.WHO_NEW, *phrases.MONEY_NEW, *(p for group in phrases.ASK_NEW.values() for p in group)]


def test_pretraining_text_holds_no_json(tools, text):
    assert not tools["text"].FORBIDDEN.search(text)
    assert not re.search(r"[{}\[\]\"]", text)


def test_documents_are_a_pure_function_of_seed_and_index(tools):
    first = list(tools["text"].documents(50))
    assert first[20:] == list(tools["text"].documents(30, start=20))
    assert first != list(tools["text"].documents(50, seed=1))


def test_data_files_regenerate_byte_for_byte(tools):
    for path, rows in (
        (paths.train_file(), tools["data"].train_rows()),
        (paths.heldout_file(), tools["data"].heldout_rows()),
    ):
        assert path.read_bytes() == "".join(row + "\n" for row in rows).encode()


class _Generation(Extension):
    """Renders `{% generation %}` blocks as they stand."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _render(messages, **values):
    source = (paths.model_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation], undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(messages=messages, **{"add_generation_prompt": False} | values)


def test_chat_template_renders_turns_and_prompt():
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    assert _render(turns) == "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert _render(turns[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_chat_template_marks_the_answer_and_its_end_token():
    source = (paths.model_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    block = source[source.index("{%- generation") : source.index("endgeneration")]
    assert "message['content'] + '<|im_end|>'" in block


def test_special_tokens_are_single_and_distinct():
    tokenizer = Tokenizer.from_file(str(paths.model_folder() / "tokenizer.json"))
    config = json.loads((paths.model_folder() / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["pad_token"] != config["eos_token"] == "<|im_end|>"
    for token in (config["pad_token"], config["eos_token"], "<|im_start|>", "<|endoftext|>"):
        assert len(tokenizer.encode(token).ids) == 1


def test_rows_round_trip_and_stay_within_the_configured_length(train, heldout):
    tokenizer = Tokenizer.from_file(str(paths.model_folder() / "tokenizer.json"))
    limit = yaml.safe_load(paths.quickstart_config().read_text(encoding="utf-8"))["data"]["max_length"]
    for record in train + heldout:
        rendered = _render(record["messages"])
        ids = tokenizer.encode(rendered).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == rendered
        assert len(ids) <= limit


def test_quickstart_config_points_at_the_packaged_files():
    config = yaml.safe_load(paths.quickstart_config().read_text(encoding="utf-8"))
    folder = paths.quickstart_config().parent
    assert folder / config["model"]["base"] == paths.model_folder()
    assert folder / config["data"]["train"][0] == paths.train_file()
    assert folder / config["data"]["eval"] == paths.heldout_file()


@pytest.mark.long
def test_fresh_weights_already_copy_what_is_repeated(tools):
    """The heads laid before pretraining do what they are said to do, on tokens that mean nothing."""
    import torch

    sys.path.insert(0, str(TOOLS))
    try:
        import pretrain
    finally:
        sys.path.remove(str(TOOLS))
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(paths.model_folder() / "tokenizer.json"))
    model = pretrain.build_model(tokenizer, hidden=128, layers=6, mlp=384)
    once = torch.randint(300, tokenizer.get_vocab_size(), (4, 30))
    tokens = once.repeat(1, 3)
    with torch.no_grad():
        guessed = model(input_ids=tokens[:, :-1]).logits.argmax(-1)
    assert (guessed == tokens[:, 1:])[:, 30:].float().mean() > 0.8
