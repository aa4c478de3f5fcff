"""Values of every kind made from the published rules, and numbers that only look like them.

Nothing here is taken from the detectors: check digits, forms and lists are written anew.
"""

from __future__ import annotations

import random
import string

# Check digits. Verhoeff by the two tables of the paper, the others by their one-line definitions.

_D = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_P = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip


def verhoeff_digit(body: str) -> str:
    check = 0
    for index, digit in enumerate(reversed(body), start=1):
        check = int(_D[check][int(_P[index % 8][int(digit)])])
    return str(next(value for value in range(10) if _D[check][value] == "0"))


def luhn_digit(body: str) -> str:
    total = 0
    for index, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if index % 2 == 0 else 1)
        total += value // 10 + value % 10
    return str((10 - total % 10) % 10)


def gstin_letter(body: str) -> str:
    letters = string.digits + string.ascii_uppercase
    total = sum(sum(divmod(letters.index(letter) * (2 if index % 2 else 1), 36)) for index, letter in enumerate(body))
    return letters[(36 - total % 36) % 36]


def iban(country: str, bban: str) -> str:
    text = "".join(str(int(letter, 36)) for letter in bban + country + "00")
    return f"{country}{98 - int(text) % 97:02}{bban}"


def digits(rng: random.Random, count: int, first: str = string.digits) -> str:
    return rng.choice(first) + "".join(rng.choices(string.digits, k=count - 1))


def letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=count))


def grouped(text: str, sizes: tuple[int, ...], separator: str) -> str:
    parts, place = [], 0
    for size in sizes:
        parts.append(text[place : place + size])
        place += size
    return separator.join(parts)


def aadhaar(rng: random.Random) -> str:
    while True:
        body = digits(rng, 11, "23456789")
        whole = body + verhoeff_digit(body)
        if whole != whole[::-1]:
            break
    return rng.choice(
        [whole, grouped(whole, (4, 4, 4), " "), grouped(whole, (4, 4, 4), " "), grouped(whole, (4, 4, 4), "-"),
         grouped(whole, (4, 4, 4), ".")]
    )  # fmt: skip


def vid(rng: random.Random) -> str:
    while True:
        body = digits(rng, 15, "23456789")
        whole = body + verhoeff_digit(body)
        if luhn_digit(whole[:-1]) != whole[-1]:  # one that is a card number as well cannot be told from a card
            break
    return rng.choice([whole, grouped(whole, (4, 4, 4, 4), " ")])


def pan(rng: random.Random) -> str:
    number = f"{rng.randint(1, 9999):04}"
    return letters(rng, 3) + rng.choice("ABCFGHJLPT") + letters(rng, 1) + number + letters(rng, 1)


def gstin(rng: random.Random) -> str:
    body = f"{rng.randint(1, 38):02}{pan(rng)}{rng.choice('123456789AB')}Z"
    return body + gstin_letter(body)


def tan(rng: random.Random) -> str:
    return rng.choice(["MUM", "DEL", "BLR", "CHE", "PNE", "HYD"]) + letters(rng, 1) + digits(rng, 5) + letters(rng, 1)


def ifsc(rng: random.Random) -> str:
    bank = rng.choice(["SBIN", "HDFC", "ICIC", "PUNB", "UTIB", "KKBK", "CNRB", "IOBA", "YESB", "FDRL"])
    return f"{bank}0{rng.randint(1, 999999):06}" if rng.random() < 0.8 else f"BARB0{letters(rng, 6)}"


def upi(rng: random.Random) -> str:
    handle = rng.choice(["okaxis", "okhdfcbank", "oksbi", "ybl", "paytm", "upi", "ibl", "axl", "apl", "okicici"])
    name = rng.choice(["ravi.kumar", "priya-s", "sunita88", "arun_k", "9812345670", "meena.traders"])
    return f"{name}{rng.randint(1, 99)}@{handle}"


def bank_account(rng: random.Random) -> str:
    return digits(rng, rng.choice([9, 11, 12, 13, 14, 15, 16]), "123456789")


def mobile(rng: random.Random) -> str:
    ten = digits(rng, 10, "6789")
    forms = [
        ten, ten, f"{ten[:5]} {ten[5:]}", f"{ten[:5]}-{ten[5:]}", f"+91{ten}", f"+91 {ten}", f"+91-{ten}",
        f"+91 {ten[:5]} {ten[5:]}", f"0{ten}", f"91{ten}", f"0{ten[:5]} {ten[5:]}", f"{ten[:3]} {ten[3:6]} {ten[6:]}",
    ]  # fmt: skip
    return rng.choice(forms)


