"""docs/architectures.json says what works; every word of it is tried again by `make test-long`, a part by `make test`.

`python -m pytest -m long tests/matrix --record` writes the record anew (`make support-table`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrix_cells import LAYOUTS, METHODS, QUANTIZATIONS, RECORD, ROOT, WORKS, layout_name, run_cell

from families import FAMILIES

MakeProject = Callable[..., Any]


def recorded() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def tried(
    project: MakeProject, model_folder: Callable[..., Path], tmp_path: Path, family: str, method: str, quantization: str
) -> dict[str, str]:
    outcomes = {}
    chosen = FAMILIES[family]
    base = model_folder(chosen.model_type, **chosen.settings)
    for layout in LAYOUTS:
        outcomes[layout_name(*layout)] = run_cell(project, base, chosen, method, quantization, layout)
        for left in ("whole", "cut"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)
    return outcomes


# Of several that share a model class, or differ in numbers alone, one goes in every run of the tests.
ALIKE = ("Llama 2", "SmolLM", "Gemma 1", "Falcon 40B", "Qwen 2 and 2.5")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.long) if family in ALIKE else family for family in FAMILIES]
)
def test_every_family_goes_the_whole_road(project: MakeProject, model_folder: Callable[..., Path], family: str) -> None:
    chosen = FAMILIES[family]
    base = model_folder(chosen.model_type, **chosen.settings)
    attention = "eager" if chosen.model_type == "gemma2" else "sdpa"
    assert run_cell(project, base, chosen, "lora", "none", ("grouped", attention)) == WORKS


@pytest.mark.long
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_true(
    project: MakeProject,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    family: str,
    method: str,
    quantization: str,
) -> None:
    outcomes = tried(project, model_folder, tmp_path, family, method, quantization)
    folder = request.config.getoption("--record-cells")
    if folder:
        name = f"{family}--{method}--{quantization}.json".replace(" ", "_")
        (Path(folder) / name).write_text(json.dumps([family, method, quantization, outcomes]), encoding="utf-8")
        return
    assert outcomes == recorded()[family][method][quantization]


def test_the_record_has_every_cell_and_the_page_is_made_from_it() -> None:
    import importlib.util

    record = recorded()
    assert {
        (family, method, quantization, layout)
        for family, methods in record.items()
        for method, quantizations in methods.items()
        for quantization, layouts in quantizations.items()
        for layout in layouts
    } == {
        (family, method, quantization, layout_name(*layout))
        for family in FAMILIES
        for method in METHODS
        for quantization in QUANTIZATIONS
        for layout in LAYOUTS
    }
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "tools/support_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    assert module.page(record) == page, "run: python tools/support_table.py"
