"""Sentences put together piece by piece, for the pretraining text only.

Fixed phrases alone would be learned by heart; pieces joined at random, with stray words among them, leave the model
nothing but the words that matter: the product, the verb or noun of the request, and the place where a name or a number
stands.
"""

from __future__ import annotations

import random

from names import made_word


def _listed(pieces: str, gap: str = "|") -> tuple[str, ...]:
    return tuple(pieces.split(gap))


_STRAY = _listed(
    "actually again all also always another answer any around ask away bank before better big book both brother bus"
    " business busy call careful certain children clear clerk cold come counter daily daughter day "
    "different doctor door"
    " early easy enough even every evening family far farm father festival few field file find first form friend full"
    " garden gate gently give glad good grain great half happy hard hear help here high home hope "
    "hot house however husband"
    " idea important indeed just keep kind know land large last late least letter line little local "
    "long lucky machine many"
    " market matter maybe meeting message milk minute moment morning mother much near neighbour "
    "never next nice night nobody"
    " noon normal nothing notice now number off office officer often old once only other our over "
    "own paper part past pay"
    " people phone place plain plan pocket police poor post problem proper public quick quiet rain "
    "ready real reason receipt"
    " repeat rice road room rule sad safe same school season second see seem send serious shop "
    "short simple sister slow"
    " small someone soon sorry still street strong student sure surprise table tea teacher tell "
    "thing think though time"
    " tired today together told tomorrow total trouble true trust try uncle under until urgent "
    "useful usual very visit wait"
    " warm water week welcome well wife window winter wish with without woman word work worker "
    "world worry wrong year young"
    " yesterday yet you your",
    gap=" ",
)

_BEFORE_NAME = _listed(
    "I am|I am|my name is|name:|this is|it is|please call|kindly speak to|the account of|the holder "
    "is|our client|for|"
    "I write for|customer|the customer|account holder|the undersigned|myself|here is|they call me|people say|ask for|"
    "my son|my mother|our member|the owner is|signed by|sent by|with regards,|yours,|the card of|"
    "the loan of|one|Mr|Mrs|"
    "to help|I am called|known as|who else but|a person called|the passbook of|in the name of|belonging to"
)
_BETWEEN = _listed(
    "from|from|of|in|at|near|living in|who lives in|who stays in|staying at|a resident of|based in|"
    "with home in|of town|"
    "my town is|town:|city|branch|the branch of|, |and the town is|and I live at|who comes from|born in|posted to|"
    "whose house is in|with account in|writing out of|now in|since long in|travelling to"
)
_BEFORE_TOWN = _listed(
    "from|in|at|near|here in|out of|my town is|the town is|town:|we of|branch|at the branch of|I live in|home is|"
    "the account in|over in|people of|your office in|greetings out of|calling from|I sit in|we stay at"
)
_BETWEEN_BACK = _listed(
    "I am|my name is|name:|writes|there is|they know me as|they call me|the holder is|the customer "
    "is|ask for|this is|"
    "it is|, |and I am called|lives|stays|is the home of|belongs to|speaks|has a customer|and the name is|you know"
)
_AFTER = _listed("||||||since long|with you|these days|as you know|again|and family|for years|this side|if you please")

