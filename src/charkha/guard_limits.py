"""What the owner allows: temperature, watts, a budget and hours; and the config's words for them, parsed.

Accepted forms
    windows   "22:00-06:00", "Mon-Fri 21:00-07:00", "Sat,Sun"; a window past midnight belongs to the day it begins on
    budget    500 and "500 INR" (money in cost.currency), "12 kWh"
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MINUTES_PER_DAY = 1440
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_EVERY_DAY = frozenset(range(7))
_CURRENCY_SIGNS = {"₹": "INR", "RS": "INR", "$": "USD", "€": "EUR", "£": "GBP"}
_WINDOW_FORMS = 'write for example "22:00-06:00", "Mon-Fri 21:00-07:00" or "Sat,Sun"'


_WINDOW = re.compile(r"\s*([A-Za-z][A-Za-z,\s-]*?)?\s*(?:(\d\d?:\d\d)\s*-\s*(\d\d?:\d\d))?\s*")


@dataclass(frozen=True)
class Window:
    """Hours in which a run may work. `weekdays` counts from Monday = 0 and names the days on which it begins."""

    start_minute: int
    end_minute: int  # at or before the start: the next day's
    weekdays: frozenset[int] = _EVERY_DAY
    text: str = ""

    def holds(self, weekday: int, minute: int) -> bool:
        """Whether this minute of this day lies inside."""
        if self.start_minute < self.end_minute:
            return weekday in self.weekdays and self.start_minute <= minute < self.end_minute
        begun_today = weekday in self.weekdays and minute >= self.start_minute
        return begun_today or ((weekday - 1) % 7 in self.weekdays and minute < self.end_minute)

    def opens_in_minutes(self, weekday: int, minute: int) -> int:
        """Minutes until it next begins, 1 to 7 days."""
        waits = ((day - weekday) * MINUTES_PER_DAY + self.start_minute - minute for day in self.weekdays)
        return min(wait if wait > 0 else wait + 7 * MINUTES_PER_DAY for wait in waits)


@dataclass(frozen=True)
class Budget:
    """What a run may cost. `unit` is "kWh" or a currency."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclass(frozen=True)
class GuardLimits:
    """What the owner allows, and what a save costs here."""

    target_temperature_c: float = 83.0
    max_power_w: float | None = None  # ceiling of inverter or breaker for the GPUs together
    budget: Budget | None = None
    windows: tuple[Window, ...] = ()  # empty: always
    save_seconds: float = 10.0  # measured; a battery that lasts less than three saves is low
    outage_pause_s: float = 20.0  # how long on battery before the run waits in place


def open_window(windows: tuple[Window, ...], weekday: int, minute: int) -> bool:
    """Whether the run may work now."""
    return not windows or any(window.holds(weekday, minute) for window in windows)


def next_opening(windows: tuple[Window, ...], weekday: int, minute: int) -> tuple[str, int]:
    """When the run may work again: `Mon 21:00`, and the minutes until then."""
    wait = min(window.opens_in_minutes(weekday, minute) for window in windows)
    days, at = divmod(minute + wait, MINUTES_PER_DAY)
    return f"{_DAYS[(weekday + days) % 7]} {at // 60:02d}:{at % 60:02d}", wait


def parse_windows(texts: list[str]) -> tuple[Window, ...]:
    """The windows that `guard.windows` names. Raises ValueError showing the accepted forms."""
    return tuple(_parse_window(text) for text in texts)


def _parse_window(text: str) -> Window:
    match = _WINDOW.fullmatch(text.replace("–", "-"))
    if match is None or not (match[1] or match[2]):
        raise ValueError(f"{text!r} is not a window of time; {_WINDOW_FORMS}")
    weekdays = _parse_weekdays(match[1], text) if match[1] else _EVERY_DAY
    if match[2] is None:
        return Window(0, 0, weekdays, text.strip())
    start, end = _parse_minute(match[2], text), _parse_minute(match[3], text)
    return Window(start % MINUTES_PER_DAY, end % MINUTES_PER_DAY, weekdays, text.strip())


def _parse_weekdays(words: str, text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in words.split(","):
        first, dash, last = part.partition("-")
        start = _parse_weekday(first, text)
        length = (_parse_weekday(last, text) - start) % 7 if dash else 0
        days.update((start + step) % 7 for step in range(length + 1))
    return frozenset(days)


def _parse_weekday(word: str, text: str) -> int:
    """`Mon`, `mon` or `Monday` -> 0."""
    name = word.strip().lower()
    full = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    found = [day for day in range(7) if len(name) >= 3 and full[day].startswith(name)]
    if not found:
        raise ValueError(f"{word.strip()!r} in {text!r} is no day of the week ({', '.join(_DAYS)}); {_WINDOW_FORMS}")
    return found[0]


def _parse_minute(clock: str, text: str) -> int:
    hour, minute = (int(part) for part in clock.split(":"))
    if minute > 59 or hour * 60 + minute > MINUTES_PER_DAY:
        raise ValueError(f"{clock!r} in {text!r} is no time of day (00:00 to 24:00); {_WINDOW_FORMS}")
    return hour * 60 + minute


def parse_budget(value: str | float | None, currency: str) -> Budget | None:
    """The budget that `guard.budget` names, None without one. Raises ValueError showing the accepted forms."""
    if value is None:
        return None
    forms = f'write an amount of money (500 or "500 {currency}") or of energy ("12 kWh")'
    found = (str(float(value)), "") if isinstance(value, int | float) else _split_amount(value)
    if isinstance(value, bool) or found is None:
        raise ValueError(f"{value!r} is not a budget; {forms}")
    amount, unit = float(found[0]), found[1]
    if not (math.isfinite(amount) and amount > 0):
        raise ValueError(f"a budget of {value!r} leaves nothing to run on; {forms}")
    if unit.lower() in ("kwh", "wh"):
        return Budget(amount if unit.lower() == "kwh" else amount / 1000, "kWh")
    named = _CURRENCY_SIGNS.get(unit.upper(), unit.upper()) or currency
    if named != currency.upper() and unit:
        raise ValueError(f"{value!r} is neither in {currency} (cost.currency) nor in kWh; {forms}")
    return Budget(amount, currency)


def _split_amount(text: str) -> tuple[str, str] | None:
    """`"₹ 1,500"` -> ("1500", "₹"): the number without the commas that group it, and the unit on either side."""
    match = re.fullmatch(r"\s*([^\d\s.+-]*?)\.?\s*([-+]?\d[\d,]*(?:\.\d+)?)\s*(\S*)\s*", text)
    if match is None or (match[1] and match[3]):
        return None
    return match[2].replace(",", ""), match[1] or match[3]
