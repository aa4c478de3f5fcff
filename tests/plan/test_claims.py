"""docs/claims.md is what the planner says today, and the claims that people plan by hold or do not hold as it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("claims_tool", ROOT / "tools/claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_planner_says(tool: ModuleType) -> None:
    assert (ROOT / "docs/claims.md").read_text(encoding="utf-8") == tool.page(), "run: make claims"


def column(claim: object, name: str) -> list[str]:
    head, *rows = claim.table  # type: ignore[attr-defined]
    return [row[head.index(name)] for row in rows]


def number(text: str) -> float:
    found = re.search(r"[\d.]+", text.replace(",", ""))
    assert found is not None
    return float(found[0])


def test_adapters_train_up_to_99_9_percent_fewer_parameters(tool: ModuleType) -> None:
    shares = [number(text) for text in column(tool.fewer_parameters(), "fewer by")]
    assert max(shares) > 99.9
    assert min(shares) < 99


def test_65_billion_parameters_fit_a_48_gb_card_with_qlora(tool: ModuleType) -> None:
    assert "yes" in column(tool.large_on_48_gb(), "fits")


def test_70_billion_parameters_do_not_fit_24_gb_but_streamed(tool: ModuleType) -> None:
    fits = column(tool.what_24_gb_hold(), "in 24 GB")
    assert fits == ["yes", "yes", "yes", "no", "yes"]
    weights, least = (column(tool.what_24_gb_hold(), name) for name in ("weights", "needs at least"))
    assert 36 < number(weights[3]) < 38  # 39.5 GB
    assert 43 < number(least[3]) < 46  # traced with the real step: 43.3 GiB of live tensors


def test_checkpointing_saves_a_third_or_more_and_costs_a_quarter_or_more(tool: ModuleType) -> None:
    assert all(number(text) > 30 for text in column(tool.checkpointing(), "saves"))
    assert all(20 < number(text) < 50 for text in column(tool.checkpointing(), "takes longer by"))


def test_thousands_of_examples_take_hours_and_not_days(tool: ModuleType) -> None:
    hours = [number(text) for text in column(tool.hours_on_a_4090(), "hours")]
    assert 0 < min(hours) < 1 < max(hours) < 4


def test_full_training_of_70_billion_needs_eight_cards_in_16_bits_and_more_in_32(tool: ModuleType) -> None:
    wide, narrow, eight_bit = (int(text) for text in column(tool.cards_for_full_70b(), "80 GB cards"))
    assert eight_bit <= narrow == 8 < wide
