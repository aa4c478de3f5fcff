"""A labelled set of personal data and of numbers that only look like it, in English, Hindi, Tamil and Bengali text.

No wording or list is taken from the detectors. Every text holds one value whose kind and place are known, or none.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from personal_values import (
    aadhaar,
    abha,
    amount,
    any_iban,
    bank_account,
    birth_date,
    broken_check,
    card,
    digits,
    driving_licence,
    email,
    epic,
    grouped,
    gstin,
    ifsc,
    letters,
    masked,
    mobile,
    other_phone,
    pan,
    passport,
    public_ip,
    secret,
    tan,
    timestamp,
    tracking,
    upi,
    vehicle,
    version,
    vid,
)

LANGUAGES = ("en", "hi", "ta", "bn")
CHECKSUMMED = frozenset({"aadhaar", "vid", "gstin", "epic", "card", "iban"})


@dataclass(frozen=True)
class Case:
    """A text; `kind` with its span is what must be found in it, None where there is nothing to find."""

    text: str
    kind: str | None
    start: int
    end: int
    made_as: str


# kind -> (maker, label words by language, whether a value may stand without a label). A label is put into the wordings
# below; kinds that no form can tell (TAN, passport, accounts, UAN, CKYC, ESIC, PIN, birth) always have one.
Maker = Callable[[random.Random], str]
KINDS: dict[str, tuple[Maker, dict[str, tuple[str, ...]], bool]] = {
    "aadhaar": (aadhaar, {
        "en": ("Aadhaar number", "Aadhaar card no.", "aadhar no", "UIDAI number", "aadhaar"),
        "hi": ("आधार नंबर", "आधार कार्ड", "आधार संख्या", "aadhar number"),
        "ta": ("ஆதார் எண்", "ஆதார் அட்டை எண்", "Aadhaar எண்"),
        "bn": ("আধার নম্বর", "আধার কার্ড", "aadhaar নম্বর")}, True),
    "vid": (vid, {
        "en": ("VID", "virtual ID", "Aadhaar VID"), "hi": ("वीआईडी", "VID नंबर", "वर्चुअल आईडी"),
        "ta": ("விஐடி", "VID எண்"), "bn": ("ভিআইডি", "VID নম্বর")}, True),
    "pan": (pan, {
        "en": ("PAN", "PAN card number", "pan no."), "hi": ("पैन नंबर", "पैन कार्ड", "PAN नंबर"),
        "ta": ("பான் எண்", "PAN எண்"), "bn": ("প্যান নম্বর", "PAN নম্বর")}, True),
    "gstin": (gstin, {
        "en": ("GSTIN", "GST number", "GST no."), "hi": ("जीएसटी नंबर", "GSTIN"), "ta": ("ஜிஎஸ்டி எண்", "GSTIN"),
        "bn": ("জিএসটি নম্বর", "GSTIN")}, True),
    "tan": (tan, {
        "en": ("TAN", "TAN number", "deductor TAN"), "hi": ("टैन नंबर", "TAN नंबर"), "ta": ("TAN எண்",),
        "bn": ("ট্যান নম্বর", "TAN নম্বর")}, False),
    "ifsc": (ifsc, {
        "en": ("IFSC", "IFSC code", "bank IFSC"), "hi": ("आईएफएससी कोड", "IFSC कोड"), "ta": ("IFSC குறியீடு", "IFSC"),
        "bn": ("IFSC কোড", "আইএফএসসি")}, True),
    "upi": (upi, {
        "en": ("UPI ID", "GPay id", "VPA"), "hi": ("यूपीआई आईडी", "UPI आईडी"), "ta": ("யுபிஐ ஐடி", "UPI ஐடி"),
        "bn": ("ইউপিআই আইডি", "UPI আইডি")}, True),
    "bank_account": (bank_account, {
        "en": ("account number", "A/c no.", "bank account", "savings account no", "acct"),
        "hi": ("खाता संख्या", "बैंक खाता नंबर", "अकाउंट नंबर"), "ta": ("கணக்கு எண்", "வங்கி கணக்கு எண்"),
        "bn": ("অ্যাকাউন্ট নম্বর", "হিসাব নম্বর", "একাউন্ট নম্বর")}, False),
    "mobile": (mobile, {
        "en": ("mobile", "phone number", "WhatsApp", "contact no.", "cell", "mob"),
        "hi": ("मोबाइल नंबर", "फोन नंबर", "फ़ोन", "व्हाट्सएप नंबर", "mobile no"),
        "ta": ("கைபேசி எண்", "மொபைல் எண்", "தொலைபேசி எண்", "போன் நம்பர்"),
        "bn": ("মোবাইল নম্বর", "ফোন নম্বর", "হোয়াটসঅ্যাপ নম্বর")}, True),
    "phone": (other_phone, {
        "en": ("phone", "telephone number", "landline"), "hi": ("फोन नंबर", "phone"), "ta": ("தொலைபேசி எண்",),
        "bn": ("ফোন নম্বর",)}, False),
    "epic": (epic, {
        "en": ("voter ID", "EPIC number", "voter id card no"), "hi": ("मतदाता पहचान पत्र", "वोटर आईडी"),
        "ta": ("வாக்காளர் அடையாள எண்", "voter id"), "bn": ("ভোটার কার্ড নম্বর", "ভোটার আইডি")}, True),
    "passport": (passport, {
        "en": ("passport number", "passport no.", "Passport"), "hi": ("पासपोर्ट नंबर", "passport नंबर"),
        "ta": ("பாஸ்போர்ட் எண்", "passport எண்"), "bn": ("পাসপোর্ট নম্বর", "passport নম্বর")}, False),
    "driving_licence": (driving_licence, {
        "en": ("driving licence", "DL no.", "driving license number"), "hi": ("ड्राइविंग लाइसेंस", "लाइसेंस नंबर"),
        "ta": ("ஓட்டுநர் உரிமம் எண்", "DL எண்"), "bn": ("ড্রাইভিং লাইসেন্স নম্বর", "DL নম্বর")}, True),
    "vehicle": (vehicle, {
        "en": ("car number", "vehicle registration", "bike no.", "vehicle no"), "hi": ("गाड़ी नंबर", "वाहन संख्या"),
        "ta": ("வாகன எண்", "வண்டி எண்"), "bn": ("গাড়ির নম্বর", "vehicle নম্বর")}, True),
    "abha": (abha, {
        "en": ("ABHA number", "ABHA", "ABHA id"), "hi": ("आभा नंबर", "ABHA नंबर"), "ta": ("ABHA எண்",),
        "bn": ("আভা নম্বর", "ABHA নম্বর")}, False),
    "ckyc": (lambda rng: digits(rng, 14, "123456789"), {
        "en": ("CKYC number", "CKYC", "CKYC no."), "hi": ("CKYC नंबर",), "ta": ("CKYC எண்",), "bn": ("CKYC নম্বর",)},
        False),
    "uan": (lambda rng: "10" + digits(rng, 10), {
        "en": ("UAN", "UAN number", "EPF UAN"), "hi": ("यूएएन नंबर", "UAN नंबर"), "ta": ("UAN எண்",),
        "bn": ("UAN নম্বর",)}, False),
    "esic": (lambda rng: digits(rng, 17, "123456789"), {
        "en": ("ESIC number", "ESI no."), "hi": ("ESIC नंबर",), "ta": ("ESIC எண்",), "bn": ("ESIC নম্বর",)}, False),
    "pin_code": (lambda rng: digits(rng, 6, "12345678"), {
        "en": ("PIN code", "pincode", "PIN"), "hi": ("पिन कोड", "पिनकोड"), "ta": ("பின் கோடு", "அஞ்சல் குறியீடு"),
        "bn": ("পিন কোড", "পিনকোড")}, False),
    "email": (email, {
        "en": ("email", "mail id", "e-mail"), "hi": ("ईमेल", "ईमेल आईडी"), "ta": ("மின்னஞ்சல்",), "bn": ("ইমেল",)},
        True),
    "card": (card, {
        "en": ("credit card", "debit card number", "card no.", "RuPay card"), "hi": ("कार्ड नंबर", "क्रेडिट कार्ड"),
        "ta": ("அட்டை எண்", "கார்டு எண்"), "bn": ("কার্ড নম্বর", "ক্রেডিট কার্ড")}, True),
    "iban": (any_iban, {"en": ("IBAN", "iban no."), "hi": ("IBAN",), "ta": ("IBAN",), "bn": ("IBAN",)}, True),
    "ip_address": (public_ip, {
        "en": ("IP address", "client IP", "login from IP"), "hi": ("IP पता", "आईपी"), "ta": ("IP முகவரி",),
        "bn": ("IP ঠিকানা",)}, True),
    "date_of_birth": (birth_date, {
        "en": ("date of birth", "DOB", "D.O.B."), "hi": ("जन्म तिथि", "जन्मतिथि", "DOB"), "ta": ("பிறந்த தேதி", "DOB"),
        "bn": ("জন্ম তারিখ", "DOB")}, False),
    "secret": (secret, {
        "en": ("API key", "token", "key"), "hi": ("टोकन", "API key"), "ta": ("டோக்கன்",), "bn": ("টোকেন",)}, True),
}  # fmt: skip

LABELLED = {
    "en": ("My {label} is {value}.", "{label}: {value}", "Please update {label} {value} in the form",
           "{label} - {value}, thanks", "As discussed, the {label} of my brother is {value}. Kindly check.",
           '{{"{label}": "{value}"}}', "{label}\n{value}", "Hi team, sharing {label} {value} for KYC"),
    "hi": ("मेरा {label} {value} है।", "{label}: {value}", "कृपया {label} {value} दर्ज करें",
        "mera {label} {value} hai",
           "नमस्ते, {label} - {value}", "भाई का {label} {value} है, देख लीजिए"),
    "ta": ("என் {label} {value}.", "{label}: {value}", "தயவுசெய்து {label} {value} பதிவு செய்யவும்",
           "வணக்கம், எனது {label} {value} ஆகும்"),
    "bn": ("আমার {label} {value}।", "{label}: {value}", "দয়া করে {label} {value} লিখুন",
           "নমস্কার, আমার {label} হল {value}।"),
}  # fmt: skip
PLAIN = {
    "en": (
        "Ok noted {value} thanks",
        "{value}",
        "Sure, it is {value}. Anything else?",
        "Please use {value} from today",
    ),
    "hi": ("ठीक है, {value} लिख लीजिए", "जी {value} यही है", "haan {value} sahi hai"),
    "ta": ("சரி, {value} தான்", "{value} என்று எழுதுங்கள்"),
    "bn": ("ঠিক আছে, {value} লিখে নিন", "হ্যাঁ {value} এটাই"),
}
INDIC_ZERO = {"hi": 0x966, "bn": 0x9E6, "ta": 0xBE6}
DIGITS_ONLY = frozenset({"aadhaar", "vid", "mobile", "bank_account", "card", "uan", "ckyc", "esic", "pin_code"})


def positives(rng: random.Random, per_kind: int) -> list[Case]:
    """`per_kind` texts of each kind, over all languages; a quarter without a label where the form can tell."""
    made = []
    for kind, (maker, labels, may_be_plain) in KINDS.items():
        for index in range(per_kind):
            language = LANGUAGES[index % 4]
            plain = may_be_plain and rng.random() < 0.25
            wording = rng.choice(PLAIN[language] if plain else LABELLED[language])
            value = maker(rng)
            if kind in DIGITS_ONLY and language != "en" and rng.random() < 0.3:
                value = "".join(chr(INDIC_ZERO[language] + int(c)) if c.isdigit() else c for c in value)
            before, after = wording.replace("{label}", rng.choice(labels[language])).split("{value}")
            before, after = (part.replace("{{", "{").replace("}}", "}") for part in (before, after))
            made.append(Case(before + value + after, kind, len(before), len(before) + len(value), f"{kind}/{language}"))
    return made


NEGATIVES: dict[str, tuple[Maker, dict[str, tuple[str, ...]]]] = {
    "order id": (lambda rng: rng.choice([digits(rng, 10), digits(rng, 12), digits(rng, 14), digits(rng, 16),
        "OD" + digits(rng, 18),
                                         grouped(digits(rng, 17), (3, 7, 7), "-")]), {
        "en": ("Order ID {value} is delayed", "my order {value} has not come", "order no: {value}",
        '{{"order_id": "{value}"}}'),
        "hi": ("मेरा ऑर्डर नंबर {value} कब आएगा", "order id {value} ka status bataiye", "आर्डर {value} रद्द करें"),
        "ta": ("என் ஆர்டர் எண் {value} எப்போது வரும்",), "bn": ("আমার অর্ডার নম্বর {value} কোথায়",)}),
    "tracking number": (tracking, {
        "en": ("Tracking number {value}", "AWB {value} shows out for delivery", "consignment {value}", "track {value}"),
        "hi": ("ट्रैकिंग नंबर {value}", "tracking id {value} check karo"), "ta": ("கண்காணிப்பு எண் {value}",),
        "bn": ("ট্র্যাকিং নম্বর {value}",)}),
    "timestamp": (timestamp, {
        "en": ("timestamp {value}", "logged at {value}", "created {value}", "ts={value} level=info"),
        "hi": ("समय {value} पर लॉग हुआ",), "ta": ("நேரம் {value}",), "bn": ("সময় {value}",)}),
    "amount": (amount, {
        "en": ("The bill comes to {value} in all", "paid {value} yesterday", "balance {value}"),
        "hi": ("कुल राशि {value} है", "{value} का भुगतान हुआ"), "ta": ("மொத்த தொகை {value}",),
        "bn": ("মোট পরিমাণ {value}",)}),
    "uuid": (lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)), {
        "en": ("request {value} failed", "{value}", "id={value}", "see https://host/item/{value}"),
        "hi": ("अनुरोध {value} विफल",), "ta": ("{value} தோல்வி",), "bn": ("{value} ব্যর্থ",)}),
    "version": (version, {
        "en": ("upgrade to version {value}", "release {value} is out", "firmware {value}", "build {value}"),
        "hi": ("संस्करण {value} लगाएँ",), "ta": ("பதிப்பு {value}",), "bn": ("সংস্করণ {value}",)}),
    "transaction reference": (lambda rng: digits(rng, 12), {
        "en": ("UPI Ref No {value}", "UTR {value} credited", "RRN: {value}", "txn id {value} failed"),
        "hi": ("लेनदेन संख्या {value}", "UTR {value} hai"), "ta": ("பரிவர்த்தனை எண் {value}",),
        "bn": ("লেনদেন নম্বর {value}",)}),
    "masked": (masked, {
        "en": ("card {value} was used", "Aadhaar {value}", "a/c {value} debited", "PAN {value}"),
        "hi": ("आधार {value}", "खाता {value}"), "ta": ("ஆதார் {value}",), "bn": ("আধার {value}",)}),
    "wrong check digit": (broken_check, {
        "en": ("{value}", "Noted {value} thanks"), "hi": ("ठीक है {value}",), "ta": ("சரி {value}",),
        "bn": ("ঠিক আছে {value}",)}),
    "booking": (lambda rng: rng.choice([digits(rng, 10, "2468"), letters(rng, 6), "BK" + digits(rng, 8)]), {
        "en": ("PNR {value} confirmed", "booking ref {value}", "ticket no {value}"), "hi": ("PNR {value} कन्फर्म",
        "टिकट {value}"),
        "ta": ("டிக்கெட் {value}",), "bn": ("টিকিট {value}",)}),
    "device or product": (lambda rng: rng.choice(["35" + digits(rng, 13), "978" + digits(rng, 10), "890" + digits(rng,
        10),
                                                  letters(rng, 4) + digits(rng, 7), letters(rng, 2) + digits(rng,
                                                  6)]), {
        "en": ("IMEI {value}", "ISBN {value}", "barcode {value}", "serial {value}", "container {value}",
        "model {value}"),
        "hi": ("IMEI {value}",), "ta": ("serial {value}",), "bn": ("barcode {value}",)}),
    "coupon or part": (lambda rng: rng.choice([letters(rng, 5) + digits(rng, 4) + letters(rng, 1), letters(rng,
        4) + digits(rng, 4),
                                               letters(rng, 3) + "-" + digits(rng, 5), "SAVE" + digits(rng, 3)]), {
        "en": ("use coupon code {value}", "part no {value}", "SKU {value}", "promo {value}"), "hi": ("कूपन {value}",),
        "ta": ("கூப்பன் {value}",), "bn": ("কুপন {value}",)}),
    "code and handles": (lambda rng: rng.choice(["@" + letters(rng, 6).lower(), f"hi@{letters(rng, 5).lower()}x",
                                                 "@app.route('/x')", f"{rng.getrandbits(160):040x}",
                                                 f"0x{rng.getrandbits(64):x}",
                                                 f"12.97{digits(rng, 4)}, 77.59{digits(rng, 4)}", "192.168.1.20",
                                                 "a@b", "x = y @ w"]), {
        "en": ("follow {value} for more", "see {value}", "value {value} in the file"), "hi": ("{value} देखें",),
        "ta": ("{value} பார்க்க",),
        "bn": ("{value} দেখুন",)}),
    "bare number": (lambda rng: rng.choice([digits(rng, 8), digits(rng, 9), digits(rng, 10), digits(rng, 11),
        digits(rng, 12),
                                            digits(rng, 13), digits(rng, 14), digits(rng, 16)]), {
        "en": ("{value}", "ok {value} done"), "hi": ("ठीक {value}",), "ta": ("சரி {value}",), "bn": ("ঠিক {value}",)}),
}  # fmt: skip


def negatives(rng: random.Random, count: int) -> list[Case]:
    """`count` texts that hold nothing personal; one in fifty is a bare number with nothing to tell what it is."""
    names = [name for name in NEGATIVES if name != "bare number"]
    made = []
    for index in range(count):
        name = "bare number" if index % 50 == 49 else names[index % len(names)]
        maker, wordings = NEGATIVES[name]
        wording = rng.choice(wordings[LANGUAGES[(index // 3) % 4]])
        text = wording.replace("{{", "{").replace("}}", "}").replace("{value}", maker(rng))
        made.append(Case(text, None, 0, 0, name))
    return made
