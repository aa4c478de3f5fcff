"""The walls of the house: who may import whom, one name in one place, and what no file may hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The file or package directly below charkha that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    """(module, name or None, only for types) of every import of ours, those inside functions too."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole, None, id(node) in typing_only
                else:
                    yield str(node.module), alias.name, id(node) in typing_only


def our_imports(path: Path) -> set[str]:
    return {module for module, _, _ in imports(path) if module.partition(".")[0] == "charkha"}


def floors() -> list[set[str]]:
    """The floors as ARCHITECTURE.md draws them, highest first."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if re.match(r"\s*cli\b.*>.*units", line))
    return [{name.strip() for name in floor.split(",")} for floor in line.split(">")]


# Files that belong to a room of another name.
BELONGS_TO = {
    "config_file": "config", "yaml_text": "config", "optimizers": "config", "guard_limits": "config",
    "personal_kinds": "config", "carried_out": "config", "config_section": "config", "config_watching": "config",
    "guard_heat": "guard", "guard_trace": "guard", "doctor_checks": "doctor",
    "doctor_children": "doctor", "doctor_disk": "doctor", "doctor_gpus": "doctor", "doctor_speed": "doctor",
    "__main__": "cli",
}  # fmt: skip


def test_every_room_stands_on_a_floor() -> None:
    known = set().union(*floors())
    rooms = {BELONGS_TO.get(room(name), room(name)) for name in MODULES} - {"__init__"}
    assert rooms <= known, f"not in ARCHITECTURE.md: {sorted(rooms - known)}"


def test_a_file_imports_only_from_its_own_or_lower_floors() -> None:
    height = {name: -depth for depth, floor in enumerate(floors()) for name in floor}
    wrong = []
    for name, path in MODULES.items():
        mine = BELONGS_TO.get(room(name), room(name))
        for other in our_imports(path):
            theirs = BELONGS_TO.get(room(other), room(other))
            if theirs in height and mine in height and height[theirs] > height[mine]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_there_is_no_import_circle() -> None:
    graph = {name: our_imports(path) & set(MODULES) for name, path in MODULES.items()}
    state: dict[str, str] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        if state.get(name) == "done":
            return
        assert state.get(name) != "open", f"a circle: {' -> '.join([*way, name])}"
        state[name] = "open"
        for other in graph[name]:
            visit(other, (*way, name))
        state[name] = "done"

    for name in graph:
        visit(name, ())


def test_rooms_import_one_another_in_one_direction() -> None:
    pairs = {
        (BELONGS_TO.get(room(name), room(name)), BELONGS_TO.get(room(other), room(other)))
        for name, path in MODULES.items()
        for other in our_imports(path)
    }
    both = {pair for pair in pairs if pair[0] < pair[1] and (pair[1], pair[0]) in pairs}
    assert not both


def defined_in(path: Path) -> set[str]:
    """Names that a file itself makes at its top level."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("where", ["src", "tests", "tools", "benchmarks"])
def test_names_are_imported_from_the_file_that_defines_them(where: str) -> None:
    wrong = []
    for path in sorted((ROOT / where).rglob("*.py")):
        for module, name, _ in imports(path):
            if module in MODULES and name is not None and name not in defined_in(MODULES[module]):
                wrong.append(f"{path.relative_to(ROOT)}: {name} from {module}")
    assert not wrong


def test_package_files_are_empty() -> None:
    assert not [path for path in FILES if path.name == "__init__.py" and path.read_text().strip()]


def test_every_package_has_its_file() -> None:
    folders = {path.parent for path in FILES}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "mlx", "deepspeed"}


def test_frameworks_are_imported_under_backends_only() -> None:
    wrong = []
    for name, path in MODULES.items():
        for module, _, only_types in imports(path):
            if module.partition(".")[0] in HEAVY and room(name) != "backends" and not only_types:
                wrong.append(f"{name} imports {module}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_a_file_holds_one_idea_in_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "util", "misc", "common", "helpers", "helper", "tools", "shared", "core", "lib"}
    assert not [path for path in FILES if path.stem in drawers]


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_nothing_is_pickled_printed_or_run_from_outside(path: Path) -> None:
    wrong = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            wrong += [
                name for name in names if name.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve")
            ]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in (
                "print",
                "eval",
                "exec",
                "compile",
                "torch.load",
                "os.system",
                "yaml.load",
                "yaml.unsafe_load",
            ):
                wrong.append(called)
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "trust_remote_code" and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    wrong.append("trust_remote_code")
                if keyword.arg == "shell" and not (isinstance(value, ast.Constant) and value.value is False):
                    wrong.append("shell=")
    assert not wrong


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__init__.py"], ids=lambda path: module_name(path)
)
def test_a_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))


def test_only_the_command_line_and_the_dashboard_write_to_the_terminal() -> None:
    wrong = []
    for name, path in MODULES.items():
        if room(name) in ("cli", "web", "__main__"):
            continue
        text = path.read_text(encoding="utf-8")
        if re.search(r"sys\.std(out|err)\.|from rich|import rich|typer\.echo", text):
            wrong.append(name)
    assert not wrong
