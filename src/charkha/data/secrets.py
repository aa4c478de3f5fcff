"""Passwords, keys and tokens: by the prefix their issuer gives them, or by the word that stands before them.

Cheap tests for a literal come first: most text holds none of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from charkha.data.personal_finds import Find

_PRIVATE_KEY = (
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END)[\s\S]){1,20000}(?:-----END[A-Z ]*-----)?"
)
_Issued = tuple[tuple[str, re.Pattern[str]], ...]


def _issued(*pairs: tuple[str, str]) -> _Issued:
    return tuple((literal, re.compile(pattern)) for literal, pattern in pairs)


# literal that must be there -> what a whole secret looks like; in three lists, so that text without an underscore or
# hyphen is asked for a third of them only
_WITH_UNDERSCORE = _issued(
    ("ghp_", r"\bghp_[A-Za-z0-9]{36,}\b"),
    ("gho_", r"\bgho_[A-Za-z0-9]{36,}\b"),
    ("ghs_", r"\bghs_[A-Za-z0-9]{36,}\b"),
    ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{50,}\b"),
    ("k_live_", r"\b[sr]k_live_[A-Za-z0-9]{16,}\b"),
    ("sk_test_", r"\bsk_test_[A-Za-z0-9]{16,}\b"),
    ("rzp_", r"\brzp_(?:live|test)_[A-Za-z0-9]{14,}\b"),
    ("hf_", r"\bhf_[A-Za-z0-9]{30,}\b"),
    ("npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    ("dckr_pat_", r"\bdckr_pat_[A-Za-z0-9_-]{20,}"),
)
_WITH_HYPHEN = _issued(
    ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("xox", r"\bxox[abposr]-[A-Za-z0-9-]{10,}"),
    ("sk-", r"\bsk-(?:(?:ant|proj|svcacct|or)-)?[A-Za-z0-9_-]{20,}"),
    ("pypi-", r"\bpypi-[A-Za-z0-9_-]{50,}"),
    ("-----BEGIN", _PRIVATE_KEY),
)
_OTHERS = _issued(
    ("AKIA", r"\bAKIA[A-Z0-9]{16}\b"),
    ("ASIA", r"\bASIA[A-Z0-9]{16}\b"),
    ("hooks.slack.com", r"hooks\.slack\.com/services/[A-Za-z0-9/]{20,}"),
    ("AIza", r"\bAIza[A-Za-z0-9_-]{35}"),
    ("SG.", r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    ("eyJ", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    ("AccountKey=", r"AccountKey=[A-Za-z0-9+/]{40,}={0,2}"),
    (":AA", r"\b[0-9]{8,10}:AA[A-Za-z0-9_-]{33}\b"),
)
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/:@\"'<>]{1,80}:[^\s/:@\"'<>]{3,200}(?=@[A-Za-z0-9])")

_NAMES = ("pass", "pwd", "secret", "api", "access", "token", "bearer ", "पासवर्ड", "கடவுச்சொல்", "পাসওয়ার্ড", "পাসওয়ার্ড")
_LATIN_NAMES = _NAMES[:7]
_REACH_BEFORE, _REACH_AFTER = 24, 180
_NAMED = re.compile(
    r"(?:\bpass(?:word|wd|code|phrase)?|password|pwd|secret(?:[_ -]?(?:access[_ -]?)?key)?|api[_ -]?key|"
    r"access[_ -]?key|(?:auth|access|refresh|api|bearer)[_ -]?token|पासवर्ड|கடவுச்சொல்|পাসওয়ার্ড|পাসওয়ার্ড)"
    r"(?:[\"'`*\\]{0,3}\s{0,2}(?:[:=]|=>|is|hai|है|:-)\s{0,2}[\"'`*\\]{0,3})(?P<value>[^\s\"'`,;<>|]{6,128})",
    re.IGNORECASE,
)
# Without a tie only what mixes letters, digits and signs, as passwords do.
_UNTIED = re.compile(
    r"(?:password|passcode|पासवर्ड|கடவுச்சொல்|পাসওয়ার্ড|পাসওয়ার্ড)\s{1,2}[\"'`*]{0,3}"
    r"(?P<value>(?=[^\s]*[0-9])(?=[^\s]*[A-Za-z])(?=[^\s]*[@#$%^&*!])[^\s\"'`,;<>|:=]{6,64})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\bbearer\s+(?P<value>[A-Za-z0-9._~+/-]{20,}=*)", re.IGNORECASE)
# A password made up on the spot, or shown as one that might be, opens nothing yet.
_INVENTED = re.compile(r"generat|random|example|for instance|such as|e\.g\.|sample|dummy", re.IGNORECASE)
_INVENTED_REACH = 80
_STAND_INS = re.compile(
    r"^(?:[x*•.]+$|\$|\{|%|<|\[|\(|your|my[_-]|example|changeme|placeholder|none$|null$|true$|false$|os\.|env|process\.|"
    r"self\.|config|request|input|getpass|str$|string|undefined|hash|encrypt|https?:|(?:password|passwd|pass|pwd|secret|user(?:name)?)$)",
    re.IGNORECASE,
)


def find_secrets(text: str, lower: str) -> Iterator[Find]:
    """Every secret of the text; `lower` is the same in lower case."""
    for issued in (
        _WITH_UNDERSCORE if "_" in text else (),
        _WITH_HYPHEN if "-" in text else (),
        _OTHERS,
    ):
        for literal, pattern in issued:
            if literal in text:
                yield from (Find("secret", *match.span(), "high") for match in pattern.finditer(text))
    if "://" in text:
        for match in _IN_ADDRESS.finditer(text):
            if not _STAND_INS.match(match[0].partition(":")[2]):
                yield Find("secret", *match.span(), "high")
    for name in _LATIN_NAMES if lower.isascii() else _NAMES:
        if name in lower:
            yield from _named(text, lower, name)


def _named(text: str, lower: str, name: str) -> Iterator[Find]:
    """Values behind each place where the name stands: only there a pattern is tried."""
    place = lower.find(name)
    while place >= 0:
        for pattern in (_NAMED, _UNTIED, _BEARER):
            match = pattern.search(text, max(0, place - _REACH_BEFORE), place + _REACH_AFTER)
            if match is None or not match.start() <= place < match.start("value"):
                continue
            value = match["value"].rstrip(".)]}*!?।")
            if _looks_secret(value):
                invented = _INVENTED.search(text, max(0, match.start() - _INVENTED_REACH), match.start("value"))
                start = match.start("value")
                yield Find("secret", start, start + len(value), "medium" if invented else "high")
        place = lower.find(name, place + len(name))


def _looks_secret(value: str) -> bool:
    """Whether a value is no ordinary word: letters with digits or signs, and not a name of something in code."""
    if len(value) < 6 or _STAND_INS.match(value) or "(" in value or "[" in value or "{" in value:
        return False
    has_digit = any(letter.isdigit() for letter in value)
    has_letter = any(letter.isalpha() for letter in value)
    has_sign = any(letter in "@!#$%^&*+/=~?" for letter in value)
    if re.fullmatch(r"[A-Za-z_]+(?:\.[A-Za-z_]+)*", value) or not has_letter or not (has_digit or has_sign):
        return False
    return _bits_a_letter(value) >= 2.0


def _bits_a_letter(value: str) -> float:
    """Shannon entropy in bits per character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
