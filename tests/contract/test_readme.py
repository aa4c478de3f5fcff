"""Every command that README shows is run here, in its order, with the built-in model in place of one from a hub."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from charkha.cli.app import COMMANDS, app
from charkha.config_file import known_keys
from charkha.starter.paths import train_file

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
# Commands that are not run here, and where they are: a hub (tests/verbs/test_fetching.py serves one), the
# quickstart (tests/verbs/test_quickstart.py), and what builds this very environment.
ELSEWHERE = ("git clone", "make quickstart", "make test", "charkha fetch", "charkha quickstart", "docker build")


def commands() -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    blocks = [text for language, text in fenced if not language]
    return [
        line.strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith(("charkha ", "make ", "git "))
    ]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A user's folder with the files that README's commands name."""
    folder = tmp_path_factory.mktemp("workshop")
    rows = train_file().read_text(encoding="utf-8").splitlines()[:60]
    (folder / "support.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "export.csv").write_text('question,answer\n"What is 2 + 2?"," 4"\n"And 3 + 3?"," 6"\n', encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


def test_every_command_of_the_readme_runs(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    ran = []
    for command in commands():
        if command.startswith(ELSEWHERE):
            continue
        arguments = shlex.split(command.replace(HUB_MODEL, "starter"))[1:]
        if arguments[0] == "train":
            # The road, not its length, on a 4-bit base as it is with the model that README names.
            arguments += ["--set", "training.max_steps=4", "--set", "model.quantization=nf4"]
        result = CliRunner().invoke(app, arguments, input="\n")
        assert result.exit_code == 0, f"{command}\n{result.output}"
        ran.append(arguments[0])
    assert {"data", "init", "train", "eval", "chat", "merge", "compare", "schema"} <= set(ran)


def test_commands_run_elsewhere_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands():
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_the_readmes_config_is_accepted(tmp_path):
    from charkha.config_file import load_config

    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (whole,) = [block for block in blocks if block.startswith("model:")]
    path = tmp_path / "charkha.yaml"
    for part in ("", *(block for block in blocks if block is not whole)):
        path.write_text(whole + part, encoding="utf-8")
        assert load_config(path).config.model.base == HUB_MODEL


def test_every_command_and_config_key_is_in_the_readme():
    missing = [name for name in COMMANDS if f"`charkha {name}" not in README]
    missing += [key for key in known_keys() if f"`{key}`" not in README]
    assert missing == []


def test_the_table_of_config_keys_is_the_one_that_the_models_give():
    import importlib.util

    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "tools/config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run: python tools/config_reference.py"


def test_every_exit_code_of_the_error_tree_is_in_the_readme():
    from charkha import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.CharkhaError)
    }
    assert [code for code in sorted(codes) if not re.search(rf"^\| {code} \|", README, re.MULTILINE)] == []


def test_the_schema_names_every_key():
    result = CliRunner().invoke(app, ["schema"])
    text = json.dumps(json.loads(result.output))
    assert all(f'"{key.rpartition(".")[2]}"' in text for key in known_keys())


def test_every_source_file_is_named_in_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    per_command = ROOT / "src/charkha/cli"  # one line stands for "one file per command group"
    files = [
        path
        for path in (ROOT / "src/charkha").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py") and path.parent != per_command
    ]
    assert [str(path.relative_to(ROOT)) for path in files if not re.search(rf"[`/]{path.name}`", text)] == []
