"""Write the instruction rows: a customer's message in, one flat JSON object out.

    python tools/starter/make_data.py --out src/charkha/starter/data

The rows are a pure function of the seeds below; a test makes them again and compares byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from messages import Case, Tier, draw_case, write_message
from names import Person, heldout_person, known_person, made_person

SEED = 71
TRAIN_ROWS = 1200
HELDOUT_ROWS = 200
NEW_PATTERN_EVERY = 5
"""Every fifth held-out row is worded in phrases that stand nowhere else."""


def answer(case: Case) -> str:
    """The JSON object that the tuned model should give, keys always in this order."""
    return json.dumps(
        {
            "name": case.person.name,
            "town": case.person.town,
            "product": case.product,
            "issue": case.issue,
            "amount": case.amount,
        },
        ensure_ascii=False,
    )


def _row(rng: random.Random, person: Person, tier: Tier) -> str:
    case = draw_case(rng, person)
    messages = [
        {"role": "user", "content": write_message(rng, case, tier)},
        {"role": "assistant", "content": answer(case)},
    ]
    return json.dumps({"messages": messages, "pattern": "new" if tier == "new" else "seen"}, ensure_ascii=False)


def train_rows(count: int = TRAIN_ROWS, seed: int = SEED) -> list[str]:
    """JSON lines, each with a customer of its own; a third have known Indian names, the rest made-up ones."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        person = known_person(rng) if rng.random() < 0.33 else made_person(rng)
        if person.name not in rows:
            rows[person.name] = _row(rng, person, "seen")
    return list(rows.values())


def heldout_rows(count: int = HELDOUT_ROWS, seed: int = SEED + 1) -> list[str]:
    """JSON lines whose names and towns occur neither in pretraining nor in training."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        person = heldout_person(rng)
        if person.name not in rows:
            tier: Tier = "new" if len(rows) % NEW_PATTERN_EVERY == NEW_PATTERN_EVERY - 1 else "seen"
            rows[person.name] = _row(rng, person, tier)
    return list(rows.values())


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train_rows()), ("heldout.jsonl", heldout_rows())):
        (out / name).write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
