"""Energy at the wall, what it costs, what renting the same hours would, and when buying pays.

Amounts carry their currency; nothing is converted but by the rate of exchange that the tables' date goes with, which is
shown. Prices are rentals.csv and card_prices.csv beside this file, dated and editable.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from charkha.errors import UsageError
from charkha.hardware.catalog import Gpu, UnknownGpu, find_gpu
from charkha.hardware.machine import BASE_POWER_W, SUPPLY_EFFICIENCY, Machine

RUPEES_PER_DOLLAR = 93.0  # 2026-11; what Indian offers in both currencies imply
_TRAINING_LOAD = 0.92  # of a card's power limit, while it trains
_UPS_SAVING_SECONDS = 120.0  # to see the mains fail, finish a step, save and stop
_HOURS_PER_MONTH_DAY = 30.4


@dataclass(frozen=True)
class Origin:
    """Where a price is from. `as_of` is a month (YYYY-MM), None for a table that does not say."""

    as_of: str | None
    source: str  # provider | report | estimate | yours
    checked: bool  # whether a page that states it was read

    def words(self, today: date) -> str:
        """`2026-03, 8 months ago, an estimate that nobody checked`."""
        told = {"provider": "by its own page", "report": "by a report", "estimate": "an estimate"}.get(self.source, "")
        age = _months_since(self.as_of, today)
        when = "undated" if self.as_of is None else f"as of {self.as_of}"
        old = f"{age} month{'s' * (age != 1)} ago" if age else ""
        return ", ".join(part for part in (when, old, told, "" if self.checked else "not checked") if part)


def _months_since(as_of: str | None, today: date) -> int:
    if as_of is None:
        return 0
    year, month = (int(part) for part in as_of.split("-")[:2])
    return max(0, 12 * (today.year - year) + today.month - month)


@dataclass(frozen=True)
class Rental:
    """One offer. `per_hour` is one card's, tax included."""

    provider: str
    kind: str  # india | hyperscaler | marketplace
    gpu: str
    per_hour: float
    currency: str
    origin: Origin


@dataclass(frozen=True)
class Cost:
    """What a run takes. Amounts in `currency`."""

    currency: str
    wall_w: float
    energy_kwh: float
    electricity: float
    rental_equivalent: float | None  # the cheapest offer of the same card; None where nobody offers it
    rental_provider: str | None
    rental_origin: Origin | None
    ups_minutes: float
    ups_wh: float


def wall_watts(machine: Machine) -> float:
    """Watts at the plug while the machine trains."""
    kind = machine.gpu.kind if machine.gpu else "desktop"
    cards = sum(gpu.power_w for gpu in machine.gpus) * _TRAINING_LOAD
    return (cards + BASE_POWER_W.get(kind, 100.0)) / SUPPLY_EFFICIENCY


def run_cost(machine: Machine, seconds: float, *, currency: str, electricity_per_kwh: float, machines: int = 1) -> Cost:
    """Energy and money of `seconds` of training on `machine`, or on so many like it."""
    watts = machines * wall_watts(machine)
    energy = watts * seconds / 3.6e6
    offers = {gpu.name: cheapest_rental(gpu, currency) for gpu in dict.fromkeys(machine.gpus)}
    known = {name: offer for name, offer in offers.items() if offer is not None}
    offer = next(iter(known.values())) if known and len(known) == len(offers) else None  # where every card is offered
    rent = machines * sum(known[gpu.name].per_hour for gpu in machine.gpus) * seconds / 3600 if offer else None
    return Cost(
        currency=currency,
        wall_w=watts,
        energy_kwh=energy,
        electricity=energy * electricity_per_kwh,
        rental_equivalent=rent,
        rental_provider=offer.provider if offer else None,
        rental_origin=offer.origin if offer else None,
        ups_minutes=_UPS_SAVING_SECONDS / 60,
        ups_wh=watts * _UPS_SAVING_SECONDS / 3600,
    )


def rentals(currency: str) -> tuple[Rental, ...]:
    """Every offer, tax included, in `currency` (INR or USD; other currencies stay as they are offered)."""
    offers = []
    for row in _table("CHARKHA_RENTALS", "rentals.csv", ("provider", "gpu", "per_hour", "currency", "tax")):
        tax = _number(row, "tax", "CHARKHA_RENTALS", "a share from 0 to 1, such as 0.18", lambda share: 0 <= share < 1)
        with_tax = _price(row, "per_hour", "CHARKHA_RENTALS") * (1 + tax)
        price = _converted(with_tax, row["currency"], currency)
        shown = currency if price is not None else row["currency"]
        price = with_tax if price is None else price
        origin = _origin(row, "CHARKHA_RENTALS", ("yes",))
        offers.append(Rental(row["provider"], row.get("kind") or "", row["gpu"], price, shown, origin))
    return tuple(offers)


def cheapest_rental(gpu: Gpu, currency: str) -> Rental | None:
    """The offer of that card that costs least in `currency`."""
    same = [offer for offer in rentals(currency) if _same_card(offer.gpu, gpu) and offer.currency == currency]
    return min(same, key=lambda offer: offer.per_hour, default=None)


