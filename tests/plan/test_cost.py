"""Energy and money: arithmetic that can be done by hand, tables that can be edited, offers in both currencies."""

from __future__ import annotations

from pathlib import Path

import pytest

from charkha.errors import UsageError
from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.cost import RUPEES_PER_DOLLAR, buy_or_rent, cheapest_rental, rentals, run_cost, wall_watts

MACHINE = Machine("office", (find_gpu("RTX 4090"),), None)


def test_energy_is_watts_at_the_wall_times_hours() -> None:
    cost = run_cost(MACHINE, 3600 * 10, currency="INR", electricity_per_kwh=8)
    assert cost.wall_w == pytest.approx((450 * 0.92 + 100) / 0.9)
    assert cost.energy_kwh == pytest.approx(cost.wall_w / 100)
    assert cost.electricity == pytest.approx(8 * cost.energy_kwh)
    assert cost.ups_wh == pytest.approx(cost.wall_w * cost.ups_minutes / 60)


def test_two_cards_draw_nearly_twice_as_much() -> None:
    two = Machine("pair", MACHINE.gpus * 2, None)
    assert 1.7 < wall_watts(two) / wall_watts(MACHINE) < 2


def test_offers_carry_tax_and_one_currency() -> None:
    rupees, dollars = rentals("INR"), rentals("USD")
    assert {offer.currency for offer in rupees} == {"INR"}
    assert {offer.kind for offer in rupees} == {"india", "hyperscaler", "marketplace"}
    assert rupees[0].per_hour == pytest.approx(dollars[0].per_hour * RUPEES_PER_DOLLAR)
    with_tax = next(offer for offer in dollars if offer.provider == "AWS" and offer.gpu == "T4")
    assert with_tax.per_hour == pytest.approx(0.53 * 1.18)


def test_a_users_own_prices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("provider,kind,gpu,per_hour,currency,tax\nA friend,india,4090,10,INR,0\n")
    monkeypatch.setenv("CHARKHA_RENTALS", str(table))
    offer = cheapest_rental(find_gpu("RTX 4090"), "INR")
    assert offer is not None
    assert (offer.provider, offer.per_hour) == ("A friend", 10)
    assert run_cost(MACHINE, 7200, currency="INR", electricity_per_kwh=10).rental_equivalent == pytest.approx(20)
    table.write_text("provider,price\nA friend,10\n")
    with pytest.raises(UsageError, match="lacks one of"):
        rentals("INR")
    table.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        rentals("INR")


def test_no_offer_in_another_currency_is_made_up() -> None:
    assert run_cost(MACHINE, 3600, currency="EUR", electricity_per_kwh=0.3).rental_equivalent is None


def test_buying_never_pays_where_electricity_costs_more_than_renting() -> None:
    answer = buy_or_rent(MACHINE, currency="INR", electricity_per_kwh=500, hours_per_day=8)
    assert answer is not None
    assert answer.months is None


def test_months_to_pay_back_by_hand() -> None:
    answer = buy_or_rent(MACHINE, currency="INR", electricity_per_kwh=10, hours_per_day=10)
    assert answer is not None
    assert answer.months == pytest.approx(
        answer.price / ((answer.rental_per_hour - answer.electricity_per_hour) * 10 * 30.4)
    )
    assert answer.loss_of_value_per_month[0] < answer.loss_of_value_per_month[1]