_PRODUCT_BEFORE = _listed("my|my|the|the|this|that|our|her|his|a|your|one")
_LATER = _listed(
    "||||||{day}|since {day}|for {count} days|again|please|at home|this month|with your bank|of mine|today|at once|"
    "of ours|by {day}|in {count} weeks|as I said|from now|here"
)
_ASK_LEAD = _listed(
    "||||I see that|I find that|the paper says that|my son says that|sadly|now|sir,|madam,|once "
    "more|look,|I am told that|"
    "as I feared,|it is true that|I think|since {day}|yesterday|please note that|nobody knows why|tell me why"
)
_STATES = {
    "blocked": "is blocked|was blocked|has been blocked|blocked|is locked|was locked|does not work|stopped working|"
    "is not working|is frozen|remains blocked|seems blocked|became blocked|cannot be used|is blocked by someone",
    "refund": "needs a refund|has a refund due|waits for refund|was debited twice|was debited by mistake|"
    "lost money, give it back|shows no refund|should be refunded|was cut by mistake",
    "statement": "has no statement|needs a statement|came without a statement|statement is missing|"
    "statement did not come|statement must be printed|statement is wanted|statement never came",
    "close": "should be closed|must be closed|is to be closed|has to close|be closed|needs closing|"
    "is not needed, close it|"
    "must come to a close|can be shut|should end",
    "open": "should be opened|is to be opened|must be opened for us|be opened|is wanted, a new one|needs opening|"
    "is what I apply for|would be new for me",
    "fee": "has a fee|has charges|shows a fee|came with a fee|fee is too high|fee is not clear|charges are high|"
    "fee was a shock|charge is wrong|has one more fee",
}
_NOUNS = {
    "refund": "refund|the refund|a refund|my refund|refund of money|money back|any refund",
    "statement": "statement|the statement|a statement|statements|a printed statement|no statement|new statement",
    "fee": "fee|the fee|a fee|fees|charges|a charge|this charge|these charges|such a fee",
}
_NOUN_LEAD = _listed(
    "I want|I need|I ask for|what about|I wait for|where did you put|when do I see|there was|kindly "
    "see|tell me about|"
    "I worry about|we talked of|nobody gave|I did not get|please check|it is about|my question is "
    "on|I have seen|no word on|"
    "could you look at|somebody promised|I write about|we are due"
)
_VERBS = {
    "close": "close|close|shut|close down|end|be done with|finally close",
    "open": "open|open|apply for|start|get|take|begin|newly open",
    "blocked": "unblock|unlock|free|release",
}
_VERB_LEAD = _listed(
    "I want to|I wish to|we plan to|please|kindly|help me|how to|can I|may I|let me|I came to|my "
    "wife wants to|we decided to|"
    "the idea is to|my father asks to|it is good to|I hope to|is there a way to|they told me to|I "
    "would love to|time to|"
    "possible to|we have agreed to|our wish: to"
)
_MONEY_LEAD = _listed(
    "it is|the amount is|amount|sum of|about|some|a total of|all of|exactly|I count|we mean|nearly|"
    "there are|the slip says|"
    "the book shows|you see|it shows|involved is|please look at|the matter of|for|in all|my loss is|"
    "the value:|they took"
)
_MONEY_LATER = _listed(
    "||||is meant|in question|for this|as on the slip|is a lot|only|in all|this time|was it|on {day}|by now"
)


def stray_words(rng: random.Random, low: int, high: int) -> str:
    """Some words that mean nothing here, one in eight of them made up."""
    count = rng.randint(low, high)
    return " ".join(made_word(rng, 1, 3).lower() if rng.random() < 0.12 else rng.choice(_STRAY) for _ in range(count))


def _sentence(rng: random.Random, *pieces: str) -> str:
    words = [piece for piece in pieces if piece]
    if rng.random() < 0.3:
        words.insert(rng.randint(0, len(words)), stray_words(rng, 1, 4))
    text = " ".join(words).replace(" ,", ",")
    if not text.startswith("{"):
        text = text[0].upper() + text[1:]
    return text + rng.choice((".", ".", ".", "!", "?", ";", ","))


def who(rng: random.Random) -> str:
    """A sentence with {name} and {town}."""
    if rng.random() < 0.55:
        lead = rng.choice(_BEFORE_NAME) if rng.random() < 0.85 else ""
        return _sentence(rng, lead, "{name}", rng.choice(_BETWEEN), "{town}", rng.choice(_AFTER))
    return _sentence(rng, rng.choice(_BEFORE_TOWN), "{town}", rng.choice(_BETWEEN_BACK), "{name}", rng.choice(_AFTER))


def ask(rng: random.Random, issue: str) -> str:
    """A sentence with {product} that asks for `issue`."""
    product = rng.choice(_PRODUCT_BEFORE) + " {product}"
    later = rng.choice(_LATER)
    if issue in _NOUNS and rng.random() < 0.6:
        noun = rng.choice(_NOUNS[issue].split("|"))
        if rng.random() < 0.2:
            return _sentence(rng, rng.choice(_NOUN_LEAD), product, noun.split(" ")[-1], later)
        return _sentence(
            rng, rng.choice(_NOUN_LEAD), noun, rng.choice(("of", "for", "on", "from", "to")), product, later
        )
    if issue in _VERBS and rng.random() < 0.6:
        return _sentence(rng, rng.choice(_VERB_LEAD), rng.choice(_VERBS[issue].split("|")), product, later)
    return _sentence(rng, rng.choice(_ASK_LEAD), product, rng.choice(_STATES[issue].split("|")), later)


def money(rng: random.Random) -> str:
    """A sentence with {amount}."""
    amount = rng.choice(("Rs {amount}", "Rs {amount}", "{amount} rupees", "Rupees {amount}", "these {amount} rupees"))
    return _sentence(rng, rng.choice(_MONEY_LEAD), amount, rng.choice(_MONEY_LATER))
