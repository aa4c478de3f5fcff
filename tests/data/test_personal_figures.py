"""Recall and precision by kind on the labelled set, and check digits against python-stdnum."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from personal_cases import CHECKSUMMED, KINDS, negatives, positives

from charkha.data.check_digits import gstin_holds, iban_holds, luhn_holds, verhoeff_holds
from charkha.data.personal import find_personal
from charkha.personal_kinds import PERSONAL_KINDS

PER_KIND, NEGATIVE_COUNT = 220, 5200


@pytest.fixture(scope="module")
def figures():
    """kind -> (found right, made, found wrong) over all texts."""
    rng = random.Random(20250601)
    cases = positives(rng, PER_KIND) + negatives(rng, NEGATIVE_COUNT)
    right, made, wrong = Counter(), Counter(), Counter()
    for case in cases:
        made[case.kind] += 1
        for find in find_personal(case.text):
            if (find.kind, find.start, find.end) == (case.kind, case.start, case.end):
                right[find.kind] += 1
            else:
                wrong[find.kind] += 1
    return right, made, wrong


def test_the_labelled_set_is_large_and_holds_every_kind(figures):
    _, made, _ = figures
    assert sum(count for kind, count in made.items() if kind) >= 5000
    assert made[None] >= 5000
    assert set(KINDS) == set(PERSONAL_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_found_where_it_is_and_nowhere_else(figures, kind):
    right, made, wrong = figures
    recall, precision = right[kind] / made[kind], right[kind] / max(1, right[kind] + wrong[kind])
    least_recall, least_precision = (0.99, 0.98) if kind in CHECKSUMMED else (0.95, 0.90)
    assert recall >= least_recall, f"{kind}: recall {recall:.3f}"
    assert precision >= least_precision, f"{kind}: precision {precision:.3f}"


def test_check_digits_agree_with_python_stdnum():
    from stdnum import iban, luhn, verhoeff
    from stdnum.in_ import gstin

    rng = random.Random(7)
    for _ in range(2000):
        number = "".join(rng.choices("0123456789", k=rng.choice([10, 12, 16])))
        assert verhoeff_holds(number) == verhoeff.is_valid(number)
        assert luhn_holds(number) == luhn.is_valid(number)
    for kind, ours, theirs in (("gstin", gstin_holds, gstin.is_valid), ("iban", iban_holds, iban.is_valid)):
        for _ in range(200):
            value = KINDS[kind][0](rng).replace(" ", "")
            spoilt = value[:-1] + ("1" if value[-1] != "1" else "2")
            if value[:2] != "38" or kind != "gstin":  # python-stdnum does not know Ladakh's state code
                assert ours(value) is theirs(value) is True
            assert ours(spoilt) is theirs(spoilt) is False


def test_numbers_that_python_stdnum_accepts_are_found():
    from stdnum.in_ import aadhaar, epic, pan, vid

    rng = random.Random(11)
    for kind, module, label in (
        ("aadhaar", aadhaar, "Aadhaar"),
        ("vid", vid, "VID"),
        ("epic", epic, "voter id"),
        ("pan", pan, "PAN"),
    ):
        for _ in range(100):
            value = KINDS[kind][0](rng).replace(" ", "").replace("-", "").replace(".", "")
            assert module.is_valid(value)
            assert [find.kind for find in find_personal(f"{label}: {value}")] == [kind]
