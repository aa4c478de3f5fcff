"""A user's mistakes through the real command line: one message, the right exit code, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.cli.app import app

MakeProject = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout)
        return found


def charkha(*arguments: object) -> Answer:
    """Runs the command line; anything but SystemExit that leaves it fails the test as a traceback would."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return Answer(result.exit_code, result.stdout, result.stderr)


def refused(code: int, kind: str, *arguments: object) -> dict[str, Any]:
    """Runs the command twice, plain and with --json; returns the JSON record of the refusal."""
    plain = charkha(*arguments)
    assert plain.code == code, plain.stderr
    assert plain.stdout == "", "results only on stdout; an error is none"
    assert plain.stderr.startswith("charkha: ") or "\ncharkha: " in plain.stderr
    answer = charkha(*arguments, "--json")
    assert answer.code == code
    record = answer.record
    assert set(record["error"]) >= {"kind", "message", "where", "remedy"}
    assert record["error"]["kind"] == kind
    assert record["error"]["message"]
    assert record["error"]["message"].splitlines()[0] in plain.stderr
    assert ("files" in record) == (code == 4)
    return record


def test_a_misspelt_key_is_answered_with_the_right_one(project: MakeProject) -> None:
    work = project(training={"lerning_rate": 1})
    record = refused(2, "config", "train", work.config)
    (problem,) = record["error"]["problems"]
    assert problem["key"] == "training.lerning_rate"
    assert problem["remedy"] == "did you mean training.learning_rate?"
    assert work.config.read_text().splitlines()[problem["line"] - 1].strip().startswith("lerning_rate")
    assert not work.run_folder().exists()


def test_two_mistakes_are_told_at_once(project: MakeProject) -> None:
    work = project(training={"epochs": "many"}, adapter={"method": "lorra"})
    record = refused(2, "config", "train", work.config)
    assert {problem["key"] for problem in record["error"]["problems"]} == {"training.epochs", "adapter.method"}


def test_a_wrong_override_is_a_config_error_too(project: MakeProject) -> None:
    record = refused(2, "config", "train", project().config, "--set", "training.seed=x", "--set", "nothing")
    assert {problem["key"] for problem in record["error"]["problems"]} == {"training.seed", "nothing"}


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    record = refused(2, "config", "train", tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in str(record["error"]["where"])


def test_a_value_that_this_machine_cannot_do_is_told_with_what_works(project: MakeProject) -> None:
    pytest.importorskip("torch")
    record = refused(2, "config", "train", project(data={"max_length": 100_000}).config)
    assert "256" in record["error"]["message"], "the model's positions"


def test_an_unknown_command_and_an_unknown_option_exit_2(project: MakeProject) -> None:
    assert charkha("trian").code == 2
    assert charkha("train").code == 2
    assert charkha("train", project().config, "--sett", "a=b").code == 2


def test_a_data_file_that_is_not_there(project: MakeProject) -> None:
    record = refused(4, "data", "train", project(data={"train": ["nowhere.jsonl"]}).config)
    assert record["error"]["where"].endswith("nowhere.jsonl")


def test_an_empty_data_file(project: MakeProject) -> None:
    work = project()
    (work.folder / "rows.jsonl").write_text("")
    record = refused(4, "data", "train", work.config)
    assert "rows.jsonl" in json.dumps(record)


def test_every_broken_line_of_a_file_is_named(project: MakeProject) -> None:
    work = project()
    path = work.folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    lines[36] = lines[36][:-5]
    lines[11] = '{"messages": [{"role": "user", "content": "no answer"}]}'
    lines[20] = '{"messages": "text"}'
    path.write_text("\n".join(lines) + "\n")
    record = refused(4, "data", "train", work.config)
    (file,) = record["files"]
    assert file["path"].endswith("rows.jsonl")
    assert file["rows"] == 37
    assert [problem["line"] for problem in file["problems"]] == [12, 21, 37]
    assert all(problem["reason"] for problem in file["problems"])
    shown = charkha("train", work.config).stderr
    assert "37" in shown
    assert "12" in shown


def test_columns_that_fit_no_format_are_named_with_the_option_that_maps_them(project: MakeProject) -> None:
    work = project()
    rows = [{"frage": f"What is {number}?", "antwort": str(number)} for number in range(20)]
    (work.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = refused(4, "data", "train", work.config)
    text = json.dumps(record)
    assert "frage" in text
    assert "antwort" in text
    assert "map" in text
    mapped = charkha(
        "train", work.config, "--set", "data.map={prompt: frage, completion: antwort}", "--set", "training.max_steps=1"
    )
    assert mapped.code == 0, mapped.stderr


def test_a_row_longer_than_max_length_is_never_cut_silently(project: MakeProject) -> None:
    work = project(data={"max_length": 24})
    record = refused(4, "data", "train", work.config)
    lines = [problem["line"] for file in record["files"] for problem in file["problems"]]
    assert lines
    assert "24" in json.dumps(record)
    assert "overlong" in json.dumps(record)
    dropped = charkha("train", work.config, "--set", "data.overlong=drop", "--set", "training.max_steps=1", "--json")
    assert dropped.code == 0, dropped.stderr
    assert f"{len(lines)} row" in dropped.stderr, "what was dropped is counted and told"


def test_rows_without_any_trained_token_are_told(project: MakeProject) -> None:
    work = project()
    empty = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]}
    (work.folder / "rows.jsonl").write_text((json.dumps(empty) + "\n") * 12)
    answer = charkha("train", work.config, "--json")
    if answer.code == 0:
        # The end of an answer is trained even when the answer is empty.
        assert answer.record["loss_first"] is not None
    else:
        assert answer.code == 4