def other_phone(rng: random.Random) -> str:
    """A landline with its area code, or a number of another country."""
    return rng.choice(
        [f"0{rng.choice(['22', '11', '33', '44'])}-{digits(rng, 8, '2345')}",
         f"044 {digits(rng, 4, '234')} {digits(rng, 4)}",
         f"+1 {digits(rng, 3, '23456')}-{digits(rng, 3, '23456')}-{digits(rng, 4)}",
         f"+44 20 {digits(rng, 4, '78')} {digits(rng, 4)}",
         f"+971 50 {digits(rng, 7)}", f"+65{digits(rng, 8, '89')}"]
    )  # fmt: skip


def epic(rng: random.Random) -> str:
    body = digits(rng, 6)
    return letters(rng, 3) + body + luhn_digit(body)


def passport(rng: random.Random) -> str:
    return rng.choice("ABCDEFGHJKLMNPRSTUVWY") + digits(rng, 1, "123456789") + digits(rng, 6)


STATES = ("MH", "DL", "KA", "TN", "WB", "UP", "GJ", "RJ", "KL", "TS")


def driving_licence(rng: random.Random) -> str:
    parts = (rng.choice(STATES), f"{rng.randint(1, 60):02}", str(rng.randint(1985, 2025)), digits(rng, 7))
    return rng.choice(["{}{}{}{}", "{}-{}{}{}", "{}{} {}{}", "{}-{}-{}-{}", "{} {} {} {}"]).format(*parts)


def vehicle(rng: random.Random) -> str:
    if rng.random() < 0.15:
        series = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2))
        return f"{rng.randint(21, 26)}{rng.choice(['BH', ' BH '])}{rng.randint(1000, 9999)}{series}"
    series = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 2)))
    parts = (rng.choice(STATES), f"{rng.randint(1, 60):02}", series, f"{rng.randint(1, 9999):04}")
    return rng.choice(["{}{}{}{}", "{} {} {} {}", "{}-{}-{}-{}"]).format(*parts)


def abha(rng: random.Random) -> str:
    whole = digits(rng, 14, "123456789")
    return rng.choice([grouped(whole, (2, 4, 4, 4), "-"), whole, f"{letters(rng, 6).lower()}{rng.randint(1, 99)}@abdm"])


CARD_STARTS = (("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("6521", 16), ("60", 16), ("8172", 16), ("5085", 16),
               ("37", 15), ("36", 14), ("3530", 16))  # fmt: skip


def card(rng: random.Random) -> str:
    start, length = rng.choice(CARD_STARTS)
    while True:
        body = start + "".join(rng.choices(string.digits, k=length - 1 - len(start)))
        whole = body + luhn_digit(body)
        if length != 16 or start[0] < "2" or verhoeff_digit(whole[:-1]) != whole[-1]:
            break
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}[length]
    return rng.choice([whole, grouped(whole, sizes, " "), grouped(whole, sizes, "-")])


def any_iban(rng: random.Random) -> str:
    whole = rng.choice(
        [iban("DE", digits(rng, 18)), iban("GB", letters(rng, 4) + digits(rng, 14)), iban("AE", digits(rng, 19)),
         iban("FR", digits(rng, 23)), iban("NL", letters(rng, 4) + digits(rng, 10))]
    )  # fmt: skip
    return rng.choice([whole, " ".join(whole[place : place + 4] for place in range(0, len(whole), 4))])


def email(rng: random.Random) -> str:
    name = rng.choice(["ravi.kumar", "priya_s", "s.banerjee", "kavitha-r", "info", "arun+bills"]) + digits(rng, 2)
    return f"{name}@{rng.choice(['gmail.com', 'yahoo.co.in', 'rediffmail.com', 'outlook.com', 'tcs-mail.co.in'])}"


def public_ip(rng: random.Random) -> str:
    first = rng.choice([49, 103, 117, 122, 157, 182])
    return f"{first}.{rng.randint(30, 255)}.{rng.randint(1, 255)}.{rng.randint(1, 254)}"


MONTHS = ("January", "February", "March", "April", "June", "August", "Oct", "Dec")


