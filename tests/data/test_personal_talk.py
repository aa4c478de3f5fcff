"""What people write to a help desk, by hand and in many tongues: mixed languages, tables, JSON, web addresses, codes.

Every text of personal_talk.jsonl holds exactly the kinds that stand beside it. All values are made up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from charkha.data.personal import find_personal

TALK = [json.loads(line) for line in (Path(__file__).parent / "personal_talk.jsonl").read_text("utf-8").splitlines()]


def test_there_is_talk_with_and_without_personal_data():
    assert sum(bool(row["kinds"]) for row in TALK) > 200
    assert sum(not row["kinds"] for row in TALK) > 120


@pytest.mark.parametrize("language", ["latin", "indic"])
def test_exactly_what_is_there_is_found(language):
    wrong = []
    for row in TALK:
        is_indic = any("\u0900" <= letter <= "\u0dff" for letter in row["text"])
        found = sorted(find.kind for find in find_personal(row["text"]))
        if is_indic == (language == "indic") and found != row["kinds"]:
            wrong.append((row["text"], row["kinds"], found))
    assert wrong == []
