"""Makes docs/architectures.md from docs/architectures.json, the record that tests/matrix writes and tries again.

Run: python tools/support_table.py [FOLDER]     with FOLDER, first gathers what `--record-cells FOLDER` left there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORD, PAGE = DOCS / "architectures.json", DOCS / "architectures.md"
WORKS = "works"
HEAD = """# Architectures: what works, what is refused, and why

Every "yes" was tried on tiny models of transformers' own classes, on a CPU: trained, stopped and taken up again to the
same bits, loaded and scored as at the end of training, asked for an answer, and merged with logits verified (a base in
4 or 8 bits also onto its dequantized weights). Every "no" is refused with exit code 2 and the reason below, before any
weight of the base is read. `make test-long` tries all of it again; `make support-table` writes this page anew.

Where attention or packing is not mentioned, a cell holds for sdpa and eager, for rows grouped by length and packed.
prompt_tuning changes no weight and full leaves a whole model: neither has anything to merge, and that is said.
Mixtral is trained with lora_dropout 0: its experts are 3-D parameters, on which PEFT has LoRA without dropout only.
"""


def main() -> None:
    """Gathers, where a folder is given, and writes the page."""
    if len(sys.argv) > 1:
        gather(Path(sys.argv[1]))
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


def gather(folder: Path) -> None:
    """The cells of a recording as one record; the order is that of the files' names."""
    record: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for path in sorted(folder.glob("*.json")):
        family, method, quantization, outcomes = json.loads(path.read_text(encoding="utf-8"))
        record.setdefault(family, {}).setdefault(method, {})[quantization] = outcomes
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def page(record: dict) -> str:
    """The page for a record {family: {method: {quantization: {"grouped sdpa": outcome}}}}."""
    reasons: dict[str, int] = {}
    sections = [section(family, methods, reasons) for family, methods in record.items()]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([HEAD, *sections, "## Reasons", "", *notes, ""])


def section(family: str, methods: dict, reasons: dict[str, int]) -> str:
    """One architecture: a row for each method, a column for each quantization."""
    columns = [name for name in ("none", "nf4", "fp4", "int8") if name in next(iter(methods.values()))]
    rows = [
        f"| {method} | " + " | ".join(cell(quantizations[column], reasons) for column in columns) + " |"
        for method, quantizations in methods.items()
    ]
    head = [f"## {family}", "", "| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return "\n".join([*head, *rows, ""])


def cell(outcomes: dict[str, str], reasons: dict[str, int]) -> str:
    """`yes`, `no [1]`, or which layouts work and which do not."""

    def note(reason: str) -> str:
        return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"

    if all(outcome == WORKS for outcome in outcomes.values()):
        return "yes"
    different = set(outcomes.values())
    if WORKS not in different and len(different) == 1:
        return f"no {note(different.pop())}"
    parts = []
    rest = dict(outcomes)
    for word in ("sdpa", "eager", "packed", "grouped"):
        named = {layout: outcome for layout, outcome in rest.items() if word in layout.split()}
        if named and len(set(named.values())) == 1 and WORKS not in named.values():
            parts.append(f"{word} no {note(next(iter(named.values())))}")
            rest = {layout: outcome for layout, outcome in rest.items() if layout not in named}
    parts += [f"{layout} no {note(outcome)}" for layout, outcome in rest.items() if outcome != WORKS]
    return "; ".join(["yes" if any(outcome == WORKS for outcome in rest.values()) else "no", *parts])


if __name__ == "__main__":
    main()
