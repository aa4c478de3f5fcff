"""Reads charkha.yaml: aliases of other tools, `--set`, and every problem at once with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from charkha import yaml_text
from charkha.carried_out import unsupported
from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem

# Spellings of Axolotl, LLaMA-Factory, Unsloth, TRL and PEFT -> ours. A key that stands at the top of the file, as it
# does in those tools, is moved into its section.
ALIASES: dict[str, str] = {
    "base_model": "model.base",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "model_id": "model.base",
    "attn_implementation": "model.attention",
    "torch_dtype": "model.dtype",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "finetuning_type": "adapter.method",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "val_set_size": "data.eval",
    "chat_template": "data.template",
    "sample_packing": "data.packing",
    "dataset_num_proc": "data.num_proc",
    "dataset_processes": "data.num_proc",
    "preprocessing_num_workers": "data.num_proc",
    "lr": "training.learning_rate",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "lr_scheduler": "training.lr_scheduler_type",
    "optim": "training.optimizer",
    "global_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "output_dir": "output",
}
_FLAG_ALIASES = {
    "load_in_4bit": ("model.quantization", "nf4"),
    "load_in_8bit": ("model.quantization", "int8"),
}


@dataclass
class _Reading:
    """What is gathered while one file is read."""

    lines: dict[str, int] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)
    overridden: set[str] = field(default_factory=set)  # keys whose value came from --set, not from a line

    def problem(self, key: str, reason: str, remedy: str | None = None) -> None:
        self.problems.append(ConfigProblem(key, reason, self._line_of(key), remedy))

    def _line_of(self, key: str) -> int | None:
        while key and key.partition("[")[0] not in self.overridden:
            if key in self.lines:
                return self.lines[key]
            key = key.rpartition(".")[0]
        return None


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, where it came from, and the raw keys that the user set (dotted), aliases already resolved."""

    config: Config
    path: Path
    keys_set: frozenset[str]

    @property
    def folder(self) -> Path:
        """Data paths in the file are relative to this folder."""
        return self.path.parent


def load_config(path: Path, overrides: list[str] | None = None, *, to_plan: bool = False) -> LoadedConfig:
    """The config in `path` with `section.key=value` overrides applied.

    `to_plan` lets values pass that training does not carry out yet: a plan can tell what they would need.
    Raises ConfigError listing every problem with line, dotted key and, for a misspelt key, the nearest valid one.
    """
    reading = _Reading()
    raw = _resolve_aliases(_read_yaml(path, reading), reading)
    _merge(raw, _resolve_aliases(_parse_overrides(overrides or [], reading), reading), reading)
    _expand_qlora(raw, reading)
    config = _validate(raw, reading)
    if config is not None and not reading.problems and not to_plan:
        for key, value, works in unsupported(config):
            reading.problem(key, f"{value!r} is not carried out by this version", f"what works: {works}")
    if config is None or reading.problems:
        raise ConfigError(str(path), _in_order(reading.problems))
    return LoadedConfig(config, path, frozenset(_dotted_keys(raw)))


def dump_config(config: Config) -> str:
    """The config as YAML text that `load_config` reads back to an equal config."""
    return yaml_text.dump(config.model_dump(mode="json"))