@pytest.mark.parametrize("base", ["nowhere", "./nowhere", "org/never-fetched", "/nowhere/at/all"])
def test_a_model_that_is_not_on_this_machine(project: MakeProject, base: str) -> None:
    work = project(model={"base": base})
    record = refused(5, "environment", "train", work.config)
    assert record["error"]["remedy"]
    if base.startswith("org/"):
        assert f"charkha fetch {base}" in record["error"]["remedy"]


def test_a_folder_that_is_no_model(project: MakeProject, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    record = refused(5, "environment", "train", project(model={"base": str(tmp_path / "empty")}).config)
    assert "config.json" in record["error"]["message"]


def test_a_folder_that_holds_a_run_with_other_settings(project: MakeProject) -> None:
    work = project(training={"max_steps": 1})
    assert charkha("train", work.config, "--json").code == 0
    record = refused(6, "run_of_another_config", "train", work.config, "--set", "training.learning_rate=1e-5")
    assert "training.learning_rate" in record["error"]["message"]
    assert record["error"]["remedy"]


def test_a_folder_in_use(project: MakeProject) -> None:
    from charkha.store.runs import RunFolder

    work = project()
    with RunFolder(work.run_folder()).lock():
        record = refused(6, "run_in_use", "train", work.config)
    assert "process" in record["error"]["message"]


@pytest.mark.parametrize("command", ["eval", "merge", "compare"])
def test_a_folder_without_a_run(command: str, tmp_path: Path) -> None:
    record = refused(6, "run_folder", command, tmp_path)
    assert "charkha.yaml" in record["error"]["message"]


def test_a_run_whose_manifest_is_broken(project: MakeProject) -> None:
    work = project(training={"max_steps": 1})
    assert charkha("train", work.config).code == 0
    for content in ("{", "[]", "{}", "null"):
        (work.run_folder() / "manifest.json").write_text(content)
        for command, target in (("train", work.config), ("eval", work.run_folder()), ("merge", work.run_folder())):
            answer = charkha(command, target, "--json")
            assert answer.code == 6, (content, command)
            assert answer.record["error"]["kind"] in ("run_folder", "run_damaged")


def test_a_loss_that_is_not_finite_exits_7(project: MakeProject) -> None:
    training = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_steps": 30}
    work = project(training=training)
    answer = charkha("train", work.config, "--json")
    assert answer.code == 7
    assert answer.record["error"]["kind"] == "not_finite"
    assert "learning_rate" in answer.record["error"]["remedy"]


def test_success_prints_exactly_one_object_and_progress_goes_to_stderr(project: MakeProject) -> None:
    work = project(training={"max_steps": 2})
    answer = charkha("train", work.config, "--json")
    assert answer.code == 0
    record = answer.record
    assert set(record) >= {
        "run", "status", "steps", "tokens", "tokens_per_second", "seconds", "energy_kwh", "loss_first", "loss_last",
        "eval_loss_before", "eval_loss_after", "resumes", "adapter", "checkpoints", "peak_memory_bytes",
        "peak_rss_bytes",
    }  # fmt: skip
    assert "step 1/2" in answer.stderr
    scored = charkha("eval", work.run_folder(), "--json").record
    assert set(scored) >= {"run", "rows", "loss", "perplexity", "exact_match", "preference_accuracy"}
    merged = charkha("merge", work.run_folder(), "--json").record
    assert set(merged) >= {"path", "verified", "max_logit_difference", "peak_rss_bytes"}


def test_debug_shows_the_traceback_that_is_hidden_otherwise(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "train", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Traceback" not in CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml")]).output
