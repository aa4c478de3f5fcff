from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from charkha.cli.data import app
from charkha.data.formats import read_rows

CHAT = {"messages": [{"role": "user", "content": "Who spins?"}, {"role": "assistant", "content": "The wheel."}]}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def record(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds nothing but a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("model")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({**CHAT, "id": 1}) + "\n")
    return path


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n{"text": " "}\n')
    return path


def test_inspect_answers_with_the_json_contract(chat_file: Path, model: Path) -> None:
    result = run("inspect", chat_file, "--model", model, "--json")
    assert result.exit_code == 0
    found = record(result)
    (file,) = found["files"]
    assert {"path", "format", "encoding", "rows", "problems"} <= set(file)
    assert (file["format"], file["encoding"], file["rows"], file["problems"]) == ("messages", "utf-8", 1, [])
    assert file["ignored_columns"] == ["id"]
    assert found["tokens"] == file["token_counts"]["total"] > found["trained_tokens"] > 0
    assert record(run("inspect", chat_file, "--json"))["tokens"] is None


def test_inspect_leaves_with_4_and_lists_every_bad_row(bad_file: Path, chat_file: Path) -> None:
    result = run("inspect", bad_file, chat_file, "--json")
    assert result.exit_code == 4
    found = record(result)
    assert found["error"]["kind"] == "data"
    assert [(problem["line"], problem["field"]) for problem in found["files"][0]["problems"]] == [
        (2, None),
        (3, "text"),
    ]
    assert [file["rows"] for file in found["files"]] == [1, 1]


def test_inspect_shows_bad_rows_with_file_and_line(bad_file: Path) -> None:
    result = run("inspect", bad_file)
    assert result.exit_code == 4
    assert f"{bad_file}:3: text: empty text: only white space" in result.stdout


def test_a_file_of_unknown_columns_names_them_and_the_option(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na,b\n")
    result = run("inspect", path, "--json")
    assert result.exit_code == 4
    found = record(result)
    assert "question, answer" in found["error"]["message"]
    assert "--map prompt=question,completion=answer" in found["error"]["remedy"]
    assert found["files"][0]["path"] == str(path)
    mapped = run("inspect", path, "--map", "prompt=question,completion=answer", "--json")
    assert (mapped.exit_code, record(mapped)["files"][0]["format"]) == (0, "prompt_completion")


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--map", "prompt"), 2), (("--map", "promt=text"), 2), (("--format", "yaml"), 2), (("--model", "nowhere"), 5)],
)
def test_wrong_options_are_answered_without_a_traceback(chat_file: Path, words: tuple[str, ...], code: int) -> None:
    result = run("inspect", chat_file, *words, "--json")
    assert result.exit_code == code
    assert record(result)["error"]["message"]
    assert "Traceback" not in result.output


def test_prepare_writes_jsonl_and_tells_rows_and_repetitions(tmp_path: Path) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "out.jsonl"
    source.write_text("q,a\n" + "".join(f"q{number},a\n" for number in [*range(20), 0]))
    words = ("prepare", source, "-o", out, "--map", "prompt=q,completion=a", "--eval", "10%", "--deduplicate")
    done = record(run(*words, "--json"))
    assert (done["train_rows"], done["eval_rows"], done["duplicates"]) == (18, 2, 1)
    assert len(read_rows(out).rows) == 18
    assert len(read_rows(Path(done["eval_path"])).rows) == 2
    assert "exact repetitions: 1 (left out)" in run(*words).stderr


def test_prepare_writes_nothing_while_a_row_is_bad(tmp_path: Path, bad_file: Path) -> None:
    result = run("prepare", bad_file, "-o", tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 4
    assert [problem["line"] for problem in record(result)["files"][0]["problems"]] == [2, 3]
    assert not (tmp_path / "out.jsonl").exists()


def test_preview_marks_what_is_trained_and_says_whether_the_end_is(chat_file: Path, model: Path) -> None:
    result = run("preview", chat_file, "--model", model)
    assert result.exit_code == 0
    marked = result.stdout[result.stdout.index("⟦") + 1 : result.stdout.index("⟧")]
    assert marked.startswith("The wheel.")
    assert f"the end token {marked.removeprefix('The wheel.')} is trained" in result.stdout
    assert "Who spins?" in result.stdout[: result.stdout.index("⟦")]


def test_preview_warns_where_no_end_is_taught(chat_file: Path, model: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    result = run("preview", chat_file, "--model", model, "--template", endless)
    assert "no end token is trained" in result.stderr


def test_preview_takes_everything_from_a_config(chat_file: Path, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "charkha.yaml"
    config.write_text(f"model: {{base: {model}}}\ndata: {{train: [{chat_file.name}], train_on: all}}\noutput: run\n")
    result = run("preview", "--config", config, "--json")
    assert result.exit_code == 0, result.output
    (row,) = record(result)["rows"]
    assert all(token["trained"] for token in row["tokens"])
    assert {"id", "text", "trained"} == set(row["tokens"][0])
    assert run("preview", chat_file).exit_code == 2
