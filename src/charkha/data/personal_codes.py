"""Identity codes of letters and digits: PAN, GSTIN, TAN, IFSC, EPIC, passport, driving licence, vehicle, IBAN.

Every one but some IFSC holds four digits in a row, so only the surroundings of such digits are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from charkha.data.check_digits import IBAN_LENGTHS, gstin_holds, iban_holds, luhn_holds
from charkha.data.personal_finds import Confidence, Find
from charkha.data.personal_labels import OTHER, WEAK, Labels

_ANCHOR = re.compile("[0-9]{4,}")
_LETTER, _LETTER_REACH = re.compile("[A-Za-z]"), 8  # every code has a letter at most so far before its four digits
_LETTER_IFSC = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{4}0[A-Za-z0-9]{6}(?![A-Za-z0-9])")
_ZERO_BEFORE_LETTER = re.compile("0[A-Za-z0-9]{0,2}[A-Za-z]")
_S = "[ -]?"
_FREE = "(?<![A-Za-z0-9])"
# Letters right before a code that are no part of it: a written-out newline ends in one, and labels may be glued to it.
_GLUED = rf"(?:{_FREE}|(?<=\\[nrt])|(?<=\b[Pp][Aa][Nn])|(?<=\b[Gg][Ss][Tt][Ii][Nn]))"
_FORMS = (
    rf"(?:(?P<gstin>[0-9]{{2}}{_S}[A-Za-z]{{5}}{_S}[0-9]{{4}}{_S}[A-Za-z]{_S}[0-9A-Za-z]{_S}[A-Za-z]{_S}[0-9A-Za-z])"
    rf"|(?P<bh>[0-9]{{2}}{_S}[Bb][Hh]{_S}[0-9]{{4}}{_S}[A-Za-z]{{1,2}})"
    rf"|(?P<driving_licence>[A-Za-z]{{2}}[ /-]?[0-9]{{2}}[ /-]{{0,3}}(?:19|20)[0-9]{{2}}[ /-]{{0,3}}[0-9]{{7}})"
    rf"|(?P<pan>[A-Za-z]{{3}}{_S}[A-Za-z]{{2}}{_S}[0-9]{{4}}{_S}[A-Za-z])"
    rf"|(?P<tan>[A-Za-z]{{4}}{_S}[0-9]{{5}}{_S}[A-Za-z])"
    rf"|(?P<ifsc>[A-Za-z]{{4}}{_S}0[A-Za-z0-9]{{6}})"
    rf"|(?P<epic>[A-Za-z]{{3}}[ /-]?[0-9]{{7}})"
    rf"|(?P<passport>[A-Za-z]{_S}[1-9][0-9]{_S}[0-9]{{5}})"
    rf"|(?P<vehicle>[A-Za-z]{{2}}{_S}[0-9]{{1,2}}[A-Za-z]?{_S}[A-Za-z]{{0,3}}{_S}[0-9]{{4}})"
    rf")(?![A-Za-z0-9])"
)
_CODE, _CODE_GLUED = re.compile(_FREE + _FORMS), re.compile(_GLUED + _FORMS)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]){11,30}")
_BEFORE, _AFTER = 16, 12  # no code but an IBAN reaches further to either side of its digits

_STATES_TEXT = (
    "AN AP AR AS BR CH CG CT DD DL DN GA GJ HP HR JH JK KA KL LA LD MH ML MN MP MZ NL OD OR PB PY RJ SK TN TR TS "
    "TG UK UA UP UT WB"
)
_STATES = frozenset(_STATES_TEXT.split())
_HOLDERS = frozenset("ABCFGHJKLPT")  # fourth letter of a PAN
_BANKS_TEXT = (
    "ABHY ABNA AIRP AUBL AXIS BARB BDBL BKID BOFA CBIN CITI CIUB CNRB CORP COSB CSBK DBSS DCBL DEUT DLXB ESFB "
    "FDRL FINO HDFC HSBC IBKL ICIC IDFB IDIB INDB IOBA IPOS JAKA JSFB KARB KKBK KVBL LAVB MAHB NKGS NSPB ORBC "
    "PSIB PUNB PYTM RATN RBIS SBIN SCBL SIBL SRCB STBP SURY SVCB SYNB TMBL UBIN UCBA UJVN USFB UTBI UTIB VIJB "
    "YESB"
)
_BANKS = frozenset(_BANKS_TEXT.split())
_GST_STATES = frozenset(f"{number:02}" for number in range(1, 39)) | {"97", "99"}


def find_codes(text: str, labels: Labels) -> Iterator[Find]:
    """Every code of the folded text; they may overlap where one holds another, as a GSTIN holds a PAN."""
    seen: set[tuple[int, int]] = set()
    may_be_glued = "\\" in text or "pan" in labels.lower or "gstin" in labels.lower
    pattern = _CODE_GLUED if may_be_glued else _CODE
    for anchor in _ANCHOR.finditer(text):
        if not _may_belong(text, anchor.start()):
            continue
        start, end = max(0, anchor.start() - _BEFORE), anchor.end() + _AFTER
        for match in pattern.finditer(text, start, end):
            span = match.span()
            if span not in seen and _ends_at(text, span[1]):
                seen.add(span)
                yield from _judge(match, labels)
        if anchor.start() >= 2:
            yield from _ibans(text, max(0, anchor.start() - 16), seen)
    for zero in _ZERO_BEFORE_LETTER.finditer(text, 4):
        code = _LETTER_IFSC.match(text, zero.start() - 4)
        if code is not None and code.span() not in seen:
            seen.add(code.span())
            if (confidence := _ifsc(code[0], _says(labels, code, "ifsc"))) is not None:
                yield Find("ifsc", *code.span(), confidence)


def _may_belong(text: str, place: int) -> bool:
    """Whether digits at `place` may be part of a code: a letter is near, and no ordinary word stands right before."""
    if text[place - 1 : place] in (" ", "-") and place > 4:
        word = text[place - 5 : place - 1]
        if word.isalpha() and word.islower():
            return False
    return _LETTER.search(text, max(0, place - _LETTER_REACH), place) is not None


def _ibans(text: str, start: int, seen: set[tuple[int, int]]) -> Iterator[Find]:
    for match in _IBAN.finditer(text, start, start + 70):
        length = IBAN_LENGTHS.get(match[0][:2].upper())
        end = None if length is None else _after_letters(text, match.start(), length)
        if end is None or end > match.end() or (match.start(), end) in seen or not _ends_at(text, end):
            continue
        seen.add((match.start(), end))
        if iban_holds(text[match.start() : end].replace(" ", "").upper()):
            yield Find("iban", match.start(), end, "high")


def _ends_at(text: str, end: int) -> bool:
    """Whether no Latin letter or digit follows; endings of Indic words may be joined to a code."""
    after = text[end : end + 1]
    return not (after.isascii() and after.isalnum())


def _after_letters(text: str, start: int, count: int) -> int | None:
    """Where the `count`-th letter or digit from `start` ends, spaces between not counted."""
    place = start
    while count and place < len(text):
        count -= text[place] != " "
        place += 1
    return None if count else place


def _says(labels: Labels, match: re.Match[str], kind: str) -> bool | None:
    """True where the words around name this kind, False where they name something that is nobody's, None otherwise."""
    for meaning in labels.meanings(*match.span()):
        if meaning.kind == kind:
            return True
        if meaning.kind in (OTHER, WEAK) and meaning.adjacent and not meaning.is_after:
            return False
    return None