def birth_date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1940, 2012)
    return rng.choice(
        [f"{day:02}/{month:02}/{year}", f"{day:02}-{month:02}-{year}", f"{year}-{month:02}-{day:02}",
         f"{day:02}.{month:02}.{year}", f"{day} {rng.choice(MONTHS)} {year}", f"{rng.choice(MONTHS)} {day}, {year}"]
    )  # fmt: skip


def secret(rng: random.Random) -> str:
    pool = string.ascii_letters + string.digits
    many = "".join(rng.choices(pool, k=48))
    return rng.choice(
        ["AKIA" + letters(rng, 8) + digits(rng, 8), "ghp_" + many[:36], "sk-" + many, "hf_" + many[:34],
         "AIza" + many[:35], "rzp_live_" + many[:14], "xoxb-" + digits(rng, 12) + "-" + many[:24]]
    )  # fmt: skip


def amount(rng: random.Random) -> str:
    rupees = rng.randint(1000, 10**10)
    indian = f"{rupees // 1000:,}".replace(",", ",") + f",{rupees % 1000:03}"
    return rng.choice(
        [f"₹{indian}", f"Rs. {rupees}", f"Rs {rupees}.00", f"INR {rupees}", f"{rupees} rupees", f"$ {rupees}"]
    )


def timestamp(rng: random.Random) -> str:
    year, month, day = rng.randint(2015, 2026), rng.randint(1, 12), rng.randint(1, 28)
    hour, minute, second = rng.randint(0, 23), rng.randint(0, 59), rng.randint(0, 59)
    return rng.choice(
        [str(rng.randint(10**9, 2 * 10**9)), str(rng.randint(10**12, 2 * 10**12)),
         str(rng.randint(10**15, 2 * 10**15)),
         f"{year}{month:02}{day:02}{hour:02}{minute:02}{second:02}", f"{year}{month:02}{day:02}{hour:02}{minute:02}",
         f"{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z",
         f"{day:02}/{month:02}/{year} {hour:02}:{minute:02}",
         f"{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{rng.randint(0, 999999):06}"]
    )  # fmt: skip


def tracking(rng: random.Random) -> str:
    return rng.choice(
        [digits(rng, 12), grouped(digits(rng, 12), (4, 4, 4), " "), "1Z" + letters(rng, 3) + digits(rng, 11),
         digits(rng, 11),
         f"E{letters(rng, 1)}{digits(rng, 9)}IN", digits(rng, 14), "FMPP" + digits(rng, 10), "SF" + digits(rng, 10)]
    )  # fmt: skip


def masked(rng: random.Random) -> str:
    last = digits(rng, 4)
    return rng.choice(
        [f"XXXX XXXX {last}", f"XXXXXXXX{last}", f"****{last}", f"XXXX-XXXX-XXXX-{last}", f"**** **** **** {last}",
         f"xxxxx{last}x", f"XXXPX{last}X", f"98XXXXXX{last[:2]}", f"r***@gmail.com", f"•••• {last}"]  # noqa: F541
    )  # fmt: skip


def broken_check(rng: random.Random) -> str:
    def off(digit: str) -> str:
        return str((int(digit) + rng.randint(1, 9)) % 10)

    body = digits(rng, 11, "23456789")
    while True:
        long = "4" + digits(rng, 14)
        long += off(luhn_digit(long))
        if verhoeff_digit(long[:-1]) != long[-1]:  # one that is a good VID is no hard negative
            break
    head = f"{rng.randint(1, 38):02}{letters(rng, 5)}{digits(rng, 4)}{letters(rng, 1)}1Z"
    wrong = rng.choice([letter for letter in string.digits + string.ascii_uppercase if letter != gstin_letter(head)])
    epic_body = digits(rng, 6)
    return rng.choice(
        [grouped(body + off(verhoeff_digit(body)), (4, 4, 4), " "), grouped(long, (4, 4, 4, 4), " "),
         head + wrong, letters(rng, 3) + epic_body + off(luhn_digit(epic_body))]
    )  # fmt: skip


def version(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(0, 40) for _ in range(4))
    return rng.choice(
        [f"v{a}.{b}.{c}", f"{a}.{b}.{c}.{d}", f"{a}.{b}.{c}-rc{d}", f"2023.{a}.{b}.{c}", f"{a}.{b}.{c}+build.{d}"]
    )
