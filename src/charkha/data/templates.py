"""Which chat template is used and where it came from.

Order under `template: auto`: the model folder's own (chat_template.jinja, tokenizer_config.json, chat_template.json),
else the built-in plain one, so that conversations train on a base model too. Built-in families, by name:

- `chatml`    <|im_start|>role / text <|im_end|>
- `llama-3`   <|start_header_id|>role<|end_header_id|> / text <|eot_id|>
- `alpaca`    ### Instruction: / ### Response: and the end token
- `plain`     ### User: / ### Assistant: and the end token
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from charkha.data.model_files import read_model_json, special_token_text
from charkha.data.template_families import FAMILY_TEXTS
from charkha.errors import EnvironmentProblem, UsageError

FAMILIES = tuple(FAMILY_TEXTS)
_ALIASES = {"llama3": "llama-3", "llama-3.1": "llama-3", "im_start": "chatml"}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template. `source` says where it came from; the tokens are None where the tokenizer's apply."""

    source: str
    text: str
    bos_token: str | None = None
    eos_token: str | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether it was chosen because the tokenizer has none: worth telling the user."""
        return self.source.startswith("built-in plain (")


def load_template(model_dir: Path, template: str = "auto") -> ChatTemplate:
    """The template asked for: `auto`, a family's name, or the path of a Jinja file.

    Raises UsageError for a name that is neither, EnvironmentProblem for a damaged model folder.
    """
    bos, eos = special_token_text(model_dir, "bos_token"), special_token_text(model_dir, "eos_token")
    if template != "auto":
        source, text = _named(template)
    else:
        source, text = _own(model_dir) or (
            "built-in plain (the tokenizer has no chat template)",
            FAMILY_TEXTS["plain"],
        )
    return ChatTemplate(source, text, bos, eos)


def _named(template: str) -> tuple[str, str]:
    family = _ALIASES.get(template.lower(), template.lower())
    if family in FAMILIES:
        return f"built-in {family}", FAMILY_TEXTS[family]
    path = Path(template)
    if not path.is_file():
        remedy = f"name a Jinja file or one of auto, {', '.join(FAMILIES)}"
        raise UsageError(f"data.template: {template!r} is neither a file nor a built-in template", remedy=remedy)
    return str(path), _read_text(path)


def _own(model_dir: Path) -> tuple[str, str] | None:
    """(source, text) of the model folder's template, or None."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return str(path), _read_text(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        text = _default_of(read_model_json(model_dir, name).get("chat_template"))
        if text:
            return str(model_dir / name), text
    return None


def _default_of(value: object) -> str | None:
    """A template is a string, or a list of {name, template} of which "default" is taken, else the only one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    text = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return text if isinstance(text, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentProblem(f"the template cannot be read: {error}", where=str(path)) from error
