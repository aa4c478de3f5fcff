"""Every command: light to start, helpful, and documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from charkha.cli.app import COMMANDS, app_of
from charkha.config_file import ALIASES, known_keys

ROOT = Path(__file__).resolve().parents[2]
HEAVY = [
    "torch", "transformers", "datasets", "peft", "trl", "pandas", "bitsandbytes", "accelerate", "pyarrow",
    "safetensors", "tokenizers", "huggingface_hub", "scipy", "numpy",
]  # fmt: skip

RUN = """
import json, sys
from charkha.cli.app import main
sys.argv = ["charkha", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as leaving:
    code = leaving.code
print(json.dumps({"code": code, "modules": sorted(name for name in sys.modules if "." not in name)}))
"""


def run(*arguments: str) -> tuple[int, set[str], str]:
    """(exit code, modules imported, everything printed before)."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    record = json.loads(last)
    return record["code"], set(record["modules"]), printed + done.stderr


def test_help_imports_nothing_heavy() -> None:
    code, modules, text = run("--help")
    assert code == 0
    assert not modules & {*HEAVY, "pydantic", "rich", "yaml"}
    assert all(name in text for name in COMMANDS)


def test_a_broken_config_is_answered_without_anything_heavy(tmp_path: Path) -> None:
    config = tmp_path / "charkha.yaml"
    config.write_text("model: {base: starter}\ntraining: {lerning_rate: 1}\n")
    code, modules, text = run("train", str(config))
    assert code == 2
    assert "training.learning_rate" in text
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("command", ["train", "merge", "eval", "chat"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    code, modules, text = run(command, "--help")
    assert code == 0
    assert "Example:" in text
    assert not modules & set(HEAVY)


def commands_of(app: object, name: str) -> list[tuple[str, str]]:
    """(name, help) of a command, or of each command of its group."""
    command = typer.main.get_command(app)  # type: ignore[arg-type]
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(name, command.help or "")]
    return [(f"{name} {inside}", found.help or "") for inside, found in inner.items()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_names_it(name: str) -> None:
    for called, text in commands_of(app_of(name), name):
        assert re.search(rf"Example: charkha {called}\b", text), called
        assert len(COMMANDS[name][1]) < 90


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json(name: str) -> None:
    if name in ("schema", "chat", "watch"):
        pytest.skip("prints JSON always, or talks")
    command = typer.main.get_command(app_of(name))
    for found in getattr(command, "commands", {name: command}).values():
        assert any("--json" in parameter.opts for parameter in found.params), found.name


def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file()
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_readme(name: str) -> None:
    assert re.search(rf"`?charkha {name}\b", readme())


def test_every_config_key_stands_in_the_readme() -> None:
    text = readme()
    missing = [key for key in known_keys() if not re.search(rf"\b{re.escape(key)}\b", text)]
    assert not missing


def test_aliases_shadow_no_key_of_ours() -> None:
    assert not set(ALIASES) & set(known_keys())
