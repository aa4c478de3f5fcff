"""The kinds of personal data that are looked for, by the names that the config and every report use."""

from __future__ import annotations

# kind -> what it is, for people.
PERSONAL_KINDS = {
    "aadhaar": "Aadhaar number (Verhoeff check digit)",
    "vid": "Aadhaar virtual id (Verhoeff check digit)",
    "pan": "income tax PAN",
    "gstin": "GST number (check character); holds a PAN",
    "tan": "tax deduction account number",
    "ifsc": "bank branch code",
    "upi": "UPI address",
    "bank_account": "bank account number",
    "mobile": "mobile number, ten digits from 6 to 9 on",
    "phone": "landline, or a number with another country's code",
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
