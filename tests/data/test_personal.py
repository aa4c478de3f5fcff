"""What is found in a text, what is left alone, and where it is said to be."""

from __future__ import annotations

import random
import time

import pytest

from charkha.data.personal import find_personal
from charkha.personal_kinds import PERSONAL_KINDS

AADHAAR = "2341 2341 2346"  # made up; its check digit holds


def found(text: str) -> list[tuple[str, str]]:
    return [(find.kind, text[find.start : find.end]) for find in find_personal(text)]


@pytest.mark.parametrize(
    "written",
    [
        "2341 2341 2346", "234123412346", "2341-2341-2346", "2341.2341.2346", "2341  2341  2346", "2341 2341\n2346",
        "2341 – 2341 – 2346", "२३४१ २३४१ २३४६", "২৩৪১ ২৩৪১ ২৩৪৬", "௨௩௪௧ ௨௩௪௧ ௨௩௪௬", "２３４１ ２３４１ ２３４６",
        "2341\u200b2341\u200b2346", "23\u200d41 2341 2346", "2341\u00a02341\u00a02346", "2 3 4 1 2 3 4 1 2 3 4 6",
    ],
)  # fmt: skip
def test_a_number_is_found_however_it_is_written_and_its_place_is_the_writers(written):
    for text in (
        f"Aadhaar {written}",
        f"aadhaar{written} linked",
        f"मेरा आधार नंबर {written} है",
        f"aadhaar no.{written}\nok",
    ):
        assert found(text) == [("aadhaar", written)]


def test_the_positions_count_characters_of_the_text_as_given():
    text = "\u200b\u200bक्\u200dष PAN \ufeffABCPE1234F, mobile 98\u200b765\u200b43210."
    assert found(text) == [("pan", "ABCPE1234F"), ("mobile", "98\u200b765\u200b43210")]


@pytest.mark.parametrize(
    "text",
    [
        "Aadhaar XXXX XXXX 2346", "card ****1234", "a/c XX6789 debited", "mobile 98XXXXXX10", "PAN XXXPX1234X",
        "4111 11XX XXXX 1111", "r***@gmail.com", "password: ********",
    ],
)  # fmt: skip
def test_masked_forms_are_left_alone(text):
    assert found(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "Order 234123412346 is late", "UPI ref no 234123412346", "ऑर्डर २३४१२३४१२३४६ कब आएगा",
        "tracking no 2341 2341 2346",
        "பரிவர்த்தனை எண் 234123412346", "id 550e8400-e29b-41d4-a716-234123412346", "at 202301151030 and 1700000000000",
        "₹9876543210 in all", "9876543210.55", "9,87,65,43,210", "version 49.36.112.5", "x==49.36.112.5",
        "https://shop.in/item/9876543210", "0x9876543210ab", "git@github.com:a/b.git", "@ravi and ravi@home",
        "MSCU1234567 container", "coupon ABCPK1234L", "60000-10800=49200", "10.0.0.5 and 127.0.0.1",
        "api_key=os.environ['KEY']", "password: your_password_here", "the token is expired", "std::vector a::b::c",
    ],
)  # fmt: skip
def test_numbers_that_are_nobodys_are_no_finds(text):
    assert found(text) == []


@pytest.mark.parametrize("number", ["2341 2341 2345", "1341 2341 2346", "4111 1111 1111 1112", "27AAPFU0939F1ZX"])
def test_a_wrong_check_digit_or_first_digit_is_no_find(number):
    assert found(number) == []


def test_the_word_nearest_a_number_says_what_it_is():
    assert found("account 9876543210") == [("bank_account", "9876543210")]
    assert found("account holder's mobile: 9876543210") == [("mobile", "9876543210")]
    assert found("Aadhaar seeded in account, UTR 234123412346") == []
    assert found('{"phone": "9876543210", "order": "9876543211"}') == [("mobile", "9876543210")]
    assert found("9876543210 is my mobile") == [("mobile", "9876543210")]


def test_numbers_in_a_row_are_found_one_by_one():
    text = "Mobile: 9876543210, 98765 43211 / 9876543212\nAadhaar 2341 2341 2346 98765 43213"
    assert [kind for kind, _ in found(text)] == ["mobile", "mobile", "mobile", "aadhaar", "mobile"]


def test_a_label_beside_makes_a_find_sure_and_without_one_it_is_less_so():
    sure = {
        find.confidence for text in (f"Aadhaar {AADHAAR}", AADHAAR, "PAN abcpe1234f") for find in find_personal(text)
    }
    unsure = {find.confidence for text in ("234123412346", "9876543210", "abcpe1234f") for find in find_personal(text)}
    assert (sure, unsure) == ({"high"}, {"medium"})


def test_addresses_of_reserved_domains_are_told_but_do_not_block():
    (reserved,) = find_personal("write to a.b@example.com")
    (real,) = find_personal("write to a.b@gmail.com")
    assert (reserved.blocks, real.blocks) == (False, True)
    assert not find_personal("IFSC SBIN0001234")[0].blocks


def test_the_birth_of_nobody_who_lives_is_told_but_does_not_block():
    assert [find.blocks for text in ("DOB 5.3.1880", "DOB 5.3.1980") for find in find_personal(text)] == [False, True]


def test_finds_do_not_overlap_and_a_gstin_is_not_also_a_pan():
    assert found("GSTIN 27AAPFU0939F1ZV") == [("gstin", "27AAPFU0939F1ZV")]
    assert found("postgres://ravi:pa55word9@db.host.in/x")[0] == ("secret", "ravi:pa55word9")


def test_values_inside_json_text_and_beside_escapes_are_found():
    text = '{\\"aadhaar\\": \\"234123412346\\"}\\n9876543210 mobile'
    assert found(text) == [("aadhaar", "234123412346"), ("mobile", "9876543210")]


def test_any_text_gives_finds_in_order_within_it_and_none_overlapping():
    rng = random.Random(3)
    pieces = [
        "2341 2341 2346", "ABCPE1234F", "98765", "43210", "@", ".", "gmail.com", "okaxis", "-", "/", " ", "\n",
        "+91", "(", ")", "आधार", "২৩৪", "\u200b", "\u200d", "\u0130", "\xdf", "\ud800", "\x00", "\uff14",
        "password:", "=", "aA1#x9", "born", "15/08/1985", "GB82WEST12345698765432", "27AAPFU0939F1ZV", "eyJ",
        "sk-", "://", "a:b", "HDFC0001234", "order", "id", "99.9.9.9", "\xb2", "௰",
    ]  # fmt: skip
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
        finds = find_personal(text)
        places = [0, *(place for find in finds for place in (find.start, find.end)), len(text)]
        assert places == sorted(places), text
        assert all(find.start < find.end and find.kind in PERSONAL_KINDS for find in finds)


HARD = (
    "1" * 200_000, "9 " * 50_000, "12 345 " * 20_000, "a@" * 50_000, "A1" * 100_000, "password=" * 20_000,
    "-----BEGIN RSA PRIVATE KEY-----" * 5000, "12.34." * 10_000, ":" * 200_000, "1234-" * 20_000, "://a:" * 50_000,
    "GB82 " * 40_000, "\u200b1" * 100_000, "born " * 40_000,
)  # fmt: skip


@pytest.mark.parametrize("text", HARD, ids=lambda text: repr(text[:12]))
def test_no_text_takes_time_out_of_proportion(text):
    started = time.process_time()
    find_personal(text)
    assert time.process_time() - started < 4.0
