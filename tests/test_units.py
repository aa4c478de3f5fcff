from __future__ import annotations

import math

import pytest

from charkha import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (10 * 2**20, "10 MiB"),
        (100 * 2**30, "100 GiB"),
        (int(23.68 * 2**30), "23.7 GiB"),
        (5 * 2**40, "5 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_told_in_binary_units_with_three_digits(count: float, text: str) -> None:
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (3600, "1 h"),
        (3660, "1 h 1 min"),
        (90061, "1 d 1 h"),
        (math.inf, "unknown"),
        (math.nan, "unknown"),
    ],
)
def test_seconds_are_told_in_the_two_largest_units(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (1500, "1.5 k"), (1234567, "1.23 M"), (8.03e9, "8.03 B")])
def test_counts_are_told_in_decimal_thousands(count: float, text: str) -> None:
    assert units.format_count(count) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("300s", 300), ("5min", 300), (" 1.5 H ", 5400), ("2m", 120), ("1d", 86400), ("0s", 0)]
)
def test_durations_are_read_with_their_unit(text: str, seconds: float) -> None:
    assert units.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["300", "", "5 fortnights", "-5s", "1e3s", "s", "5 min 3 s"])
def test_a_duration_without_a_known_unit_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="300s"):
        units.parse_seconds(text)


@pytest.mark.parametrize(("text", "count"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5kib", 1536)])
def test_sizes_tell_binary_from_decimal_units(text: str, count: int) -> None:
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24", "24 G", "GiB", "-1GB"])
def test_a_size_without_a_known_unit_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="24GiB"):
        units.parse_bytes(text)