def _read_yaml(path: Path, reading: _Reading) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), [ConfigProblem("(file)", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [ConfigProblem("(file)", f"is not UTF-8 at byte {error.start}")]) from None
    try:
        parsed = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        raise ConfigError(str(path), [ConfigProblem("(YAML)", error.reason, error.line)]) from None
    if parsed.value is None:
        raise ConfigError(str(path), [ConfigProblem("(file)", "is empty", remedy="`charkha init` writes one")])
    if not isinstance(parsed.value, dict):
        raise ConfigError(str(path), [ConfigProblem("(file)", "holds no `key: value` lines", 1)])
    reading.lines = parsed.lines
    for repeated in parsed.repeated:
        reason = f"is given twice, first on line {repeated.first_line}"
        reading.problems.append(ConfigProblem(repeated.key, reason, repeated.line, "keep one of them"))
    for name in parsed.value:
        if not isinstance(name, str):
            reading.problem(str(name), "is not a known key: keys are words")
    return {name: value for name, value in parsed.value.items() if isinstance(name, str)}


def _parse_overrides(overrides: list[str], reading: _Reading) -> dict[str, Any]:
    """`section.key=value` texts as nested mappings, like a second, shorter file."""
    wishes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            reading.overridden.add(override)
            reading.problem(override, "is not of the form section.key=value")
            continue
        try:
            value = yaml_text.parse(text).value
        except yaml_text.YamlError as error:
            reading.overridden.add(key)
            reading.problem(key, f"the value {text!r} is not YAML: {error.reason}", "quote it")
            continue
        *sections, last = key.split(".")
        target = wishes
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[last] = value
    return wishes


def _merge(raw: dict[str, Any], wishes: dict[str, Any], reading: _Reading, prefix: str = "") -> None:
    """Overrides win over the file, key by key inside mappings."""
    for name, value in wishes.items():
        reading.overridden.add(prefix + name)
        before = raw.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            reading.overridden.discard(prefix + name)
            _merge(before, value, reading, f"{prefix}{name}.")
        elif isinstance(value, dict) and before is not None and prefix == "" and name in _SECTIONS:
            reading.problem(name, f"{before!r} in the file is not a section")
        else:
            raw[name] = value


def _resolve_aliases(raw: dict[str, Any], reading: _Reading) -> dict[str, Any]:
    """Other tools' spellings moved to ours, wherever they stand; both spellings at once is a problem."""
    resolved: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) and name in _SECTIONS else value for name, value in raw.items()
    }
    for place, key, value in list(_alias_places(raw)):
        dotted = f"{place}.{key}" if place else key
        _remove(resolved, place, key)
        if key in _FLAG_ALIASES:
            if value is not True:
                if value is not False:
                    reading.problem(dotted, f"{value!r} is not accepted: true or false")
                continue
            target, value = _FLAG_ALIASES[key]
        else:
            target = ALIASES[key]
        _move(resolved, dotted, target, value, reading)
    return resolved


_SECTIONS = frozenset(
    name
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
)


