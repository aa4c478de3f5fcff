"""The sections of charkha.yaml that say how a run is kept, guarded and paid for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from charkha.config_section import Name, Section
from charkha.errors import UsageError
from charkha.guard_limits import parse_budget, parse_windows
from charkha.hardware.ups import open_ups
from charkha.units import parse_seconds


class CheckpointSection(Section):
    """How much work may be lost."""

    every: str = Field(
        "auto",
        description="Time (`5min`, `300s`) or steps (`50 steps`) between checkpoints: at most this much work is lost. "
        "auto is a minute, or longer where saving would otherwise take over 1 % of the run.",
    )
    keep: int = Field(2, ge=1, description="Newest verified checkpoints kept, beside the best and the pinned.")

    @field_validator("every")
    @classmethod
    def _every_is_time_or_steps(cls, every: str) -> str:
        interval_of(every)
        return every

    def interval(self) -> CheckpointInterval:
        """The interval as numbers; neither is set for auto."""
        return interval_of(self.every)


class CheckpointInterval(Section):
    """Time or steps between two checkpoints; neither is set where the cost of saving decides."""

    seconds: float | None = None
    steps: int | None = None


def interval_of(text: str) -> CheckpointInterval:
    """`"50 steps"`, a duration, or `auto`. Raises ValueError with the spellings."""
    if text.strip() == "auto":
        return CheckpointInterval()
    number, _, unit = text.strip().partition(" ")
    if unit.strip() in ("step", "steps"):
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"{text!r} is not a number of steps; write for example `50 steps`")
        return CheckpointInterval(steps=int(number))
    try:
        seconds = parse_seconds(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a duration (`5min`, `300s`) nor a number of steps (`50 steps`)"
        ) from None
    return CheckpointInterval(seconds=seconds)


class GuardSection(Section):
    """Limits at which the run waits or stops."""

    ups: Name = Field(
        "auto",
        description="Where the UPS is asked: `nut:NAME@HOST:PORT`, `apcupsd:HOST:PORT`, `battery`, `command:...` (exit "
        "0 mains, 1 battery, 2 low), none; auto asks NUT and apcupsd on this machine, then a laptop battery.",
    )
    max_gpu_temperature_c: float = Field(
        83, ge=40, le=110, description="GPU temperature in degrees Celsius that is held, by power limit or pacing."
    )
    max_power_w: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Watts that the GPUs may draw together, such as those of the inverter."
    )
    budget: float | str | None = Field(
        None, description="What the run may cost: money in cost.currency (500) or energy (`12 kWh`); then it stops."
    )
    windows: list[str] = Field(
        default_factory=list,
        description="Hours in which the run may work, such as [`22:00-06:00`, `Sat,Sun`]; outside it waits.",
    )

    @field_validator("ups")
    @classmethod
    def _ups_is_of_a_known_form(cls, ups: str) -> str:
        if ups != "auto":
            try:
                open_ups(ups)
            except UsageError as error:
                raise ValueError(f"{error.message}; {error.remedy}") from None
        return ups

    @field_validator("windows")
    @classmethod
    def _windows_can_be_read(cls, windows: list[str]) -> list[str]:
        parse_windows(windows)
        return windows

    @field_validator("budget")
    @classmethod
    def _budget_can_be_read(cls, budget: float | str | None) -> float | str | None:
        parse_budget(budget, _currency_named_in(str(budget)))
        return budget


def _currency_named_in(budget: str) -> str:
    """The letters of a budget, taken for its currency; whether that is cost.currency is asked with the whole config."""
    return "".join(letter for letter in budget if letter.isalpha()) or "INR"


class CostSection(Section):
    """What electricity costs here."""

    currency: str = Field("INR", pattern="^[A-Z]{3}$", description="Currency of every amount, such as INR or USD.")
    electricity_per_kwh: float = Field(
        10, ge=0, description="Your marginal price of one kWh, in that currency; where it is not given in USD, 0.11."
    )

    @model_validator(mode="before")
    @classmethod
    def _in_that_currency(cls, given: Any) -> Any:
        """Capital letters; and the usual tariff in dollars, which ten would not be."""
        if not isinstance(given, dict) or not isinstance(given.get("currency"), str):
            return given
        currency = given["currency"].strip().upper()
        return {**({"electricity_per_kwh": 0.11} if currency == "USD" else {}), **given, "currency": currency}
