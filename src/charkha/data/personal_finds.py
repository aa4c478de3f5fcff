"""One piece of personal data in one text, and the kinds there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Confidence = Literal["high", "medium"]

# kind -> what it is, for people.
KINDS = {
    "aadhaar": "Aadhaar number (Verhoeff check digit)",
    "vid": "Aadhaar virtual id (Verhoeff check digit)",
    "pan": "income tax PAN",
    "gstin": "GST number (check character); holds a PAN",
    "tan": "tax deduction account number",
    "ifsc": "bank branch code",
    "upi": "UPI address",
    "bank_account": "bank account number",
    "mobile": "Indian mobile number",
    "phone": "phone number with another country's code",
    "epic": "voter id, EPIC (Luhn check digit)",
    "passport": "Indian passport number",
    "driving_licence": "Indian driving licence",
    "vehicle": "vehicle registration",
    "abha": "ABHA health number or address",
    "ckyc": "CKYC number",
    "uan": "provident fund UAN",
    "esic": "ESIC insurance number",
    "pin_code": "postal PIN code",
    "email": "e-mail address",
    "card": "payment card number (issuer range, Luhn)",
    "iban": "IBAN (mod 97)",
    "ip_address": "public IP address",
    "date_of_birth": "date of birth",
    "secret": "password, key or token",
}

# Public facts about places: told and masked, but never a reason to refuse training.
NOT_A_PERSON = frozenset({"ifsc", "pin_code"})


@dataclass(frozen=True, slots=True)
class Find:
    """Characters start to end of a text are of this kind. The value itself is never kept."""

    kind: str
    start: int
    end: int
    confidence: Confidence

    @property
    def blocks(self) -> bool:
        """Whether training refuses such data until its user has decided."""
        return self.confidence == "high" and self.kind not in NOT_A_PERSON
