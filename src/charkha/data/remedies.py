"""What to do about each class of problem or warning."""

from __future__ import annotations

from dataclasses import replace

from charkha.errors import Problem

_FIX = "`charkha data prepare FILE -o OUT --fix` leaves such rows out and lists them"
REMEDIES: dict[str, str] = {
    "broken JSON": "correct the line; a tool that writes JSON writes it right",
    "repeated key": "keep one of the two; readers disagree on which counts",
    "not valid UTF-8": "save the file as UTF-8",
    "NUL byte": "export the file again as text",
    "broken CSV": "close the quote, or export the table again",
    "wrong number of cells": "quote cells that hold the delimiter",
    "not an object": "write each row as an object with named columns",
    "missing field": "fill the field, or remove the row",
    "missing answer": f"write the answer, or remove the row; {_FIX}",
    "missing prompt": f"write the prompt, or remove the row; {_FIX}",
    "empty text": f"remove the row; {_FIX}",
    "no messages": f"remove the row; {_FIX}",
    "no assistant turn": f"add the answer, or remove the row; {_FIX}",
    "only a system turn": f"add a question and an answer, or remove the row; {_FIX}",
    "no user turn": "add what was asked, or use format text",
    "no answer at the end": "remove what follows the last answer; `--fix` of `charkha data prepare` does it",
    "wrong order": "one turn of each side in turn, system first; join what one side wrote in a row",
    "unknown role": "rename the role: system, user, assistant or tool",
    "wrong type": "write the value in the type that is asked for",
    "wrong value": "write one of the values that are asked for",
    "half a character": "export the text again as UTF-8; half of a pair of surrogates was lost",
    "broken tool call": "write the call as {name, arguments} with arguments that are a JSON object",
    "no preference": "give two different answers, or remove the row",
    "control character": "`charkha data prepare FILE -o OUT --fix` takes them out",
    "template marker": "nothing if it is meant: it is read as text, never as a special token; else remove it",
    "placeholder": "fill it in, or remove the row: the model would learn to write it",
    "HTML": "export the text without markup, unless the model is to write HTML",
    "very long": "cut the text into rows, or set data.overlong",
    "mixed scripts": "look at the word: letters of two scripts that look alike are often a trick or a bad scan",
    "garbled text": "the text was decoded wrongly before; export it again as UTF-8",
    "repeated turn": "check the export: the same words were written twice",
    "echo": "check the row: the answer only says what was asked",
}


def with_remedy(problem: Problem) -> Problem:
    """The problem with what to do about its class, unless it says so itself."""
    if problem.remedy is not None:
        return problem
    return replace(problem, remedy=REMEDIES.get(problem.reason.split(":", 1)[0]))
