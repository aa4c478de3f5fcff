"""YAML as a config needs it: the scalars of YAML 1.2's core schema, a line for every key, and no way to run code.

`2e-4` and `1e-05` are floats, `010` is ten, `yes`, `on` and `2024-01-01` are strings; a key that stands twice, an alias
(`*name`, which can expand without bound) and a tag that builds an object are problems.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

_SCALARS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows the scalars above and no others."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which either YAML 1.1 or 1.2 would read as something else."""


def _construct_decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.1, which PyYAML's own constructor follows, would read 010 as octal 8 and 1:30 as sexagesimal.
    return int(loader.construct_scalar(node))


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_decimal)


class YamlError(Exception):
    """The text is not YAML that a config may hold. `line` counts from 1; None where it is not known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclass(frozen=True)
class Repeated:
    """A key that stands twice in one mapping: dotted, with both lines."""

    key: str
    first_line: int
    line: int


@dataclass
class Parsed:
    """A document's value (None when it is empty), and where its keys stand (dotted key -> line)."""

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    repeated: list[Repeated] = field(default_factory=list)


def parse(text: str) -> Parsed:
    """The one document in `text`. Raises YamlError for text that is not YAML, and for aliases and foreign tags."""
    parsed = Parsed()
    try:
        _refuse_aliases(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _note_lines(node, "", parsed)
            parsed.value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.problem, error.context) if part)
        raise YamlError(reason, mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace("\n", " ")) from None
    except RecursionError:
        raise YamlError("is nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # `!!int x`, `!!bool x`, `!!timestamp x`
        raise YamlError(f"holds a value that cannot be read: {error}") from None
    return parsed


def dump(value: Any) -> str:
    """YAML text that `parse` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _refuse_aliases(text: str) -> None:
    """A few anchors that repeat each other expand without bound; no config needs them."""
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(
                problem=f"an alias (*{event.anchor}) is not accepted in a config: write the value out",
                problem_mark=mark,
            )


def _note_lines(node: yaml.Node, prefix: str, parsed: Parsed) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        line = key_node.start_mark.line + 1
        if name in first:
            parsed.repeated.append(Repeated(prefix + name, first[name], line))
        first.setdefault(name, line)
        parsed.lines.setdefault(prefix + name, line)
        _note_lines(value_node, f"{prefix}{name}.", parsed)
