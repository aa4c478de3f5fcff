"""Whether the names in a config's adapter section are those of the base, by its config.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from charkha.config import AdapterSection
from charkha.errors import ConfigError, ConfigProblem
from charkha.plan.architecture import Architecture
from charkha.plan.weights import EMBEDDINGS, HEADS

_LORA = ("lora", "dora", "rslora")


def require_names(adapter: AdapterSection, architecture: Architecture) -> None:
    """Raises ConfigError for what adapts nothing of this base, which training would refuse too.

    Not covered: modules that only some bases have and no shape tells of (a mixture's packed experts).
    """
    if adapter.method in ("full", "prompt_tuning"):
        return
    problems = [
        ConfigProblem(f"adapter.{key}", reason, remedy=remedy) for key, reason, remedy in _wrong(adapter, architecture)
    ]
    if problems:
        raise ConfigError("config", problems)


def _wrong(adapter: AdapterSection, architecture: Architecture) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong, what to do)."""
    linear = [layer.name for layer in architecture.linears]
    ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if not _adapts(adapter.target_modules, architecture):
        broken = _broken(adapter.target_modules) if isinstance(adapter.target_modules, str) else None
        reason = f"is no regular expression: {broken}" if broken else "is no linear layer of this base"
        yield "target_modules", f"{adapter.target_modules!r} {reason}", f"all-linear, or some of {ends}"
    known = [*linear, *HEADS, *EMBEDDINGS, *(norm.name for norm in (*architecture.norms, architecture.final_norm))]
    known += [norm.name for norm in architecture.query_key_norms]
    for wanted in adapter.modules_to_save:
        if not any(_is_end(name, wanted.rpartition(".")[2]) for name in known):
            yield "modules_to_save", f"{wanted!r} is no module of this base", "a name such as lm_head or embed_tokens"
    if adapter.method not in _LORA:
        return
    beyond = [number for number in adapter.layers_to_transform or () if number >= architecture.layers]
    if beyond:
        reason = f"there is no block {beyond[0]} in this model of {architecture.layers}"
        yield "layers_to_transform", reason, f"0 to {architecture.layers - 1}"
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if broken := _broken(pattern):
                yield key, f"{pattern!r} is no regular expression: {broken}", "a name such as down_proj"


def _adapts(targets: str | list[str], architecture: Architecture) -> bool:
    """Whether anything gets an adapter, by PEFT's rules: a string is a pattern of whole names, a list has ends."""
    names = [linear.name for linear in architecture.linears]
    if isinstance(targets, str):
        whole = (
            f"{architecture.layers_path}.{number}.{name}" for number in range(architecture.layers) for name in names
        )
        return targets == "all-linear" or (
            _broken(targets) is None and any(re.fullmatch(targets, one) for one in whole)
        )
    names += [*HEADS, *EMBEDDINGS]
    packed = architecture.experts is not None and bool(targets)
    return packed or any(_is_end(name, wanted) for name in names for wanted in targets)


def _broken(pattern: str) -> str | None:
    """Why it is no regular expression; None where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _is_end(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)
