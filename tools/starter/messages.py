"""A customer's message and the facts in it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import phrases
import wordings
from names import Person, made_amount

Tier = Literal["seen", "extra", "new"]


@dataclass(frozen=True)
class Case:
    """What the bank has to know; `said_product` is the customer's own word for the product."""

    person: Person
    product: str
    said_product: str
    issue: str
    amount: int


def draw_case(rng: random.Random, person: Person) -> Case:
    """A case with product, issue and amount drawn independently: none can be guessed from another."""
    product = rng.choice(tuple(phrases.PRODUCTS))
    issue = rng.choice(tuple(phrases.ASK_SEEN))
    return Case(person, product, rng.choice(phrases.PRODUCTS[product]), issue, made_amount(rng))


def write_message(rng: random.Random, case: Case, tier: Tier) -> str:
    """The case in the customer's words. `extra` mixes seen phrases with others, fixed and composed, that only
    pretraining has, and with sentences beside the matter.
    """
    parts = _composed(rng, case) if tier == "extra" and rng.random() < 0.65 else _fixed(rng, case, tier)
    _order(rng, parts, tier)
    if tier == "extra" and rng.random() < 0.25:
        parts.insert(rng.randint(0, 3), wordings.stray_words(rng, 3, 8).capitalize() + ".")
    text = " ".join([rng.choice(phrases.OPENINGS), *parts, rng.choice(phrases.CLOSINGS)]).strip()
    return _fill(rng, text, case)


def write_request(rng: random.Random, case: Case) -> str:
    """Only the sentence that says what the customer wants, in words that pretraining may see."""
    known = phrases.ASK_SEEN[case.issue] + phrases.ASK_EXTRA[case.issue]
    text = wordings.ask(rng, case.issue) if rng.random() < 0.7 else rng.choice(known)
    return _fill(rng, text, case)


def _fill(rng: random.Random, text: str, case: Case) -> str:
    return text.format(
        name=case.person.name,
        town=case.person.town,
        product=case.said_product,
        amount=case.amount,
        day=rng.choice(phrases.DAYS),
        count=rng.randint(2, 9),
    )


def _composed(rng: random.Random, case: Case) -> list[str]:
    return [wordings.who(rng), wordings.ask(rng, case.issue), wordings.money(rng)]


def _fixed(rng: random.Random, case: Case, tier: Tier) -> list[str]:
    asks = (phrases.ASK_SEEN[case.issue], phrases.ASK_EXTRA[case.issue], phrases.ASK_NEW[case.issue])
    return [
        rng.choice(_pool(phrases.WHO_SEEN, phrases.WHO_EXTRA, phrases.WHO_NEW, tier)),
        rng.choice(_pool(*asks, tier)),
        rng.choice(_pool(phrases.MONEY_SEEN, phrases.MONEY_EXTRA, phrases.MONEY_NEW, tier)),
    ]


def _pool(seen: tuple[str, ...], extra: tuple[str, ...], new: tuple[str, ...], tier: Tier) -> tuple[str, ...]:
    return {"seen": seen, "extra": seen + extra, "new": new}[tier]


def _order(rng: random.Random, parts: list[str], tier: Tier) -> None:
    """Rows of the seen tier keep the money after the question; the other tiers take any order."""
    rng.shuffle(parts)
    if tier == "seen":
        money = next(part for part in parts if "{amount}" in part)
        parts.remove(money)
        asked = next(i for i, part in enumerate(parts) if "{product}" in part)
        parts.insert(asked + 1, money)
