"""Identity and phone numbers that are digits only: Aadhaar, VID, cards, mobile, bank account, ABHA, UAN, CKYC, PIN.

Digits are gathered over spaces, hyphens and dots into stretches; every run of groups in a stretch that could be a
number is judged by its check digit, by how it is printed, and by the words around it (`personal_labels`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from charkha.data.check_digits import card_holds, verhoeff_holds
from charkha.data.personal_finds import Confidence, Find
from charkha.data.personal_labels import OTHER, PLACE, WEAK, Labels, Meaning

_RUN = re.compile("[0-9]+")
_SEPARATORS = frozenset(" \t\n\r.-()_")
_SIX_DIGITS = re.compile(r"[0-9](?:[ \t\n\r.()_-]{0,3}[0-9]){5}")
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_UNITS = re.compile(
    r"\s*(?:rupees|rs\b|/-|%|users|views|units|pieces|pcs|bytes|ms\b|km\b|people|रुपये|ரூபாய்|টাকা|°)", re.IGNORECASE
)
_IFSC, _IFSC_REACH = re.compile(r"\b[A-Za-z]{4}0[A-Za-z0-9]{6}\b"), 48
_MONEY = "₹$€£¥"
_MOST_DIGITS, _FEWEST_DIGITS = 19, 6
_OTHER_REACH = 24  # an order or an amount speaks for a number after other words only if it is near
_PIN_CODE_REACH = 24  # six digits are seldom a PIN code: its label must be near
_PLUS_MOST = 15  # digits after a plus, by E.164


class _Number(NamedTuple):
    """Neighbouring groups of digits that may be one number. A tuple: thousands are made for a page of figures."""

    start: int
    end: int
    digits: str
    shape: tuple[int, ...]
    separators: tuple[str, ...]
    is_whole: bool  # nothing else stands in its stretch

    @property
    def is_even(self) -> bool:
        """Whether one and the same single space, hyphen or dot stands between all groups."""
        return len(self.shape) == 1 or (len(set(self.separators)) == 1 and self.separators[0] in (" ", "-", ".", "\n"))


def find_numbers(text: str, labels: Labels) -> Iterator[Find]:
    """Every digits-only find of the folded text, from left to right, none overlapping."""
    if (start := _SIX_DIGITS.search(text)) is None:
        return
    for groups in _stretches(text, start.start()):
        first = 0
        while first < len(groups):
            found, first = _from(text, labels, groups, first)
            if found is not None:
                yield found


def _stretches(text: str, begin: int) -> Iterator[list[tuple[int, int]]]:
    """Groups of digits with no more than three separators between, where they hold six digits or more."""
    groups: list[tuple[int, int]] = []
    count = last = 0
    for match in _RUN.finditer(text, begin):
        start, end = match.span()
        if groups and (start - last > 3 or not _SEPARATORS.issuperset(text[last:start])):
            if count >= _FEWEST_DIGITS:
                yield groups
            groups, count = [], 0
        groups.append((start, end))
        count += end - start
        last = end
    if count >= _FEWEST_DIGITS:
        yield groups


def _from(text: str, labels: Labels, groups: list[tuple[int, int]], first: int) -> tuple[Find | None, int]:
    """The longest find that begins with group `first`, and the group after it."""
    count = 0
    shape: tuple[int, ...] = ()
    ends: list[int] = []
    begins = text[groups[first][0] - 1 : groups[first][0]] == "+"
    for last in range(first, min(len(groups), first + _MOST_DIGITS)):
        length = groups[last][1] - groups[last][0]
        count, shape = count + length, (*shape, length)
        if count > _MOST_DIGITS:
            break
        is_whole = first == 0 and last == len(groups) - 1
        if (
            count >= _FEWEST_DIGITS
            and count not in (7, 8)
            and (begins or len(shape) == 1 or shape in _SHAPES or is_whole)
        ):
            ends.append(last)
    for last in reversed(ends):
        number = _number(text, groups, first, last)
        if number is not None and (found := _judge(text, labels, number)) is not None:
            return found, last + 1
    return None, first + 1


def _number(text: str, groups: list[tuple[int, int]], first: int, last: int) -> _Number | None:
    """The groups as one number; None where they are part of something larger."""
    if len(groups) == 1:
        start, end = groups[0]
        return _Number(start, end, text[start:end], (end - start,), (), True)
    chosen = groups[first : last + 1]
    separators = tuple(text[a[1] : b[0]] for a, b in pairwise(chosen))
    shape = tuple(end - start for start, end in chosen)
    before = text[groups[first - 1][1] : chosen[0][0]] if first else ""
    after = text[chosen[-1][1] : groups[last + 1][0]] if last + 1 < len(groups) else ""
    if before in (".", "-", "_") or after in (".", "-", "_"):
        return None
    if len(shape) > 1 and set(shape) == {4} and separators[0].strip("\n") and separators[0] in (before, after):
        neighbours = [groups[first - 1]] if before == separators[0] else []
        neighbours += [groups[last + 1]] if after == separators[0] else []
        if any(end - start == 4 for start, end in neighbours):
            return None
    start, end = chosen[0][0], chosen[-1][1]
    digits = "".join(text[a:b] for a, b in chosen)
    return _Number(start, end, digits, shape, separators, len(chosen) == len(groups))


def _judge(text: str, labels: Labels, number: _Number) -> Find | None:
    if (found := _with_country_code(text, labels, number)) is not None:
        return found
    if len(number.shape) > 1 and not number.is_whole and not _could_stand_alone(number):
        return None
    plain = _plain_verdict(number)
    grouped = plain is not None and plain[1] == "high"
    if _is_in_uuid(text, number):
        return None
    if len(number.shape) > 1 and _touches_letter(text, number.end):
        return None  # the last group belongs to a code
    glued = _is_glued(text, number)
    for meaning in labels.meanings(number.start, number.end):
        if meaning.kind in (OTHER, WEAK):
            if meaning.adjacent:
                return None
            if meaning.distance > _OTHER_REACH or "\n" in text[number.start - meaning.distance : number.start]:
                continue
            if not grouped:
                return None
            break
        kind = "pin_code" if meaning.kind == PLACE else meaning.kind
        if kind == "mobile" and _is_other_phone(number, meaning.adjacent):
            return Find("phone", number.start, number.end, "high")
        if (fits := _FITS.get(kind)) is None or not fits(number) or (glued and not meaning.adjacent):
            continue
        if meaning.kind in _ONLY_LABELLED and not meaning.adjacent and grouped:
            break
        if (confidence := _labelled_confidence(meaning, number)) is not None:
            return Find(kind, number.start, number.end, confidence)
    if plain is None and _is_beside_ifsc(text, number):
        plain = ("bank_account", "medium")
    if plain is None or glued or _is_inside_other(text, number):
        return None
    return Find(plain[0], number.start, number.end, plain[1])


def _labelled_confidence(meaning: Meaning, number: _Number) -> Confidence | None:
    if meaning.kind == PLACE:
        return "medium" if meaning.adjacent and not meaning.is_after else None
    if meaning.adjacent:
        return "high"
    if meaning.kind in _ONLY_LABELLED:
        too_far = meaning.kind == "pin_code" and meaning.distance > _PIN_CODE_REACH
        return None if too_far or len(number.shape) > 1 else "medium"
    if not number.is_even:
        return "medium" if _could_stand_alone(number) else None
    return "high"


def _with_country_code(text: str, labels: Labels, number: _Number) -> Find | None:
    """A number with a plus, which says that it is a phone's."""
    plus = number.start - 1
    while plus >= 0 and text[plus] == "(":
        plus -= 1
    if plus < 0 or text[plus] != "+" or not 8 <= len(number.digits) <= _PLUS_MOST:
        return None
    if plus > 0 and text[plus - 1].isalnum():
        return None
    if number.digits.startswith("91"):
        rest = number.digits[2:].removeprefix("0")
        return Find("mobile", plus, number.end, "high") if _is_mobile(rest) else None
    if number.digits[0] == "0" or not 10 <= len(number.digits) <= 13 or len(number.shape) > 6:
        return None
    meanings = list(labels.meanings(plus, number.end))
    if meanings and meanings[0].kind == OTHER and meanings[0].adjacent:
        return None
    sure = len(number.shape) > 1 or any(meaning.kind == "mobile" for meaning in meanings)
    return Find("phone", plus, number.end, "high" if sure else "medium")


