"""Personal data and secrets in a text: where, of which kind, how sure.

Aadhaar, PAN and other Indian numbers, phone, card and bank numbers, addresses, dates of birth, and keys. Numbers with
a check digit are checked; the others need the words around them. Digits of Indic scripts, spaces, hyphens, dots and
invisible characters inside are seen through. Not covered: names, postal addresses, numbers spelt in words, numbers
with a mistyped check digit, and what stands in pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from charkha.data.folding import fold
from charkha.data.personal_addresses import find_addresses, find_births, find_ip_addresses
from charkha.data.personal_codes import find_codes
from charkha.data.personal_finds import Find
from charkha.data.personal_labels import Labels
from charkha.data.personal_numbers import find_numbers
from charkha.data.secrets import find_secrets

DETECTORS_VERSION = 1  # rises when the same text may give other finds; recorded with every scan

_DIGIT = re.compile("[0-9]")


def find_personal(text: str) -> tuple[Find, ...]:
    """Every find, left to right, none overlapping; start and end count characters of `text` as it is given."""
    if text.isascii():
        return _without_overlap(list(_all_finds(text)))
    folded = fold(text)
    found = _without_overlap(list(_all_finds(folded.text)))
    if folded.cuts:
        return tuple(Find(find.kind, *folded.original(find.start, find.end), find.confidence) for find in found)
    return found


def _all_finds(text: str) -> Iterator[Find]:
    labels = Labels(text)
    if "@" in text or "%40" in text or "at]" in text or "at)" in text:
        yield from find_addresses(text, labels)
    if _DIGIT.search(text):
        yield from find_codes(text, labels)
        yield from find_numbers(text, labels)
        yield from find_ip_addresses(text, labels)
        yield from find_births(text, labels.lower)
    yield from find_secrets(text, labels.lower)


def _without_overlap(found: list[Find]) -> tuple[Find, ...]:
    """Of finds that overlap the surest stays, of equally sure ones a secret, then the longest."""
    if len(found) < 2:
        return tuple(found)
    found.sort(key=lambda find: (find.confidence != "high", find.kind != "secret", find.start - find.end, find.start))
    kept: list[Find] = []
    taken: set[int] = set()
    for find in found:
        places = range(find.start, find.end)
        if taken.isdisjoint(places):
            kept.append(find)
            taken.update(places)
    return tuple(sorted(kept, key=lambda find: find.start))
