"""Energy and money: arithmetic that can be done by hand, tables that can be edited, offers in both currencies."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from charkha.errors import UsageError
from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.cost import (
    RUPEES_PER_DOLLAR,
    Origin,
    buy_or_rent,
    card_price,
    cheapest_rental,
    rentals,
    run_cost,
    wall_watts,
)

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


def test_every_price_of_ours_is_dated_and_says_where_it_is_from() -> None:
    offers = rentals("USD")
    prices = [card_price(find_gpu(name), "USD") for name in ("RTX 3060 12GB", "RTX 5090", "H100 80GB", "H200")]
    origins = [offer.origin for offer in offers] + [price[1] for price in prices if price]
    assert len(origins) == len(offers) + 4
    assert all(origin.as_of and "2026-01" <= origin.as_of <= "2026-12" for origin in origins)
    assert {origin.source for origin in origins} == {"provider", "report", "estimate"}
    assert all(origin.checked == (origin.source != "estimate") for origin in origins[: len(offers)])


def test_a_price_is_told_with_its_age() -> None:
    today = date(2026, 11, 25)
    assert Origin("2026-03", "report", True).words(today) == "as of 2026-03, 8 months ago, by a report"
    assert Origin("2026-11", "estimate", False).words(today) == "as of 2026-11, an estimate, not checked"
    assert Origin(None, "yours", True).words(today) == "undated"
    assert Origin("2025-11-30", "provider", True).words(today) == "as of 2025-11-30, 12 months ago, by its own page"


def test_a_price_is_checked_in_the_currency_that_a_source_states() -> None:
    told = [card_price(find_gpu("RTX 5090"), currency) for currency in ("INR", "USD")]
    assert [price[1].checked for price in told if price] == [True, False]


def test_a_users_own_card_prices_are_read_with_or_without_a_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mine.csv"
    monkeypatch.setenv("CHARKHA_CARD_PRICES", str(table))
    table.write_text("gpu,inr,usd\nRTX 4090,190000,1700\n")
    answer = buy_or_rent(MACHINE, currency="INR", electricity_per_kwh=10, hours_per_day=8)
    assert answer is not None
    assert (answer.price, answer.price_origin) == (190000, Origin(None, "yours", True))
    table.write_text("gpu,inr,usd,as_of,source,checked\nRTX 4090,190000,1700,2026-12,provider,no\n")
    dated = buy_or_rent(MACHINE, currency="INR", electricity_per_kwh=10, hours_per_day=8)
    assert dated is not None
    assert dated.price_origin == Origin("2026-12", "provider", False)
    table.write_text("gpu,inr,usd,as_of\nRTX 4090,190000,1700,yesterday\n")
    with pytest.raises(UsageError, match="not a month"):
        buy_or_rent(MACHINE, currency="INR", electricity_per_kwh=10, hours_per_day=8)


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


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("A,india,4090,ten,INR,0.18", "per_hour of 4090 is 'ten'"),
        ("A,india,4090,-10,INR,0.18", "'-10', not an amount above 0"),
        ("A,india,4090,inf,INR,0.18", "'inf', not an amount"),
        ("A,india,4090,10,INR,18", "tax of 4090 is '18', not a share"),
        ("A,india,4090,10,INR,18%", "'18%'"),
    ],
)
def test_a_number_that_can_be_no_price_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, said: str
) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(f"provider,kind,gpu,per_hour,currency,tax\n{row}\n")
    monkeypatch.setenv("CHARKHA_RENTALS", str(table))
    with pytest.raises(UsageError, match=said) as refused:
        rentals("INR")
    assert refused.value.where == str(table)
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        rentals("INR")


def test_a_users_card_prices_may_be_in_one_currency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "cards.csv"
    table.write_text("gpu,inr\nRTX 4090,180000\n")
    monkeypatch.setenv("CHARKHA_CARD_PRICES", str(table))
    found = card_price(find_gpu("RTX 4090"), "INR")
    assert found is not None
    assert found[0] == 180_000
    assert card_price(find_gpu("RTX 4090"), "USD") is None
    table.write_text('gpu,inr\nRTX 4090,"1,80,000"\n')
    with pytest.raises(UsageError, match="inr of RTX 4090"):
        card_price(find_gpu("RTX 4090"), "INR")


def test_unlike_cards_are_rented_each_at_its_own_price() -> None:
    def rent(*cards: str) -> float | None:
        machine = Machine("office", tuple(find_gpu(card) for card in cards), None)
        return run_cost(machine, 3600, currency="INR", electricity_per_kwh=10).rental_equivalent

    old, new = rent("RTX 3090"), rent("RTX 4090")
    assert old is not None
    assert new is not None
    assert rent("RTX 3090", "RTX 4090", "RTX 3090") == pytest.approx(2 * old + new)
    assert rent("RTX 4090", "RTX 3060") is None  # which nobody offers