def _is_mobile(ten: str) -> bool:
    return len(ten) == 10 and ten[0] in "6789" and len(set(ten)) > 2 and not ten.endswith("000000")


def _is_landline(number: _Number) -> bool:
    """Whether digits are an area code with its 0 and a subscriber's number."""
    digits = number.digits
    if digits[0] != "0" or digits[1] not in "12345678" or not 10 <= len(digits) <= 12:
        return False
    return 3 <= number.shape[0] <= 5 or not _is_mobile(digits[1:])


def _is_other_phone(number: _Number, adjacent: bool) -> bool:
    return _is_written_abroad(number) or (adjacent and _is_landline(number))


def _is_written_abroad(number: _Number) -> bool:
    """Whether ten digits are written as in North America (3-3-4 with hyphens or dots), or eleven as in Britain."""
    if number.shape == (3, 3, 4):
        return set(number.separators) <= {"-", "."} and number.digits[0] > "1" and number.digits[3] > "1"
    return number.shape == (5, 3, 3) and number.digits.startswith("07")


def _is_beside_ifsc(text: str, number: _Number) -> bool:
    near = text[max(0, number.start - _IFSC_REACH) : number.end + _IFSC_REACH]
    return len(number.shape) == 1 and 9 <= len(number.digits) <= 18 and _IFSC.search(near) is not None


