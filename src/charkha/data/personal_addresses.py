"""E-mail, UPI and ABHA addresses, public IP addresses, and dates of birth."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from charkha.data.personal_finds import Confidence, Find
from charkha.data.personal_labels import OTHER, Labels

_AT = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?)"
    r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?)*"
)
_ENCODED_AT = re.compile(
    r"(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]{1,64}%40[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,}"
)
_AT_REACH_BEFORE, _AT_REACH_AFTER = 70, 260
_SPELT_AT = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{2,64} ?[\[({] ?at ?[\])}] ?[A-Za-z0-9-]{2,63}"
    r"(?:(?:\.| ?[\[({] ?dot ?[\])}] ?)[A-Za-z0-9-]{2,63})+",
    re.IGNORECASE,
)
_NOBODYS = re.compile(
    r"(?:^|\.)(?:example(?:[a-z-]*\.(?:com|org|net|in))?|invalid|test|localhost|local|(?:your-?)?(?:domain|company|website|"
    r"organi[sz]ation|email)\.com)$",
    re.IGNORECASE,
)
_FILE_ENDINGS = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "py", "html"})
# Handles of UPI apps and banks in use; other handles count where the words around name UPI.
_HANDLES_TEXT = (
    "abfspay airtel airtelpaymentsbank allbank andb apb apl aubank axis axisb axisbank axisgo axl barodampay "
    "barodapay birla boi bpunity cbin cboi centralbank citi citigold cmsidfc cnrb csbpay dbs dcb denabank dlb "
    "equitas eazypay ezeepay fam fbl federal finobank freecharge goaxb hdfcbank hdfcbankjd hsbc ibl icici "
    "icicibank icicipay idbi idbibank idfb idfcbank idfcfirst idfcnetc ikwik imobile indbank indianbank indus "
    "indusind iob jio jkb jsb jupiteraxis karb karurvysyabank kaypay kbl kmb kmbl kotak kvb lime lvb mahb "
    "mairtel myicici naviaxis nsdl obc okaxis okbizaxis okhdfcbank okicici oksbi omni paytm payzapp pingpay pnb "
    "pockets postbank ptaxis pthdfc ptsbi ptyes psb pytm rajgovhdfc rbl rmhdfcbank s2b sbi sc scb "
    "shriramhdfcbank sib slice srcb superyes syndbank tapicici timecosmos tjsb uboi uco unionbank "
    "unionbankofindia united upi utbi utkarshbank vijb waaxis wahdfcbank waicici wasbi yapl ybl yesbank yespay "
    "yesbankltd yesg yespop zoicici"
)
_HANDLES = frozenset(_HANDLES_TEXT.split())
_ABHA_HANDLES = frozenset({"abdm", "sbx", "ndhm"})

_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}")
_IPV6 = re.compile(r"(?<![A-Za-z0-9:.])[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9:])")
_VERSION_BEFORE = re.compile(r"(?:\b[vV]|version|release|build|==|>=|[\w.-]@)\s*$")

_BIRTH = re.compile(
    r"d\.?\s?o\.?\s?b\b\.?|date[ _]?of[ _]?birth|birth[ _-]?(?:date|day)|\bborn\b|जन्म|பிறந்த|জন্ম|పుట్టిన|ಜನ್ಮ|"
    r"ಹುಟ್ಟಿದ|ജനന|જન્મ|ਜਨਮ|ଜନ୍ମ"
)
_BIRTH_HINTS = (
    "birth",
    "born",
    "dob",
    "d.o",
    "जन्म",
    "பிறந்த",
    "জন্ম",
    "పుట్టిన",
    "ಜನ್ಮ",
    "ಹುಟ್ಟಿದ",
    "ജനന",
    "જન્મ",
    "ਜਨਮ",
    "ଜନ୍ମ",
)
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?|जनवरी|फ़रवरी|फरवरी|मार्च|अप्रैल|मई|जून|जुलाई|अगस्त|सितंबर|सितम्बर|अक्टूबर|अक्तूबर|नवंबर|नवम्बर|"
    "दिसंबर|दिसम्बर|ஜனவரி|பிப்ரவரி|மார்ச்|ஏப்ரல்|மே|ஜூன்|ஜூலை|ஆகஸ்ட்|செப்டம்பர்|அக்டோபர்|நவம்பர்|டிசம்பர்|"
    "জানুয়ারি|জানুয়ারি|ফেব্রুয়ারি|ফেব্রুয়ারি|মার্চ|এপ্রিল|মে|জুন|জুলাই|আগস্ট|সেপ্টেম্বর|অক্টোবর|নভেম্বর|ডিসেম্বর"
)
_DATE = re.compile(
    r"(?<![0-9])(?:(?:0?[1-9]|[12][0-9]|3[01])(?P<s>[ ]?[./-][ ]?|[ ])(?:0?[1-9]|1[0-2])(?P=s)"
    r"(?:(?:18|19|20)[0-9]{2}|[0-9]{2})"
    r"|(?:18|19|20)[0-9]{2}(?P<t>[./-])(?:0?[1-9]|1[0-2])(?P=t)(?:0?[1-9]|[12][0-9]|3[01])"
    rf"|(?:0?[1-9]|[12][0-9]|3[01])(?:st|nd|rd|th)?[ ,.-]{{0,2}}(?:of )?(?:{_MONTHS})"
    rf"(?:[ ,.-]{{1,3}}(?:18|19|20)[0-9]{{2}}|[ ]?'[0-9]{{2}})"
    r"|(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
    rf"|\b(?:{_MONTHS})[ .]{{1,2}}(?:0?[1-9]|[12][0-9]|3[01])(?:st|nd|rd|th)?,? (?:18|19|20)[0-9]{{2}})(?![0-9])",
)
_LONG_AGO = re.compile(r"1[89]0[0-9]|18[0-9]{2}|191[0-9]")  # hardly anybody's who lives
# Between a word for birth and a date: the date is another event's.
_OTHER_EVENT = re.compile(r"[.?!।]\s|\n\n|\bdied?\b|\bdeath\b|[0-9]{4}|married|joined")
_DATE_REACH, _DATE_REACH_BACK = 60, 36


def find_addresses(text: str, labels: Labels) -> Iterator[Find]:
    """E-mail, UPI and ABHA addresses of the folded text."""
    place = text.find("@")
    while place >= 0:
        match = _at(text, place)
        if match is not None and (found := _address(match, labels)) is not None:
            yield found
        place = text.find("@", place + 1)
    if "%40" in text:
        for match in _ENCODED_AT.finditer(text):
            yield Find("email", *match.span(), "high")
    if "at]" in text or "at)" in text or "at }" in text or "at )" in text or "AT]" in text:
        for match in _SPELT_AT.finditer(text):
            yield Find("email", *match.span(), "medium")


def _at(text: str, place: int) -> re.Match[str] | None:
    """The whole address around the @ at `place`."""
    for match in _AT.finditer(text, max(0, place - _AT_REACH_BEFORE), place + _AT_REACH_AFTER):
        if match.start() < place < match.end():
            return match
        if match.start() > place:
            break
    return None


def _address(match: re.Match[str], labels: Labels) -> Find | None:
    name, _, domain = match[0].partition("@")
    start, end = match.start() + len(name) - len(name.lstrip("._%+-")), match.end()
    if start == match.start() + len(name) or name.lower() == "git":
        return None
    if "." in domain:
        return _email(domain, start, end)
    handle = domain.lower()
    if handle in _ABHA_HANDLES:
        return Find("abha", start, end, "high")
    if len(name) < 2 or not handle.isalpha():
        return None
    if handle in _HANDLES:
        return Find("upi", start, end, "high")
    near = labels.nearest(start, end)
    return Find("upi", start, end, "medium") if near and near.kind == "upi" else None


def _email(domain: str, start: int, end: int) -> Find | None:
    """Reserved domains (RFC 2606) and those of stand-in text belong to nobody, so they are told but do not block."""
    last = domain.rpartition(".")[2]
    if not last.isalpha() or len(last) < 2 or last.lower() in _FILE_ENDINGS:
        return None
    return Find("email", start, end, "medium" if _NOBODYS.search(domain) else "high")


def find_ip_addresses(text: str, labels: Labels) -> Iterator[Find]:
    """Public IP addresses; private and loopback ones name no one."""
    if text.count(".") >= 3:
        for match in _IPV4.finditer(text):
            if _stands_free(text, match) and (confidence := _ipv4(text, match, labels)) is not None:
                yield Find("ip_address", *match.span(), confidence)
    if "::" in text or text.count(":") >= 7:
        for match in _IPV6.finditer(text):
            if _is_public_ipv6(match[0]):
                yield Find("ip_address", *match.span(), "medium")


def _stands_free(text: str, match: re.Match[str]) -> bool:
    before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 2]
    joined = before.isalnum() or before in (".", "-", "_") or after[:1].isalnum() or after[:1] in ("-", "_")
    return not joined and not (after[:1] == "." and after[1:].isalnum())


def _ipv4(text: str, match: re.Match[str], labels: Labels) -> Confidence | None:
    octets = match[0].split(".")
    if any(len(octet) > 1 and octet[0] == "0" for octet in octets) or any(int(octet) > 255 for octet in octets):
        return None
    address = ipaddress.IPv4Address(match[0])
    documentation = octets[:3] in (["192", "0", "2"], ["198", "51", "100"], ["203", "0", "113"])
    if octets[0] == "0" or (not address.is_global and not documentation):
        return None
    if _VERSION_BEFORE.search(text, max(0, match.start() - 24), match.start()):
        return None
    near = labels.nearest(*match.span())
    if near and near.kind == "ip_address":
        return "high"
    is_numbering = all(int(octet) < 30 for octet in octets) or octets[-1] == "0"
    if is_numbering or (near and near.kind == OTHER and near.adjacent):
        return None
    return "medium"


def _is_public_ipv6(text: str) -> bool:
    groups = [group for group in text.split(":") if group]
    if len(groups) < 3 or not any(len(group) > 2 and not group.isalpha() for group in groups):
        return False
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return address.is_global or text.lower().startswith("2001:db8")


def find_births(text: str, lower: str) -> Iterator[Find]:
    """Full dates beside a word for birth; `lower` is the folded text in lower case."""
    if not _holds_any(lower, _BIRTH_HINTS if not lower.isascii() else _BIRTH_HINTS[:4]):
        return
    taken = 0
    for word in _BIRTH.finditer(lower):
        if (found := _date_beside(lower, word, taken)) is not None:
            sure = word[0] != "born" and not _LONG_AGO.search(found[0])
            confidence: Confidence = "high" if sure else "medium"
            yield Find("date_of_birth", *found.span(), confidence)
            taken = found.end()


def _holds_any(text: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words is in the text; a plain search for each is quicker than one pattern of all."""
    for word in words:  # noqa: SIM110 (any() would make a generator for every text)
        if word in text:
            return True
    return False


def _date_beside(lower: str, word: re.Match[str], taken: int) -> re.Match[str] | None:
    after = _DATE.search(lower, word.end(), word.end() + _DATE_REACH)
    if after is not None and not _OTHER_EVENT.search(lower[word.end() : after.start()].lstrip(" -–—:.\"'")):
        return after
    before = list(_DATE.finditer(lower, max(taken, word.start() - _DATE_REACH_BACK), word.start()))
    if before and not re.search(r"[.?!।;]\s|\n", lower[before[-1].end() : word.start()]):
        return before[-1]
    return None
