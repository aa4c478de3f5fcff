"""Words that say what a number is: `Aadhaar no.`, `मोबाइल`, `order id`. Most numbers cannot be told apart without them.

A label names a kind of personal data, or OTHER: something that is nobody's number, such as an order, a bill or an
amount. Latin-script words are looked up whole, also glued to `no`, `number` or `id`; words of Indic scripts by how
they begin, because endings are joined to them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from charkha.data.folding import lowered

OTHER = "other"
PLACE = "place"  # a town or state: the six digits right behind it are its PIN code
WEAK = "id"  # `id` or `code` alone: something is numbered, but what?

_LATIN = {
    "aadhaar": "aadhaar aadhar adhaar adhar addhar aadhr adhhar aadhaarcard aadharcard uidai uid",
    "vid": "vid virtual virtualid",
    "pan": "pan pancard permanentaccount",
    "gstin": "gstin gst",
    "tan": "tan",
    "ifsc": "ifsc ifsccode",
    "upi": "upi vpa gpay googlepay phonepe paytm bhim",
    "bank_account": "account accounts acct acc acount accnt accnum a/c ac accno acno khata khaata savings iban",
    "mobile": "mobile mobiles mobil moblie phone phones phn fone tel telephone cell cellphone whatsapp mob ph call "
    "called calling contact sms dial ring reach helpline fax office residence fon msisdn ping wa.me landline callback",
    "epic": "epic voter voterid elector electoral",
    "passport": "passport passports",
    "driving_licence": "licence license dl driving drivers",
    "vehicle": "vehicle car bike scooter truck registration regn rc plate registered gaadi gadi van auto",
    "abha": "abha abdm health healthid ndhm",
    "ckyc": "ckyc kin ckycr",
    "uan": "uan epf epfo pf",
    "esic": "esic esi insurance",
    "pin_code": "pin pincode postal zip zipcode postcode",
    "card": "card cards credit debit visa mastercard rupay amex",
    "ip_address": "ip ipv ipaddress ipaddr",
    OTHER: "order orders tracking track awb consignment shipment parcel courier docket ticket ref reference refno utr "
    "rrn txn txnid transaction transactions invoice receipt bill booking pnr sku isbn issn ean upc barcode serial "
    "model part version build release ver case complaint request batch lot amount amt rs inr rupees rupee usd "
    "price cost total sum balance bal salary population views timestamp epoch ts coupon promo voucher imei "
    "container gtin hsn item product article doi page commit hash uuid guid row meter challan ack acknowledgement "
    "roll policy trace checksum sha md lakh crore quantity qty width height size bytes seconds ms pixels orderid "
    "ticketid requestid trackingid invoiceid created rank score count distance weight revenue budget fee "
    "fine premium invoiceno seq sequence lat lon latitude longitude firmware api chapter section clause figure "
    "table equation revision iteration level step variant udyam cin llpin result equals",
    WEAK: "id ids code",
    PLACE: "mumbai delhi bengaluru bangalore kolkata chennai hyderabad pune ahmedabad jaipur lucknow kanpur nagpur "
    "indore thane bhopal patna vadodara ghaziabad ludhiana agra nashik faridabad meerut rajkot varanasi "
    "srinagar ranchi howrah coimbatore vijayawada jodhpur madurai raipur kota guwahati chandigarh mysuru "
    "mysore gurgaon gurugram noida kochi thiruvananthapuram trivandrum visakhapatnam surat maharashtra "
    "karnataka kerala gujarat rajasthan punjab haryana bihar odisha assam telangana jharkhand uttarakhand goa "
    "tamilnadu nadu pradesh bengal chhattisgarh",
}
_ENDINGS = ("", "no", "nos", "num", "number", "numbers", "id", "s")
_OWNERS = (
    "",
    "customer",
    "user",
    "my",
    "alt",
    "primary",
    "registered",
    "bank",
    "home",
    "emergency",
    "nominee",
    "beneficiary",
)
_LATIN_WORDS = {
    owner + word + ending: kind
    for owner in reversed(_OWNERS)
    for ending in reversed(_ENDINGS)
    for kind, words in reversed(_LATIN.items())
    if not owner or kind in ("aadhaar", "pan", "bank_account", "mobile", "upi", "ifsc", "card")
    for word in words.split()
    if word + ending not in ("cars", "pans", "tans", "pins", "acs", "rings", "autos", "parts", "sums", "posts")
}

_INDIC = {
    "aadhaar": "आधार ஆதார் ஆதாரில் ஆதாரின் আধার ఆధార్ ಆಧಾರ್ ആധാർ આધાર ਆਧਾਰ ଆଧାର",
    "vid": "वीआईडी वर्चुअल விஐடி மெய்நிகர் ভিআইডি ভার্চুয়াল",
    "pan": "पैन பான் প্যান పాన్ ಪ್ಯಾನ್ പാൻ પાન ਪੈਨ ପାନ",
    "gstin": "जीएसटी ஜிஎஸ்டி জিএসটি",
    "tan": "टैन டான் ট্যান",
    "ifsc": "आईएफएससी ஐஎஃப்எஸ்சி আইএফএসসি",
    "upi": "यूपीआई யுபிஐ ইউপিআই భీమ్ యూపీఐ ಯುಪಿಐ",
    "bank_account": "खाता खाते खात्या अकाउंट अकाउन्ट கணக்கு கணக்கில் அக்கவுண்ட் অ্যাকাউন্ট একাউন্ট হিসাব ఖాతా ಖಾತೆ അക്കൗണ്ട് ખાતા ખાતું ਖਾਤਾ ଖାତା",
    "mobile": "मोबाइल मोबाईल फोन फ़ोन फ़ोन व्हाट्सएप व्हॉट्सअ‍ॅप कॉल संपर्क सम्पर्क கைபேசி மொபைல் தொலைபேசி ஃபோன் போன் "
    "அழை வாட்ஸ்அப் செல்பேசி தொடர்பு মোবাইল ফোন হোয়াটসঅ্যাপ কল যোগাযোগ మొబైల్ ఫోన్ ಮೊಬೈಲ್ ಫೋನ್ മൊബൈൽ ഫോൺ મોબાઇલ ફોન "
    "ਮੋਬਾਈਲ ਫ਼ੋਨ ਫੋਨ ମୋବାଇଲ ଫୋନ",
    "epic": "मतदाता वोटर வாக்காளர் ভোটার ఓటరు ಮತದಾರ",
    "passport": "पासपोर्ट பாஸ்போர்ட் கடவுச்சீட்டு পাসপোর্ট పాస్‌పోర్ట్ పాస్పోర్ట్ ಪಾಸ್ಪೋರ್ಟ್",
    "driving_licence": "लाइसेंस ड्राइविंग ஓட்டுநர் உரிமம் ড্রাইভিং লাইসেন্স",
    "vehicle": "गाड़ी गाडी वाहन வாகன வண்டி গাড়ি গাড়ি যানবাহন",
    "abha": "आभा ஆபா আভা",
    "ckyc": "सीकेवाईसी சிகேஒய்சி সিকেওয়াইসি সিকেওয়াইসি",
    "uan": "यूएएन யுஏஎன் ইউএএন पीएफ",
    "esic": "ईएसआईसी இஎஸ்ஐசி ইএসআইসি",
    "pin_code": "पिन பின்கோடு பின் அஞ்சல் পিন పిన్ ಪಿನ್",
    "card": "कार्ड அட்டை கார்டு কার্ড కార్డ్ ಕಾರ್ಡ್",
    OTHER: "ऑर्डर आर्डर आदेश ट्रैकिंग इनवॉइस बिल रसीद राशि रुपये रुपए शिकायत टिकट लेनदेन लेन-देन संदर्भ संस्करण கட்டண "
    "ஆர்டர் கண்காணிப்பு ட்ராக்கிங் விலைப்பட்டியல் தொகை ரூபாய் ரசீது குறிப்பு பரிவர்த்தனை டிக்கெட் புகார் பதிப்பு "
    "অর্ডার ট্র্যাকিং চালান টাকা পরিমাণ রসিদ রেফারেন্স লেনদেন টিকিট অভিযোগ সংস্করণ বিল কুপন कूपन கூப்பன்",
    WEAK: "आईडी ஐடி আইডি",
    PLACE: "मुंबई दिल्ली बेंगलुरु कोलकाता चेन्नई हैदराबाद पुणे जयपुर लखनऊ पटना சென்னை மதுரை கோயம்புத்தூர் কলকাতা হাওড়া হাওড়া",
}
_INDIC_WORDS = {word: kind for kind, words in _INDIC.items() for word in words.split()}

_WORD = re.compile(r"a/c|wa\.me|[a-z]+")
_INDIC_WORD = re.compile("|".join(sorted(map(re.escape, _INDIC_WORDS), key=len, reverse=True)))
_NON_LATIN = re.compile("[\u0900-\u0dff]")
_BETWEEN = re.compile(
    r"(?:[^a-z0-9\u0900-\u0dff]|(?:nos?|num|numbers?|ids?|code|is|was|are|and|on|to|at|of|my|his|her|the|hai|he|h|ye|yeh|"
    r"mera|meri|card|details?|ending|this|new|old|with|me|us|him|your|using|value|line|digit|string|following|address|"
    r"linked|as|under|by)(?![a-z])|नंबर|नम्बर|नं|संख्या|क्रमांक|है|हैं|हुं|का|की|के|पर|मेरा|कार्ड|एन|আমার|নম্বরে|নম্বর|নাম্বার|নং|"
    r"হল|হলো|এর|টি|কার্ড|সংখ্যা|எண்ணில்|எண்ணை|எண்|என்பது|எனது|என்|கார்டு|அட்டை|நம்பர்|உள்ள|ஐடி|आईडी|আইডি|पे|में|से|ను|"
    r"कोड|கோடு|கோடில்|குறியீடு|কোড|కోడ్|ಕೋಡ್|നമ്പറ്|पता|पहचान|पत्र|முகவரி|ঠিকানা|నంబర్|సంఖ్య|ನಂಬರ್|ಸಂಖ್ಯೆ|നമ്പർ|નંબર|ਨੰਬਰ|ନମ୍ବର|[\u0bbe-\u0bcd\u093e-\u094d\u09be-\u09cd])*"
)
_FAR = 60  # characters over which a label still speaks for a number after it
_FAR_BACK = 30  # and for one before it: `9876543210 is my mobile`
_LONGEST = 20  # letters of a label word
_FEW = 6
_TIE = 40  # longest text of filling words between a label and its number


class Label(NamedTuple):
    """One label word and what it names."""

    start: int
    end: int
    kind: str


class Meaning(NamedTuple):
    """What the words around a number say it is. `adjacent`: nothing but filling words stands between."""

    kind: str
    adjacent: bool
    distance: int  # characters between
    is_after: bool = False


class Labels:
    """The label words of one text; only those near a number are ever looked for."""

    def __init__(self, text: str) -> None:
        self.lower = lowered(text)
        self._has_indic = not self.lower.isascii() and _NON_LATIN.search(self.lower) is not None
        self._asked = 0
        self._all: list[Label] | None = None
        self._starts: list[int] = []

    def _between(self, start: int, end: int) -> list[Label]:
        """Labels from start to end. After a few questions the whole text is read once, which many then share."""
        self._asked += 1
        if self._asked > _FEW:
            if self._all is None:
                self._all = self._read(0, len(self.lower))
                self._starts = [label.start for label in self._all]
            first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
            return [label for label in self._all[first:last] if label.end <= end]
        return self._read(start, end)

    def _read(self, start: int, end: int) -> list[Label]:
        """Labels from start to end; a start within a word is moved before it."""
        while start and self.lower[start - 1].isalpha():
            start -= 1
        found = [
            Label(match.start(), match.end(), kind)
            for match in _WORD.finditer(self.lower, start, end)
            if (kind := _LATIN_WORDS.get(match[0])) is not None
            and not self.lower[max(0, match.start() - 1) : match.start()].isdigit()  # letters of a hexadecimal number
        ]
        if self._has_indic:
            found += [
                Label(match.start(), match.end(), _INDIC_WORDS[match[0]])
                for match in _INDIC_WORD.finditer(self.lower, start, end)
                if match.start() == 0 or not "\u0900" <= self.lower[match.start() - 1] <= "\u0dff"
            ]
            found.sort(key=lambda label: label.start)
        return found

    def meanings(self, start: int, end: int) -> Iterator[Meaning]:
        """What the characters start to end may be, the most telling first: labels before them, nearest first, then one
        after them, looked for only when asked on. A bare `id` counts only where nothing else does.
        """
        weak: list[Meaning] = []
        for label in reversed(self._between(max(0, start - _FAR), start)):
            meaning = Meaning(label.kind, self._tied(label.end, start), start - label.end)
            if label.kind == WEAK:
                weak.append(meaning)
            else:
                yield meaning
        yield from self._after(end)
        yield from (meaning for meaning in weak if meaning.adjacent)

    def nearest(self, start: int, end: int) -> Meaning | None:
        """The most telling of the meanings."""
        return next(self.meanings(start, end), None)

    def _after(self, end: int) -> list[Meaning]:
        for label in self._between(end, end + _FAR_BACK + _LONGEST)[:1]:
            between = self.lower[end : label.start]
            if len(between) > _FAR_BACK or any("0" <= letter <= "9" or letter in ";\n" for letter in between):
                return []
            tied = self._tied(end, label.start) and "," not in between
            counts = label.kind != OTHER or (tied and ":" not in between)
            return [Meaning(label.kind, tied, len(between), is_after=True)] if counts else []
        return []

    def _tied(self, start: int, end: int) -> bool:
        return end - start <= _TIE and _BETWEEN.fullmatch(self.lower, start, end) is not None
