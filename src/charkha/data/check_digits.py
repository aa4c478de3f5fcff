"""Check digits of identity and payment numbers; every function takes the number without spaces and never raises.

Sources: Verhoeff (1969) for Aadhaar and VID as UIDAI states it; ISO/IEC 7812-1 Annex B (Luhn) for cards and EPIC; the
GSTN's published rule for the fifteenth character; ISO 13616 / ISO 7064 mod 97-10 for IBAN.
"""

from __future__ import annotations

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BASE36 = {letter: value for value, letter in enumerate(_ALPHABET)}


def _dihedral_product(a: int, b: int) -> int:
    """A * b in the dihedral group D5, whose elements are 0-4 (turns) and 5-9 (mirrored turns)."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
    return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5


_PRODUCT = tuple(tuple(_dihedral_product(a, b) for b in range(10)) for a in range(10))
_TURN = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)  # Verhoeff's permutation; position n applies it n times


def _permutations() -> tuple[tuple[int, ...], ...]:
    rows = [tuple(range(10))]
    for _ in range(7):
        rows.append(tuple(_TURN[value] for value in rows[-1]))
    return tuple(rows)


_PERMUTED = _permutations()


def verhoeff_holds(digits: str) -> bool:
    """Whether the last digit is the Verhoeff check digit of the others."""
    check = 0
    for place, digit in enumerate(reversed(digits)):
        check = _PRODUCT[check][_PERMUTED[place % 8][ord(digit) - 48]]
    return check == 0


def luhn_holds(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of the others."""
    values = [ord(digit) - 48 for digit in reversed(digits)]
    doubled = sum(2 * value - 9 if value > 4 else 2 * value for value in values[1::2])
    return (sum(values[::2]) + doubled) % 10 == 0


def gstin_holds(gstin: str) -> bool:
    """Whether the last of 15 capital letters and digits is the check character of the others."""
    total = 0
    for place, letter in enumerate(gstin[:14]):
        product = _BASE36[letter] * (1 + place % 2)
        total += product // 36 + product % 36
    return _ALPHABET[-total % 36] == gstin[14]


# ISO 13616 registry: country -> characters of its IBAN.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def iban_holds(iban: str) -> bool:
    """Whether capital letters and digits are an IBAN: length of the country and mod 97."""
    if len(iban) != IBAN_LENGTHS.get(iban[:2]):
        return False
    return int("".join(str(_BASE36[letter]) for letter in iban[4:] + iban[:4])) % 97 == 1


def card_holds(digits: str) -> bool:
    """Whether digits are a payment card's number: issuer range with its length, and Luhn.

    Ranges: Visa, Mastercard, RuPay (60, 65, 81, 82, 508), American Express, Diners, Discover, JCB, Maestro.
    """
    return _is_issued(digits) and luhn_holds(digits) and len(set(digits)) > 1


def _is_issued(digits: str) -> bool:
    length, two, four = len(digits), digits[:2], int(digits[:4])
    if digits[0] == "4":
        return length in (13, 16, 19)
    if length == 16:
        mastercard = "51" <= two <= "55" or 2221 <= four <= 2720
        return mastercard or two in ("60", "65", "81", "82") or digits[:3] == "508" or _discover_or_jcb(four)
    if length == 15:
        return two in ("34", "37")
    if length == 14:
        return two in ("36", "38", "39") or 3000 <= four <= 3059
    return length in (12, 18, 19) and four in (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763)


def _discover_or_jcb(four: int) -> bool:
    return (
        6440 <= four <= 6499 or 3528 <= four <= 3589 or four in (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763)
    )