@dataclass(frozen=True)
class BuyOrRent:
    """Months until a bought card has cost less than a rented one, at so many hours a day. None: never."""

    gpu: str
    currency: str
    price: float
    rental_per_hour: float
    rental_provider: str
    electricity_per_hour: float
    hours_per_day: float
    months: float | None
    months_if_rent_falls_a_third: float | None
    months_with_half_the_hours: float | None
    loss_of_value_per_month: tuple[float, float]  # over 18 and over 12 months, to a third of the price
    price_origin: Origin
    rental_origin: Origin


def buy_or_rent(
    machine: Machine, *, currency: str, electricity_per_kwh: float, hours_per_day: float
) -> BuyOrRent | None:
    """Whether buying pays, by card; None where there is no price or no offer for it.

    Raises UsageError for hours that no day has.
    """
    if not 0 < hours_per_day <= 24:
        raise UsageError(
            f"{hours_per_day} hours a day", where="--hours-per-day", remedy="give a number above 0 and at most 24"
        )
    gpu = machine.gpu
    offer = cheapest_rental(gpu, currency) if gpu else None
    bought = card_price(gpu, currency) if gpu else None
    if gpu is None or offer is None or bought is None:
        return None
    price, price_origin = bought
    power = wall_watts(machine) / len(machine.gpus) / 1000 * electricity_per_kwh

    def months(rent: float, hours: float) -> float | None:
        saved = (rent - power) * hours * _HOURS_PER_MONTH_DAY
        return price / saved if saved > 0 else None

    return BuyOrRent(
        gpu=gpu.name,
        currency=currency,
        price=price,
        rental_per_hour=offer.per_hour,
        rental_provider=offer.provider,
        electricity_per_hour=power,
        hours_per_day=hours_per_day,
        months=months(offer.per_hour, hours_per_day),
        months_if_rent_falls_a_third=months(offer.per_hour * 2 / 3, hours_per_day),
        months_with_half_the_hours=months(offer.per_hour, hours_per_day / 2),
        loss_of_value_per_month=(price * 2 / 3 / 18, price * 2 / 3 / 12),
        price_origin=price_origin,
        rental_origin=offer.origin,
    )


def card_price(gpu: Gpu, currency: str) -> tuple[float, Origin] | None:
    """What one new card costs, and where that is from: in India with GST for INR, the list price for USD."""
    column = currency.lower()
    for row in _table("CHARKHA_CARD_PRICES", "card_prices.csv", ("gpu",)):
        if _same_card(row["gpu"], gpu) and currency in ("INR", "USD") and row.get(column):
            price = _price(row, column, "CHARKHA_CARD_PRICES")
            return price, _origin(row, "CHARKHA_CARD_PRICES", (column, "both", "yes"))
    return None


def _price(row: dict[str, str], column: str, variable: str) -> float:
    return _number(row, column, variable, "an amount above 0, such as 2500", lambda price: price > 0)


def _number(row: dict[str, str], column: str, variable: str, form: str, is_possible: Callable[[float], bool]) -> float:
    """The number in that cell. Raises UsageError naming the row where it is none, or none that is possible."""
    text = row[column].strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and is_possible(value):
        return value
    raise UsageError(
        f"{column} of {row['gpu']} is {text!r}, not {form}",
        where=os.environ.get(variable),
        remedy=f"correct the table that {variable} names",
    )


def _origin(row: dict[str, str], variable: str, checked: tuple[str, ...]) -> Origin:
    """In a table of the user's own that does not say it, the user is. Raises UsageError for a month that is none."""
    as_of = row.get("as_of") or None
    if as_of is not None and re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])(-\d\d)?", as_of) is None:
        raise UsageError(
            f"as_of is {as_of!r}, not a month", where=os.environ.get(variable), remedy="write it as 2026-11"
        )
    own = variable in os.environ and not row.get("checked")
    return Origin(as_of, row.get("source") or "yours", own or row.get("checked") in checked)


def _converted(amount: float, offered: str, wanted: str) -> float | None:
    rates = {("USD", "INR"): RUPEES_PER_DOLLAR, ("INR", "USD"): 1 / RUPEES_PER_DOLLAR}
    rate = 1.0 if offered == wanted else rates.get((offered, wanted))
    return None if rate is None else amount * rate


def _same_card(name: str, gpu: Gpu) -> bool:
    try:
        return find_gpu(name).name == gpu.name
    except UnknownGpu:
        return False


def _table(variable: str, name: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    path = Path(os.environ.get(variable) or Path(__file__).with_name(name)).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"the table of prices cannot be read: {error.strerror}", where=str(path), remedy=f"correct {variable}"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the table of prices is not UTF-8 at byte {error.start}", where=str(path), remedy=f"correct {variable}"
        ) from None
    rows = list(csv.DictReader(line for line in lines if line.strip() and not line.startswith("#")))
    if any(column not in row or not row[column] for row in rows for column in columns):
        raise UsageError(
            f"the table of prices lacks one of {', '.join(columns)}", where=str(path), remedy=f"correct {variable}"
        )
    return rows
