"""Chat templates as strangers' programs: rendered in Jinja's sandbox, with limits, and the same text every time.

Limits of one rendering: text written (4 million characters and 20 for each of the input), the size of any string made,
rounds of loops and calls (300,000 and 20 for each character of the input), numbers of `range`, and 20 seconds. Time is
looked at in every loop, call and joining of strings, which is all that a template can repeat.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Templates ask for today's date (Llama 3.1 and others). The same rows must give the same tokens tomorrow, so that a run
# can be resumed; this is the date those templates write themselves where there is no clock.
FIXED_DATE = datetime.datetime(2024, 7, 26)
_FREE_CHARACTERS = 4_000_000
_CHARACTERS_PER_INPUT = 20
_COUNTED_NUMBERS = 2_000_000
_SECONDS = 20
_ROUNDS = 300_000


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


class _Budget:
    """What is left to one rendering."""

    def __init__(self, input_characters: int) -> None:
        self.rounds = _ROUNDS + _CHARACTERS_PER_INPUT * input_characters
        self.characters = _FREE_CHARACTERS + _CHARACTERS_PER_INPUT * input_characters
        self.numbers = _COUNTED_NUMBERS
        self._deadline = time.monotonic() + _SECONDS

    def round(self) -> None:
        """One more round of a loop, or one more call. Raises TemplateFault when there were too many."""
        self.rounds -= 1
        if self.rounds < 0:
            raise TemplateFault("the template goes round and round: too many rounds of loops and calls")
        if self.rounds % 64 == 0 and time.monotonic() > self._deadline:
            raise TemplateFault(f"the template takes more than {_SECONDS} seconds for one conversation")

    def check(self, text: object) -> None:
        """Raises TemplateFault for a string that is too long."""
        if isinstance(text, str) and len(text) > self.characters:
            raise TemplateFault(f"the template makes a string of more than {self.characters} characters")

    def range(self, *arguments: int) -> range:
        """`range`; Jinja's own limits a single call, which loops inside loops escape."""
        numbers = range(*arguments)
        self.numbers -= len(numbers)
        if self.numbers < 0:
            raise TemplateFault(f"the template counts through more than {_COUNTED_NUMBERS} numbers")
        return numbers


_budget: ContextVar[_Budget] = ContextVar("budget")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each counted."""
    budget = _budget.get()
    for item in items:
        budget.round()
        yield item


def _joined(*parts: object) -> str:
    """What `~` does, with a limit: doubling a string thirty times would fill the memory."""
    budget = _budget.get()
    budget.round()
    text = "".join(map(str, parts))
    budget.check(text)
    return text


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with every loop and every `~` counted."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            counted = nodes.EnvironmentAttribute("counted", lineno=loop.lineno)
            loop.iter = nodes.Call(counted, [loop.iter], [], None, None, lineno=loop.lineno)
        return _with_joining_counted(tree)

    counted = staticmethod(_counted)
    joined = staticmethod(_joined)

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """A call, counted; a number of millions asks a string's method to pad."""
        budget = _budget.get()
        budget.round()
        if any(isinstance(value, int) and abs(value) > budget.characters for value in arguments):
            owner = getattr(function, "__self__", None)
            if isinstance(owner, str):
                raise TemplateFault(f"the template asks for a string of {max(arguments)} characters")
        result = super().call(context, function, *arguments, **named)
        budget.check(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            result = super().call_binop(context, operator, left, right)
            _budget.get().check(result)
            return result
        if operator == "%":
            if isinstance(left, str):
                _refuse_padding(left)
            return super().call_binop(context, operator, left, right)
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if operator == "**" or not all(isinstance(size, int | float) for size in sizes):
            raise TemplateFault(f"the template uses the operator {operator} on {type(left).__name__}")
        if abs(sizes[0] * sizes[1]) > _FREE_CHARACTERS:
            raise TemplateFault("the template multiplies to more than 4 million")
        return super().call_binop(context, operator, left, right)


def _with_joining_counted(node: nodes.Template) -> nodes.Template:
    """Each `a ~ b` as a call of `joined`."""

    class Counting(NodeTransformer):
        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            joined = nodes.EnvironmentAttribute("joined", lineno=node.lineno)
            return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)

    changed = Counting().visit(node)
    assert isinstance(changed, nodes.Template)
    return changed


def _refuse_padding(text: str) -> None:
    if re.search(r"\d{5}|\*", text):
        raise TemplateFault("the template pads a string to tens of thousands of characters")


def _center(value: str, width: int = 80) -> str:
    if width > _FREE_CHARACTERS:
        raise TemplateFault(f"the template pads a string to {width} characters")
    return str(value).center(width)


def _replace(value: str, old: str, new: str, count: int | None = None) -> str:
    """As Jinja's, with the size looked at before it is made."""
    text, found = str(value), str(value).count(str(old))
    if len(text) + found * len(str(new)) > _budget.get().characters:
        raise TemplateFault("the template replaces to more characters than are allowed")
    return text.replace(str(old), str(new), -1 if count is None else count)


def _format(value: str, *arguments: Any, **named: Any) -> str:
    _refuse_padding(str(value))
    return str(value) % (named or arguments)


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
    environment.filters |= {"tojson": _to_json, "center": _center, "replace": _replace, "format": _format}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=16)
def _compiled(text: str) -> Template:
    return _environment().from_string(text)


def render_template(text: str, variables: Mapping[str, object], input_characters: int) -> str:
    """The template's text, with marks around `{% generation %}` blocks. Raises TemplateFault with the reason."""
    budget = _Budget(input_characters)
    pieces: list[str] = []
    written = 0
    token = _budget.set(budget)
    try:
        for piece in _compiled(text).generate(range=budget.range, **variables):
            written += len(piece)
            if written > budget.characters:
                raise TemplateFault(f"the template writes more than {budget.characters} characters")
            pieces.append(piece)
    except TemplateError as error:
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        # A template is a program: what it does to a row it was not made for surfaces as any of these.
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    finally:
        _budget.reset(token)
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
