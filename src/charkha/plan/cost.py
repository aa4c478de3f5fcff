"""Energy at the wall, what it costs, what renting the same hours would, and when buying pays.

Amounts carry their currency; nothing is converted but by the rate of exchange that the tables' date goes with, which is
shown. Prices are rentals.csv and card_prices.csv beside this file, dated and editable.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from charkha.errors import UsageError
from charkha.hardware.catalog import Gpu, UnknownGpu, find_gpu
from charkha.hardware.machine import BASE_POWER_W, SUPPLY_EFFICIENCY, Machine

AS_OF = "2026-11"
RUPEES_PER_DOLLAR = 88.0
_TRAINING_LOAD = 0.92  # of a card's power limit, while it trains
_UPS_SAVING_SECONDS = 120.0  # to see the mains fail, finish a step, save and stop
_HOURS_PER_MONTH_DAY = 30.4


@dataclass(frozen=True)
class Rental:
    """One offer. `per_hour` is one card's, tax included."""

    provider: str
    kind: str  # india | hyperscaler | marketplace
    gpu: str
    per_hour: float
    currency: str


@dataclass(frozen=True)
class Cost:
    """What a run takes. Amounts in `currency`."""

    currency: str
    wall_w: float
    energy_kwh: float
    electricity: float
    rental_equivalent: float | None  # the cheapest offer of the same card; None where nobody offers it
    rental_provider: str | None
    ups_minutes: float
    ups_wh: float


def wall_watts(machine: Machine) -> float:
    """Watts at the plug while the machine trains."""
    kind = machine.gpu.kind if machine.gpu else "desktop"
    cards = sum(gpu.power_w for gpu in machine.gpus) * _TRAINING_LOAD
    return (cards + BASE_POWER_W.get(kind, 100.0)) / SUPPLY_EFFICIENCY


def run_cost(machine: Machine, seconds: float, *, currency: str, electricity_per_kwh: float) -> Cost:
    """Energy and money of `seconds` of training on `machine`."""
    watts = wall_watts(machine)
    energy = watts * seconds / 3.6e6
    offer = cheapest_rental(machine.gpu, currency) if machine.gpu else None
    rent = None if offer is None else offer.per_hour * len(machine.gpus) * seconds / 3600
    return Cost(
        currency=currency,
        wall_w=watts,
        energy_kwh=energy,
        electricity=energy * electricity_per_kwh,
        rental_equivalent=rent,
        rental_provider=offer.provider if offer else None,
        ups_minutes=_UPS_SAVING_SECONDS / 60,
        ups_wh=watts * _UPS_SAVING_SECONDS / 3600,
    )


def rentals(currency: str) -> tuple[Rental, ...]:
    """Every offer, tax included, in `currency` (INR or USD; other currencies stay as they are offered)."""
    offers = []
    for row in _table("CHARKHA_RENTALS", "rentals.csv", ("provider", "gpu", "per_hour", "currency", "tax")):
        with_tax = float(row["per_hour"]) * (1 + float(row["tax"]))
        price = _converted(with_tax, row["currency"], currency)
        shown = currency if price is not None else row["currency"]
        offers.append(Rental(row["provider"], row["kind"], row["gpu"], with_tax if price is None else price, shown))
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
    price = card_price(gpu, currency) if gpu else None
    if gpu is None or offer is None or price is None:
        return None
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
    )


def card_price(gpu: Gpu, currency: str) -> float | None:
    """What one new card costs: in India with GST for INR, the list price for USD."""
    for row in _table("CHARKHA_CARD_PRICES", "card_prices.csv", ("gpu", "inr", "usd")):
        if _same_card(row["gpu"], gpu) and currency in ("INR", "USD"):
            return float(row[currency.lower()])
    return None


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
    rows = list(csv.DictReader(line for line in lines if line.strip() and not line.startswith("#")))
    if any(column not in row or not row[column] for row in rows for column in columns):
        raise UsageError(
            f"the table of prices lacks one of {', '.join(columns)}", where=str(path), remedy=f"correct {variable}"
        )
    return rows