def _judge(match: re.Match[str], labels: Labels) -> Iterator[Find]:
    name = str(match.lastgroup)
    kind = "vehicle" if name == "bh" else name
    says = _says(labels, match, kind)
    confidence = None if says is None and _is_part(match) else _VERDICTS[name](match[0], says)
    if confidence is not None:
        yield Find(kind, *match.span(), confidence)


def _is_part(match: re.Match[str]) -> bool:
    """Whether a hyphen joins the code to more letters or digits, as in a UUID or a part number."""
    text, start, end = match.string, match.start(), match.end()
    after = text[end : end + 1] in ("-", "_") and text[end + 1 : end + 2].isalnum()
    return after or (start > 1 and text[start - 1] in "-_" and text[start - 2].isalnum())


def _compact(code: str) -> str:
    return re.sub("[ /-]", "", code).upper()


def _as_written(code: str, labelled: bool | None, capitals: Confidence) -> Confidence | None:
    """`high` with its label; alone, what capitals are worth, `medium` for small letters, nothing for a mixture."""
    if labelled is not None:
        return "high" if labelled else None
    if code == code.upper():
        return capitals
    return "medium" if code == code.lower() else None


def _gstin(code: str, labelled: bool | None) -> Confidence | None:
    compact = _compact(code)
    return "high" if compact[:2] in _GST_STATES and gstin_holds(compact) else None


def _pan(code: str, labelled: bool | None) -> Confidence | None:
    compact = _compact(code)
    if compact[3] not in _HOLDERS or compact[5:9] == "0000" or compact.count("X") > 3 or len(set(compact[:5])) == 1:
        return None
    return _as_written(code, labelled, "high") if labelled or len(code) == 10 else None


def _tan(code: str, labelled: bool | None) -> Confidence | None:
    return "high" if labelled else None


def _ifsc(code: str, labelled: bool | None) -> Confidence | None:
    if labelled is not None:
        return "high" if labelled else None
    return _as_written(code, None, "high") if len(code) == 11 and code[:4].upper() in _BANKS else None


def _epic(code: str, labelled: bool | None) -> Confidence | None:
    if not luhn_holds(_compact(code)[3:]) or labelled is False:
        return None
    if labelled:
        return "high"
    return "medium" if len(code) == 10 and code == code.upper() else None


def _passport(code: str, labelled: bool | None) -> Confidence | None:
    return "high" if labelled and code[0].upper() not in "QXZ" else None


def _driving_licence(code: str, labelled: bool | None) -> Confidence | None:
    compact = _compact(code)
    if compact[:2] not in _STATES or compact[2:4] == "00" or not "1950" <= compact[4:8] <= "2049":
        return None
    return _as_written(code, labelled, "high")


def _vehicle(code: str, labelled: bool | None) -> Confidence | None:
    compact = _compact(code)
    if compact[:2] not in _STATES or compact.endswith("0000"):
        return None
    if labelled is not None:
        return "high" if labelled else None
    series = compact[2:-4].lstrip("0123456789")
    if not series or set(series) & {"I", "O"}:
        return None
    return "medium" if code == code.upper() or code == compact.lower() else None


def _bh(code: str, labelled: bool | None) -> Confidence | None:
    if labelled is not None:
        return "high" if labelled else None
    return "medium" if code == code.upper() else None


_VERDICTS: dict[str, Callable[[str, bool | None], Confidence | None]] = {
    "gstin": _gstin,
    "pan": _pan,
    "tan": _tan,
    "ifsc": _ifsc,
    "epic": _epic,
    "passport": _passport,
    "driving_licence": _driving_licence,
    "vehicle": _vehicle,
    "bh": _bh,
}