def _national(digits: str) -> str:
    """The ten digits of a mobile number without 0, 91, 091 or 0091 in front."""
    for prefix in ("0091", "091", "91", "0"):
        if digits.startswith(prefix) and len(digits) == 10 + len(prefix):
            return digits[len(prefix) :]
    return digits


def _fits_aadhaar(number: _Number) -> bool:
    digits = number.digits
    return len(digits) == 12 and digits[0] > "1" and digits != digits[::-1] and verhoeff_holds(digits)


def _fits_vid(number: _Number) -> bool:
    digits = number.digits
    return len(digits) == 16 and digits[0] > "1" and digits != digits[::-1] and verhoeff_holds(digits)


def _fits_bank_account(number: _Number) -> bool:
    return 9 <= len(number.digits) <= 18 and len(number.shape) <= 5 and len(set(number.digits)) > 1


def _of_length(*lengths: int) -> Callable[[_Number], bool]:
    return lambda number: len(number.digits) in lengths and len(number.shape) <= 5


_FITS: dict[str, Callable[[_Number], bool]] = {
    "aadhaar": _fits_aadhaar,
    "vid": _fits_vid,
    "card": lambda number: card_holds(number.digits),
    "mobile": lambda number: _is_mobile(_national(number.digits)),
    "bank_account": _fits_bank_account,
    "uan": _of_length(12),
    "ckyc": _of_length(14),
    "abha": _of_length(14),
    "esic": _of_length(10, 17),
    "pin_code": lambda number: number.digits[0] != "0" and number.shape in ((6,), (3, 3)),
}
_ONLY_LABELLED = frozenset({"bank_account", "uan", "ckyc", "abha", "esic", "pin_code"})
_MOBILE_SHAPES = frozenset(
    {(10,), (5, 5), (3, 3, 4), (4, 3, 3), (3, 4, 3), (11,), (1, 10), (1, 5, 5), (6, 5), (12,), (2, 10), (2, 5, 5)}
)
_SHAPES = _MOBILE_SHAPES | {(4, 4, 4), (4, 4, 4, 4), (16,), (15,), (4, 6, 5), (14,), (4, 6, 4), (2, 4, 4, 4), (3, 3)}
_SHAPES |= {(3, 8), (4, 7), (5, 6), (3, 4, 4)}  # landlines


