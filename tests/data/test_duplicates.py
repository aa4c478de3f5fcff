from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from charkha.data import duplicates
from charkha.data.duplicates import find_duplicates, find_leakage
from charkha.data.minhash import plain_form, signatures
from charkha.data.rows import TextRow

WORDS = [f"{a}{b}{c}" for a in "kstnhm" for b in "aeiou" for c in ("ra", "ni", "ko", "चल", "नी", "ம்")]


def text(seed: int, words: int = 80) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original: str, count: int, seed: int = 0) -> str:
    chosen, parts = random.Random(seed), original.split()
    for place in chosen.sample(range(len(parts)), count):
        parts[place] = chosen.choice(WORDS)
    return " ".join(parts)


def jaccard(one: str, other: str) -> float:
    sets = [{plain[i : i + 8] for i in range(len(plain) - 7)} for plain in (plain_form(one), plain_form(other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_jaccard_similarity() -> None:
    pairs = [(text(seed), changed(text(seed), count, seed)) for seed in range(40) for count in (0, 1, 3, 8, 20)]
    ones, others = signatures([one for one, _ in pairs]), signatures([other for _, other in pairs])
    errors = (ones == others).mean(axis=1) - np.asarray([jaccard(*pair) for pair in pairs])
    assert abs(errors.mean()) < 0.01
    assert np.sqrt((errors**2).mean()) < 0.044  # the bound for 128 bins


def test_a_text_has_the_same_signature_alone_and_among_others() -> None:
    texts = ["", "a", "short", text(1), text(2, 5000), "क"]
    together = signatures(texts)
    assert all((signatures([one])[0] == row).all() for one, row in zip(texts, together, strict=True))


def test_exact_and_near_repetitions_are_told_apart() -> None:
    texts = [text(seed) for seed in range(300)]
    rows = [TextRow(one) for one in texts]
    rows += [
        TextRow(texts[7]),
        TextRow(texts[8].upper()),
        TextRow(changed(texts[9], 1)),
        TextRow(changed(texts[10], 30)),
    ]
    report = find_duplicates(rows)
    assert (report.rows, report.exact, report.near) == (304, 1, 2)
    assert {(pair.row, pair.earlier) for pair in report.pairs} == {(300, 7), (301, 8), (302, 9)}


def test_leaked_rows_are_found_in_the_training_data() -> None:
    train = [TextRow(text(seed)) for seed in range(200)]
    held_out = [TextRow(text(5)), TextRow(changed(text(6), 1)), TextRow(text(999)), TextRow(text(999))]
    report = find_leakage(train, held_out)
    assert (report.rows, report.exact, report.near) == (4, 1, 1)
    assert {(pair.row, pair.earlier) for pair in report.pairs} == {(0, 5), (1, 6)}


def test_bands_in_many_parts_find_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [TextRow(changed(text(seed % 40), seed % 3, seed)) for seed in range(200)]
    whole = find_duplicates(rows)
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 17)
    monkeypatch.setattr(duplicates, "_BATCH_ROWS", 9)
    parts = find_duplicates(rows)
    assert (parts.exact, parts.near) == (whole.exact, whole.near)
    assert whole.exact + whole.near > 120


def test_nothing_is_no_duplicate() -> None:
    assert find_duplicates([]).rows == 0
    assert find_leakage([TextRow("a")], []).exact == 0