def _alias_places(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    known = {*ALIASES, *_FLAG_ALIASES}
    for name, value in raw.items():
        if name in _SECTIONS and isinstance(value, dict):
            valid = _fields_of(name)
            for key, inner in value.items():
                if key in known and key not in valid:
                    yield name, key, inner
        elif name in known and name not in Config.model_fields:
            yield "", name, value


def _remove(raw: dict[str, Any], place: str, key: str) -> None:
    (raw[place] if place else raw).pop(key)


def _move(raw: dict[str, Any], dotted: str, target: str, value: Any, reading: _Reading) -> None:
    if dotted in reading.lines:
        reading.lines.setdefault(target, reading.lines[dotted])
    section, _, key = target.rpartition(".")
    inside = raw.setdefault(section, {}) if section else raw
    if not isinstance(inside, dict):
        return  # the section itself is wrong and is reported by validation
    if key in inside:
        reading.problem(dotted, f"means {target}, which is given as well", "keep one of them")
        return
    if target == "data.train" and isinstance(value, str):
        value = [value]
    inside[key] = value


def _expand_qlora(raw: dict[str, Any], reading: _Reading) -> None:
    adapter = raw.get("adapter")
    if not isinstance(adapter, dict) or adapter.get("method") != "qlora":
        return
    adapter["method"] = "lora"
    model = raw.setdefault("model", {})
    if isinstance(model, dict) and model.setdefault("quantization", "nf4") not in ("nf4", "fp4"):
        reading.problem(
            "model.quantization",
            f"{model['quantization']!r} does not go with adapter.method qlora, which means lora on an nf4 base",
        )


def _validate(raw: dict[str, Any], reading: _Reading) -> Config | None:
    try:
        return Config.model_validate(_completed(raw))
    except ValidationError as error:
        for key, reason, remedy in _one_per_key(error):
            reading.problem(key, reason, remedy)
        return None


def _completed(raw: dict[str, Any]) -> dict[str, Any]:
    """A section without keys means its defaults, and `data.train: file.jsonl` a list of one."""
    raw = {name: {} if value is None and name in _SECTIONS else value for name, value in raw.items()}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        raw = {**raw, "data": {**data, "train": [data["train"]]}}
    return raw


def _one_per_key(error: ValidationError) -> Iterator[tuple[str, str, str | None]]:
    """One line per key: a union reports each of its members, which a reader cannot use."""
    grouped: dict[str, list[Any]] = {}
    for item in error.errors():
        grouped.setdefault(_dotted(item["loc"]), []).append(item)
    for key, items in grouped.items():
        kind = items[0]["type"]
        if kind == "extra_forbidden":
            yield key, "is not a known key", _nesting(items[0]["loc"][-1]) or _did_you_mean(key)
        elif kind == "missing":
            yield key, "is missing", None
        elif kind == "value_error":
            yield key or "(file)", str(items[0]["ctx"]["error"]), None
        else:
            yield key, f"{items[0]['input']!r} is not accepted: {'; or '.join(_reasons(items))}", None


def _nesting(name: object) -> str | None:
    section, dot, key = str(name).partition(".")
    return f"write `{key}:` on a line of its own, indented below `{section}:`" if dot and section in _SECTIONS else None


def _reasons(items: list[Any]) -> list[str]:
    seen: dict[str, None] = {}
    for item in items:
        if item["type"] == "literal_error":
            text = "one of " + item["ctx"]["expected"].replace(" or ", ", ")
        elif item["type"] == "model_type":
            text = "a section, with its keys indented on the lines below"
        else:
            text = item["msg"][0].lower() + item["msg"][1:]
        seen.setdefault(text)
    return list(seen)


def _dotted(location: tuple[int | str, ...]) -> str:
    """The YAML path of a pydantic location, without the names of union members (`function-...`, `literal[...]`)."""
    parts: list[str] = []
    model: type[BaseModel] | None = Config
    for part in location:
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]" if parts else f"[{part}]"]
        elif model is not None:
            parts.append(part)
            info = model.model_fields.get(part)
            annotation = info.annotation if info else None
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return ".".join(parts)


def _fields_of(section: str) -> set[str]:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return set(annotation.model_fields)


def known_keys() -> list[str]:
    """Every dotted key of the config, sections' keys and top-level values."""
    keys = []
    for name in Config.model_fields:
        keys += [f"{name}.{key}" for key in sorted(_fields_of(name))] if name in _SECTIONS else [name]
    return keys


def _did_you_mean(key: str) -> str | None:
    """The nearest valid key: by spelling in the same section first, then the same name in another section."""
    last = key.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for known in [*known_keys(), *_SECTIONS]:
        by_last.setdefault(known.rpartition(".")[2], []).append(known)
    if last in by_last:
        return f"did you mean {by_last[last][0]}?"
    section = key.partition(".")[0]
    same_section = [known for known in known_keys() if known.startswith(section + ".")]
    for candidates in (same_section, [*known_keys(), *_SECTIONS]):
        names = {known.rpartition(".")[2]: known for known in candidates}
        if match := difflib.get_close_matches(last, names, n=1, cutoff=0.6):
            return f"did you mean {names[match[0]]}?"
    if match := difflib.get_close_matches(last, ALIASES, n=1, cutoff=0.75):
        return f"did you mean {ALIASES[match[0]]}?"
    return None


def _dotted_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    for name, value in raw.items():
        if name in _SECTIONS and isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value)
        else:
            yield name


def _in_order(problems: list[ConfigProblem]) -> list[ConfigProblem]:
    return sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