def _could_stand_alone(number: _Number) -> bool:
    return number.shape in _SHAPES and number.is_even


def _plain_verdict(number: _Number) -> tuple[str, Confidence] | None:
    """What the number is by check digit and print alone, with no word to help."""
    if not _could_stand_alone(number) or "\n" in number.separators:
        return None
    shape, digits = number.shape, number.digits
    if shape == (4, 4, 4) and _fits_aadhaar(number):
        return "aadhaar", "high"
    if shape in ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (16,), (15,), (14,)) and card_holds(digits):
        return "card", "high" if len(shape) > 1 else "medium"
    if shape in ((4, 4, 4, 4), (16,)) and _fits_vid(number):
        return "vid", "medium"
    if shape == (2, 4, 4, 4) and number.separators[0] == "-":
        return "abha", "medium"
    if _is_written_abroad(number):
        return "phone", "medium"
    if shape in _MOBILE_SHAPES and _is_mobile(_national(digits)):
        return "mobile", "medium"
    if shape == (12,) and _fits_aadhaar(number) and not _is_date_and_time(digits):
        return "aadhaar", "medium"
    return None


def _is_date_and_time(digits: str) -> bool:
    """Whether 12 digits read as YYYYMMDDHHMM."""
    return digits[:2] == "20" and "01" <= digits[4:6] <= "12" and "01" <= digits[6:8] <= "31" and digits[8:10] < "24"


def _touches_letter(text: str, end: int) -> bool:
    after = text[end : end + 1]
    return after.isascii() and after.isalpha()


def _is_glued(text: str, number: _Number) -> bool:
    """Whether a Latin letter touches the digits; letters of an escape (a written-out newline) do not count."""
    before = text[max(0, number.start - 1) : number.start]
    if _touches_letter(text, number.end):
        return True
    if before == "_" or (before.isascii() and before.isalpha()):
        return text[max(0, number.start - 2) : number.start] not in ("\\n", "\\t", "\\r")
    return False


def _is_in_uuid(text: str, number: _Number) -> bool:
    beside = text[max(0, number.start - 1) : number.start] + text[number.end : number.end + 1]
    if "-" not in beside and not any(letter.isalnum() for letter in beside):
        return False
    near = _UUID.finditer(text, max(0, number.start - 36), number.end + 36)
    return any(match.start() < number.end and number.start < match.end() for match in near)


def _is_arithmetic(text: str, number: _Number) -> bool:
    """Whether a lone number is a decimal fraction, a difference of two amounts, or the side of an equation."""
    if number.shape[0] == 1 and number.separators[:1] == (".",):
        return True
    if number.shape == (5, 5) and (number.digits[3:5] == "00" or number.digits[8:] == "00"):
        return True
    return bool(re.match(r"\s*(?:[=×÷^]|[*/+]\s*[$(0-9])", text[number.end : number.end + 6])) or bool(
        re.search(r"(?:[=×÷^]|[0-9)]\s*[*/+])\s*$", text[max(0, number.start - 4) : number.start])
    )


def _is_inside_other(text: str, number: _Number) -> bool:
    """Whether the digits are part of an amount, a sum or a web address."""
    start, end = number.start, number.end
    before = text[max(0, start - 2) : start].strip()
    if before.endswith(("#", "=", "@", "&", *_MONEY)) or _UNITS.match(text, end):
        return True
    if re.fullmatch(r"\d[,.:/]", text[max(0, start - 2) : start]) or re.match(r"[,.:/]\d", text[end : end + 2]):
        return not (text[start - 1] == "," or text[end : end + 1] == ",") or min(number.shape) < 4
    if _is_arithmetic(text, number):
        return True
    piece = re.split(r"[\s\"'<>]", text[max(0, start - 200) : start])[-1]
    return "://" in piece or piece.startswith("www.")
