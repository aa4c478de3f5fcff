"""Write the pretraining text: plain prose, lists, letters and chats of an Indian bank's help desk, from a seed.

    python tools/starter/make_text.py --documents 1000 --out /tmp/text.txt

The text holds no JSON: no brace, no bracket, no double quote. What it teaches is to copy names, towns and amounts never
seen before out of a message into a note, under many headings and separators. Pretraining makes the text as it goes;
this command is for reading it.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from messages import Case, draw_case, write_message, write_request
from names import HELDOUT_WORDS, known_person, made_amount, made_name, made_person, made_town, made_word

SEED = 20240607
FORBIDDEN = re.compile(r'[{}\[\]"]')

_HEADINGS = {
    "name": ("Name", "name", "Customer", "customer", "Caller", "Who", "name of customer", "person"),
    "town": ("Town", "town", "City", "city", "Place", "place", "Branch", "Where"),
    "product": ("Product", "product", "Item", "item", "About", "kind of product"),
    "issue": ("Issue", "issue", "Request", "request", "Matter", "problem"),
    "amount": ("Amount", "amount", "Sum", "Rupees", "rupees", "money", "amount in rupees"),
}
_MARKS = (": ", ": ", " - ", " is ", " = ", ", ", " / ", " -> ", ":", "=", " ", "\n", "; ", ":: ", " ' ")
_BREAKS = ("\n", "\n", "; ", ", ", ". ", " / ", " | ", "\n- ", ",", "', '", " & ")


def _chat(user: str, assistant: str) -> str:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


def _case(rng: random.Random) -> Case:
    person = known_person(rng) if rng.random() < 0.1 else made_person(rng)
    return draw_case(rng, person)


def _note(rng: random.Random, case: Case) -> str:
    """The facts under headings, in any order, any of them missing, one mark and one break throughout."""
    facts = {
        "name": case.person.name,
        "town": case.person.town,
        "product": case.product,
        "issue": case.issue,
        "amount": str(case.amount),
    }
    keys = list(facts)
    if rng.random() < 0.5:
        rng.shuffle(keys)
    keys = keys[: rng.choice((2, 3, 4, 5, 5, 5, 5))]
    mark, line_break = rng.choice(_MARKS), rng.choice(_BREAKS)
    if line_break == ", " and mark == ", ":
        mark = " "
    plain = rng.random() < 0.4
    return line_break.join((key if plain else rng.choice(_HEADINGS[key])) + mark + facts[key] for key in keys)


def _chat_note(rng: random.Random) -> str:
    case = _case(rng)
    return _chat(write_message(rng, case, "extra"), _note(rng, case))


def _prose_note(rng: random.Random) -> str:
    case = _case(rng)
    lead = rng.choice(("Message", "Letter", "Call", "The customer says", "Voice mail", "Received"))
    tail = rng.choice(("Note", "Summary", "In short", "For the file", "Written down", "Details"))
    return f"{lead}: {write_message(rng, case, 'extra')}\n{tail}: {_note(rng, case)}\n"


_SUMMARIES = (
    "{name} of {town} asks about {issue} of a {product}, Rs {amount}.",
    "The customer {name} from {town} writes about a {product}. The matter is {issue}. The amount is {amount}.",
    "Rs {amount}, {product}, {issue}. Call {name} in {town}.",
    "{town}: {name}. {product}, {issue}, {amount}.",
    "Dear {name}, we have noted your request ({issue}) on the {product}. The amount is Rs {amount}. Our {town} branch"
    " will write to you.",
    "Thank you, {name}. Your {product} request is {issue} and the sum is {amount} rupees."
    " Please visit the {town} branch.",
    "Noted, {name}. We have {town} as your town and {amount} as the amount. The product is {product}; issue {issue}.",
)


def _fill(rng: random.Random, shapes: tuple[str, ...], case: Case) -> str:
    return rng.choice(shapes).format(
        name=case.person.name, town=case.person.town, product=case.product, issue=case.issue, amount=case.amount
    )


def _chat_reply(rng: random.Random) -> str:
    case = _case(rng)
    return _chat(write_message(rng, case, "extra"), _fill(rng, _SUMMARIES, case))


_TURNS = (
    ("What is your name?", "name"),
    ("Your good name please?", "name"),
    ("Which town?", "town"),
    ("From where are you calling?", "town"),
    ("How much?", "amount"),
    ("What amount?", "amount"),
    ("Which product?", "product"),
)


def _dialogue(rng: random.Random) -> str:
    """Clerk and customer; the clerk repeats each answer, and some are asked for again."""
    case = _case(rng)
    facts = {
        "name": case.person.name,
        "town": case.person.town,
        "amount": str(case.amount),
        "product": case.product,
    }
    lines = [f"Customer: {write_message(rng, case, 'extra')}"] if rng.random() < 0.5 else []
    for question, key in rng.sample(_TURNS, rng.randint(2, 4)):
        echo = rng.choice(("I repeat, {}.", "{}, noted.", "So it is {}.", "I have written {}.", "{}?"))
        lines += [f"Clerk: {question}", f"Customer: {facts[key]}.", "Clerk: " + echo.format(facts[key])]
    if rng.random() < 0.5:
        lines.append(f"Clerk: {_note(rng, case)}")
    return "\n".join(lines) + "\n"


def _register(rng: random.Random) -> str:
    """A few customers, then one of them looked up: the answer depends on which one is asked for."""
    cases = [_case(rng) for _ in range(rng.randint(2, 4))]
    shape = rng.choice(("{name}, {town}, {amount}", "{name} of {town} paid {amount}", "{name} - {town} - {amount}"))
    lines = [shape.format(name=c.person.name, town=c.person.town, amount=c.amount) for c in cases]
    wanted = rng.choice(cases)
    lines += [
        rng.choice(
            (
                f"Where is {wanted.person.name} from? {wanted.person.town}.",
                f"How much for {wanted.person.name}? {wanted.amount}.",
                f"Who is from {wanted.person.town}? {wanted.person.name}.",
                f"Who paid {wanted.amount}? {wanted.person.name}.",
            )
        )
    ]
    return "\n".join(lines) + "\n"


def _repeat(rng: random.Random) -> str:
    """Made-up words said again, in the same order: the plainest lesson in copying."""
    drawn: list[Callable[[random.Random], str]] = [made_name, made_town, lambda r: str(made_amount(r)), made_word]
    items = [rng.choice(drawn)(rng) for _ in range(rng.randint(3, 8))]
    gap = rng.choice((", ", " ", "\n", "; ", " and "))
    again = rng.choice(("\nAgain: ", "\n", ". I repeat: ", "\nCopy: ", " | "))
    if rng.random() < 0.4:
        items_again = rng.sample(items, len(items))
    else:
        items_again = items
    return gap.join(items) + again + rng.choice((", ", gap, " / ")).join(items_again) + "\n"


def _drill(rng: random.Random) -> str:
    """A few made-up words, again and again: far more to copy than to guess."""
    drawn: list[Callable[[random.Random], str]] = [made_name, made_town, lambda r: str(made_amount(r))]
    items = [rng.choice(drawn)(rng) for _ in range(rng.randint(1, 4))]
    lines = []
    for _ in range(rng.randint(3, 6)):
        lines.append(rng.choice((", ", " ", "; ", " and ")).join(rng.sample(items, len(items))))
    return "\n".join(lines) + "\n"


def _sorting(rng: random.Random) -> str:
    """A clerk sorts single sentences: little to read for each answer, so the kinds of request are learned soon."""
    mark = rng.choice(_MARKS)
    keys = rng.choice((("issue",), ("issue",), ("product", "issue"), ("issue", "product"), ()))
    headings = {key: rng.choice(_HEADINGS[key]) for key in keys}
    turns = []
    for _ in range(rng.randint(2, 5)):
        case = _case(rng)
        facts = {"product": case.product, "issue": case.issue}
        answer = "; ".join(headings[key] + mark + facts[key] for key in keys) or case.issue
        turns.append(_chat(write_request(rng, case), answer))
    return "".join(turns)


def _letter(rng: random.Random) -> str:
    case = _case(rng)
    name, town = case.person.name, case.person.town
    clerk = made_name(rng)
    body = _fill(rng, _SUMMARIES, case)
    copied = rng.choice(("Copy to", "Sent to", "Filed under"))
    return (
        f"To {name}, {town}\nSubject: {case.product}, {case.issue}\nDear {name},\n{body}"
        f" Please bring this letter to the {town} branch.\n"
        f"Yours, {clerk}\n{copied} {name}, {town}. Signed {clerk}.\n"
    )


_ADVICE = (
    "To {verb} a {product}, please visit the branch in {town} with your papers.",
    "Our {town} branch is open from {a} to {b} on all days but Sunday. The {town} manager is {name}. Ask for {name}.",
    "The fee for a {product} is Rs {amount}. A customer who pays Rs {amount} gets a receipt at once.",
    "Never tell your PIN to anyone, not even to {name} of the {town} branch.",
    "A statement of the {product} comes every month. If it does not come, write to {name} in {town}.",
    "A refund takes {a} days. A blocked {product} is opened again by {name}, our officer for {town}.",
)


def _advice(rng: random.Random) -> str:
    case = _case(rng)
    lines = [
        shape.format(
            verb=rng.choice(("open", "close", "unblock", "get")),
            product=case.product,
            town=case.person.town,
            name=case.person.name,
            amount=case.amount,
            a=rng.randint(7, 11),
            b=rng.randint(14, 19),
        )
        for shape in rng.sample(_ADVICE, 2)
    ]
    return " ".join(lines) + "\n"


_KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_chat_note, 40),
    (_prose_note, 16),
    (_chat_reply, 10),
    (_dialogue, 8),
    (_register, 8),
    (_repeat, 12),
    (_letter, 4),
    (_advice, 4),
)
_FIRST_KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = ((_drill, 60), (_repeat, 10), *_KINDS[:3])
_LATER_KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_sorting, 30),
    (_chat_note, 40),
    (_prose_note, 10),
    (_chat_reply, 6),
    (_register, 4),
    (_repeat, 8),
    (_dialogue, 2),
)
LATER_DOCUMENTS = 200_000
"""From here on the text is that of the last phase: more sorting, more notes."""
FIRST_DOCUMENTS = 3_000
"""Drills come first, while copying is still frail."""


def document(seed: int, index: int) -> str:
    """Document `index` of the text; a pure function of both numbers."""
    rng = random.Random(seed * 1_000_003 + index)
    kinds = _FIRST_KINDS if index < FIRST_DOCUMENTS else _KINDS if index < LATER_DOCUMENTS else _LATER_KINDS
    makers, weights = zip(*kinds, strict=True)
    maker: Callable[[random.Random], str] = rng.choices(makers, weights)[0]
    return maker(rng)


def documents(count: int, seed: int = SEED, start: int = 0) -> Iterator[str]:
    """The documents `start` to `start + count`."""
    for index in range(start, start + count):
        yield document(seed, index)


def heldout_words_in(text: str) -> set[str]:
    """The words of held-out names and towns that stand in `text`, whatever the case."""
    return HELDOUT_WORDS & set(re.findall(r"[a-z]+", text.lower()))


def main() -> None:
    """Write the text and refuse it when it holds JSON or a held-out name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    text = "\n".join(documents(arguments.documents, arguments.seed))
    if FORBIDDEN.search(text) or heldout_words_in(text):
        raise SystemExit("the text holds JSON or a held-out name; change the generator")
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.documents} documents, {len(text.encode())} bytes, no JSON, no held-out word")


if __name__ == "__main__":
    main()
