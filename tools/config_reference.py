"""Writes the table of config keys into README.md, between its two markers, from the config's own models.

Run: python tools/config_reference.py    (a test fails when the table is not what this would write)
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from charkha.carried_out import CARRIED_OUT
from charkha.config import Config

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- config keys: begin -->", "<!-- config keys: end -->"


def table() -> str:
    """The keys of every section as one Markdown table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            rows += [_row(f"{name}.{key}", inner) for key, inner in section.model_fields.items()]
        else:
            rows.append(_row(name, field))
    return "\n".join(rows)


def _row(key: str, field: object) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    meaning = field.description.replace("|", "\\|")
    if key in CARRIED_OUT:
        meaning += f" This version: {', '.join(f'`{_yaml(value)}`' for value in CARRIED_OUT[key])}."
    return f"| `{key}` | {default} | {meaning} |"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def updated(text: str) -> str:
    """README's text with the table between the markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
