"""Chat templates as strangers' programs: rendered in Jinja's sandbox, with limits, and the same text every time.

Limits: text that a template writes, the size of strings it multiplies, and the numbers it counts through with `range`.
Not limited: time spent in loops nested over the letters of long messages, and padding filters such as `center`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Templates ask for today's date (Llama 3.1 and others). The same rows must give the same tokens tomorrow, so that a run
# can be resumed; this is the date those templates write themselves where there is no clock.
FIXED_DATE = datetime.datetime(2024, 7, 26)
_FREE_CHARACTERS = 4_000_000
_CHARACTERS_PER_INPUT = 20
_COUNTED_NUMBERS = 2_000_000


class TemplateFault(Exception):
    """A template refused these messages or broke a limit. Callers turn it into a DataError with file and line."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: wraps what a template marks as the model's words in two marks.

    The marks go through filters and assignments like any text and are taken out by `take_marks`.
    """

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by Jinja at the tag; returns the call that wraps the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{MARK_START}{caller()}{MARK_END}"


MARK_START = "\ue0f0\ue0f1\ue0f0"  # private use area: no language writes these
MARK_END = "\ue0f0\ue0f2\ue0f0"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if operator == "**" or not all(isinstance(size, int | float) for size in sizes):
            raise TemplateFault(f"the template uses the operator {operator} on {type(left).__name__}")
        if abs(sizes[0] * sizes[1]) > _FREE_CHARACTERS:
            raise TemplateFault("the template multiplies to more than 4 million")
        return super().call_binop(context, operator, left, right)


def _budgeted_range() -> Callable[..., range]:
    """`range` for one rendering; Jinja's own limits a single call, which loops inside loops escape."""
    left = _COUNTED_NUMBERS

    def counted(*arguments: int) -> range:
        nonlocal left
        numbers = range(*arguments)
        left -= len(numbers)
        if left < 0:
            raise TemplateFault(f"the template counts through more than {_COUNTED_NUMBERS} numbers")
        return numbers

    return counted


def _raise_exception(message: str) -> None:
    raise TemplateFault(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As Hugging Face has it: Jinja's own escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(format: str) -> str:
    return FIXED_DATE.strftime(format)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=16)
def _compiled(text: str) -> Template:
    return _environment().from_string(text)


def render_template(text: str, variables: Mapping[str, object], input_characters: int) -> str:
    """The template's text, with marks around `{% generation %}` blocks. Raises TemplateFault with the reason."""
    limit = _FREE_CHARACTERS + _CHARACTERS_PER_INPUT * input_characters
    pieces: list[str] = []
    written = 0
    try:
        for piece in _compiled(text).generate(range=_budgeted_range(), **variables):
            written += len(piece)
            if written > limit:
                raise TemplateFault(f"the template writes more than {limit} characters")
            pieces.append(piece)
    except TemplateError as error:
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        # A template is a program: what it does to a row it was not made for surfaces as any of these.
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    return "".join(pieces)


def take_marks(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without marks and the character spans that stood between them."""
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = 0
    for index, part in enumerate(marked.split(MARK_START)):
        inside, found, outside = part.partition(MARK_END) if index else ("", "", part)
        if index and not found:
            raise TemplateFault("a {% generation %} block is cut or nested")
        if inside:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), tuple(spans)
