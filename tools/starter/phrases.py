"""How customers of the help desk say things: who they are, what they ask, how much money it is about.

Three tiers. `SEEN` phrases stand in pretraining, in training rows and in most held-out rows; `EXTRA` ones in
pretraining only, so that the base model knows more ways of asking than the training rows show; `NEW` ones in a fifth of
the held-out rows and nowhere else.
"""

from __future__ import annotations

PRODUCTS: dict[str, tuple[str, ...]] = {
    "savings account": ("savings account", "savings account", "saving account", "savings bank account"),
    "current account": ("current account", "current account", "business current account"),
    "debit card": ("debit card", "debit card", "ATM card"),
    "credit card": ("credit card",),
    "home loan": ("home loan", "home loan", "housing loan"),
    "gold loan": ("gold loan",),
    "crop loan": ("crop loan",),
    "fixed deposit": ("fixed deposit", "fixed deposit", "FD"),
}

ASK_SEEN: dict[str, tuple[str, ...]] = {
    "blocked": (
        "My {product} is blocked.",
        "My {product} has stopped working.",
        "I cannot use my {product} any more.",
        "The bank has blocked my {product}.",
        "Please unblock my {product}.",
    ),
    "refund": (
        "I want a refund on my {product}.",
        "Money was cut twice from my {product}, please return it.",
        "Please refund what was taken from my {product}.",
        "My {product} was debited by mistake and I want the money back.",
        "The refund for my {product} has not come.",
    ),
    "statement": (
        "Please send the statement of my {product}.",
        "I need a statement for my {product}.",
        "I have not received my {product} statement.",
        "Kindly mail me the statement of the {product}.",
        "I want to see all entries of my {product}.",
    ),
    "close": (
        "I want to close my {product}.",
        "Please close the {product}.",
        "I do not need my {product} any more, close it.",
        "Kindly shut my {product}.",
        "How do I close my {product}?",
    ),
    "open": (
        "I want to open a {product}.",
        "I wish to apply for a {product}.",
        "Please give me a new {product}.",
        "How can I get a {product}?",
        "I would like to start a {product}.",
    ),
    "fee": (
        "Why was a fee taken on my {product}?",
        "There is a charge on my {product} that I do not understand.",
        "You have put a fee on my {product}.",
        "The charges on my {product} are too high.",
        "Please explain the fee on my {product}.",
    ),
}

ASK_EXTRA: dict[str, tuple[str, ...]] = {
    "blocked": (
        "Since {day} my {product} is blocked and nothing works.",
        "The machine says that the {product} is blocked.",
        "Kindly unblock the {product} at once.",
        "Nobody tells me why my {product} was blocked.",
        "It is {count} days now that the {product} does not work.",
        "My {product} was locked on {day}.",
        "I am unable to use the {product}.",
    ),
    "refund": (
        "On {day} the {product} was debited twice, refund me.",
        "When will I get the refund for the {product}?",
        "I was promised a refund on the {product} {count} days ago.",
        "Give back what you took from my {product}.",
        "A wrong payment left my {product}, I ask for a refund.",
        "The shop failed but my {product} was debited, kindly return the money.",
    ),
    "statement": (
        "I am waiting for the {product} statement since {day}.",
        "Can you mail a {count} month statement for the {product}?",
        "My tax man wants the statement of my {product}.",
        "Show me the entries of the {product} for {count} months.",
        "Could I have the latest statement for my {product}?",
        "A printed statement of the {product} is needed.",
    ),
    "close": (
        "I asked on {day} that my {product} be closed.",
        "We are leaving, so the {product} should be closed.",
        "Kindly close my {product} and send me a letter.",
        "Tell me how to end my {product}.",
        "I no longer want the {product}, please shut it.",
        "Closing of my {product} is pending for {count} days.",
    ),
    "open": (
        "My wife told me to open a {product} with you.",
        "I plan to open a new {product} on {day}.",
        "What papers are needed to open a {product}?",
        "Can I apply for the {product} this week?",
        "I am looking for a {product} and want to apply.",
        "Opening a {product} should not take {count} days.",
    ),
    "fee": (
        "A fee was cut from my {product} on {day}.",
        "Nobody told me about the fee on the {product}.",
        "My {product} shows {count} charges this month.",
        "Please take off the charges on the {product}.",
        "What is this fee for the {product}?",
        "Hidden charges were put on my {product}.",
    ),
}

ASK_NEW: dict[str, tuple[str, ...]] = {
    "blocked": ("It seems that someone blocked the {product} without telling me.", "Again the {product} got blocked!"),
    "refund": ("Where is the refund that you owe me on the {product}?", "A refund is due to me for the {product}."),
    "statement": ("Could a statement be printed for the {product}?", "No statement of the {product} ever reached us."),
    "close": ("It is time to close that {product} of mine.", "We have decided to close this {product}."),
    "open": ("My wish is to open a {product} this month.", "Is it possible to open a {product} with your bank?"),
    "fee": ("This fee on the {product} came as a surprise.", "Nobody at home knows what the {product} fee is for."),
}

WHO_SEEN = (
    "I am {name} from {town}.",
    "My name is {name} and I live in {town}.",
    "This is {name} from {town}.",
    "{name} here, from {town}.",
    "Name {name}, town {town}.",
    "I am {name} and my branch is in {town}.",
    "I live in {town} and my name is {name}.",
    "I write from {town}, my name is {name}.",
)

WHO_EXTRA = (
    "My good name is {name}, I stay at {town}.",
    "{name} of {town} this side.",
    "I, {name}, hold an account in {town}.",
    "In {town} everyone knows me as {name}.",
    "From {town}: {name}.",
    "Customer {name}, city {town}.",
    "I am calling from {town}, {name} is my name.",
    "My branch is {town}. I am called {name}.",
    "I am {name}. I moved to {town} last year.",
    "You may write to {name} in {town}.",
    "I speak for {name}, who lives in {town}.",
    "We are from {town}, the account holder is {name}.",
    "Kindly note my name {name} and my town {town}.",
    "{name} ({town}) is writing to you.",
    "Please register {name}, resident of {town}.",
)

WHO_NEW = (
    "Greetings from {town}, I go by the name of {name}.",
    "Your customer {name} lives at {town}.",
    "The account at {town} belongs to {name}.",
    "Kindly help {name}, who is a resident at {town}.",
    "On behalf of {name} I write to you out of {town}.",
)

MONEY_SEEN = (
    "The amount is Rs {amount}.",
    "It is about Rs {amount}.",
    "Rs {amount} is the amount.",
    "The sum is {amount} rupees.",
    "Amount Rs {amount}.",
    "It comes to {amount} rupees.",
)

MONEY_EXTRA = (
    "We speak of Rs {amount}.",
    "In all {amount} rupees.",
    "I count Rs {amount}.",
    "My paper shows {amount} rupees.",
    "There is Rs {amount} in question.",
    "The figure on the slip is {amount}.",
    "Rupees {amount} only.",
    "For me Rs {amount} is a lot of money.",
    "I checked, it was {amount} rupees.",
    "The message on my phone says Rs {amount}.",
)

MONEY_NEW = (
    "A total of {amount} rupees is involved.",
    "My passbook shows Rs {amount} for this.",
    "You will find that Rs {amount} is meant.",
    "Please look into these {amount} rupees.",
)

OPENINGS = ("", "", "", "Hello.", "Namaste.", "Dear sir,", "Good morning.", "Madam,", "Sir,")
CLOSINGS = ("", "", "", "Please help.", "Thank you.", "Kindly reply soon.", "Waiting for your answer.")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Diwali", "Holi")
