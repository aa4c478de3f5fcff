"""A model folder's tokenizer, as a thin frozen wrapper over the `tokenizers` library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.data.model_files import SpecialTokens, configured_ids, read_model_json, special_token_text
from charkha.errors import EnvironmentProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FINGERPRINTED = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# GPT-2's trimming leaves spaces outside every token, and a space between prompt and answer must belong to one.
_TRIMMED_OFFSETS = re.compile(r'("trim_offsets"\s*:\s*)true')


@dataclass(frozen=True, eq=False)
class Encoding:
    """Tokens of one text. offsets int64 [tokens, 2] are characters; together they cover the text without gaps.

    Offsets are made when they are asked for: to turn the library's list of pairs into an array takes a third of the
    time of tokenizing, and a conversation only needs the tokens at the ends of its answers.
    """

    ids: NDArray[np.int32]
    made: Any = None  # the library's encoding
    length: int = 0
    known: NDArray[np.int64] | None = None

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Character offsets of each token."""
        return _covering(self.made, self.length) if self.known is None else self.known

    def characters_of(self, token: int) -> tuple[int, int]:
        """Start and stop of one token."""
        place = None if self.made is None else self.made.token_to_chars(token)
        return (int(self.offsets[token, 0]), int(self.offsets[token, 1])) if place is None else place

    def token_at(self, character: int) -> int | None:
        """The first token that the character belongs to; None where the library does not say."""
        token = None if self.made is None else self.made.char_to_token(character)
        return None if token is None else int(token)


@dataclass(frozen=True)
class Tokenizer:
    """Ids are None where the tokenizer has no such token.

    `pad_id` only fills the unused end of a batch row and is never looked at: attention mask and labels leave it out.
    `end_ids` are all tokens that end an answer; the first that a model stops on need not be `eos_id`.
    `special_texts` are the names of the special tokens; `special_pattern` is a regular expression for them together
    with the white space that some swallow.
    """

    special: SpecialTokens
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int
    end_ids: frozenset[int]
    vocab_size: int
    fingerprint: str
    special_texts: frozenset[str]
    special_pattern: str
    notes: tuple[str, ...] = ()
    _backend: Any = field(default=None, repr=False, compare=False)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(ids, character offsets [tokens, 2]) of one text."""
        encoding = self.encode_batch([text], add_special_tokens)[0]
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        """One encoding a text, in their order; the library spreads them over its threads."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [
            Encoding(np.asarray(encoding.ids, dtype=np.int32), encoding, len(text))
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def decode(self, ids: Sequence[int] | NDArray[np.int32], skip_special_tokens: bool = False) -> str:
        """The text of the tokens. Some tokenizers leave out the first space: decode prompt and answer together."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

    def token_id(self, text: str) -> int | None:
        """The id of exactly this token, None if there is none."""
        found = self._backend.token_to_id(text)
        return None if found is None else int(found)

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it."""
        return str(self._backend.id_to_token(int(token)))

    def blind_to_special_tokens(self) -> Tokenizer:
        """The same tokenizer, reading `</s>` in a text as four characters instead of as the end token."""
        return _blind(self)


def _covering(encoding: Any, length: int) -> NDArray[np.int64]:
    """Offsets such that each character belongs to a token; tokens added around the text stand at its two ends."""
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    own = np.flatnonzero(np.asarray(encoding.special_tokens_mask, dtype=np.int8) == 0)
    last = int(own[-1]) + 1 if len(own) else len(offsets)
    offsets[last:] = length
    reached = np.maximum.accumulate(offsets[:, 1])
    offsets[1:, 0] = np.minimum(offsets[1:, 0], reached[:-1])
    return offsets


_BLIND: dict[str, Tokenizer] = {}


def _blind(tokenizer: Tokenizer) -> Tokenizer:
    """A second backend, made once: the switch is a property of the backend, and flipping it would race with threads."""
    from dataclasses import replace

    from tokenizers import Tokenizer as Backend

    if tokenizer.fingerprint not in _BLIND:
        backend = Backend.from_str(tokenizer._backend.to_str())
        backend.encode_special_tokens = True
        _BLIND[tokenizer.fingerprint] = replace(tokenizer, _backend=backend)
    return _BLIND[tokenizer.fingerprint]


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or vocab.json with merges.txt (byte-level BPE).

    Raises EnvironmentProblem where there is neither.
    """
    backend = _load_backend(model_dir)
    backend.no_truncation()  # a saved tokenizer.json may cut and pad on its own
    backend.no_padding()
    texts = {name: _special_text(backend, model_dir, name) for name in ("bos", "eos", "pad", "unk")}
    ids = {name: None if text is None else backend.token_to_id(text) for name, text in texts.items()}
    backend.add_special_tokens(sorted({text for text in texts.values() if text is not None}))
    ends = [token for token in (ids["eos"], *configured_ids(model_dir, "eos_token_id")) if token is not None]
    ends = [token for token in ends if backend.id_to_token(token) is not None]
    pad_id, notes = _filler(ids)
    return Tokenizer(
        special=_special_tokens(backend, texts, ids),
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unk"],
        pad_id=pad_id,
        end_ids=frozenset(ends),
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        fingerprint=_fingerprint(model_dir),
        special_texts=frozenset(token.content for token in _special_tokens_of(backend)),
        special_pattern=_special_pattern(backend),
        notes=notes,
        _backend=backend,
    )


def _load_backend(model_dir: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    path = model_dir / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_str(_TRIMMED_OFFSETS.sub(r"\1false", path.read_text(encoding="utf-8")))
        except Exception as error:
            raise EnvironmentProblem(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    if (model_dir / "vocab.json").is_file() and (model_dir / "merges.txt").is_file():
        return _byte_level_bpe(model_dir)
    raise _no_tokenizer(model_dir)


def _byte_level_bpe(model_dir: Path) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(model_dir / "vocab.json"), str(model_dir / "merges.txt"))
    except Exception as error:
        raise EnvironmentProblem(f"the tokenizer cannot be read: {error}", where=str(model_dir)) from error
    backend = Backend(model)
    prefix = read_model_json(model_dir, "tokenizer_config.json").get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _no_tokenizer(model_dir: Path) -> EnvironmentProblem:
    if not model_dir.is_dir():
        return EnvironmentProblem("the model folder does not exist", where=str(model_dir), remedy="check model.base")
    if (model_dir / "tokenizer.model").is_file():
        remedy = "save it once as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        return EnvironmentProblem(
            "there is only tokenizer.model, which is not read", where=str(model_dir), remedy=remedy
        )
    remedy = "the folder needs tokenizer.json, or vocab.json and merges.txt; `charkha fetch MODEL` brings them"
    return EnvironmentProblem("the model folder has no tokenizer", where=str(model_dir), remedy=remedy)


def _special_text(backend: Any, model_dir: Path, name: str) -> str | None:
    """The token's text if the vocabulary has it; one that would lie beyond the model's embeddings does not count."""
    text = special_token_text(model_dir, f"{name}_token")
    if text is not None and backend.token_to_id(text) is not None:
        return text
    for token in configured_ids(model_dir, f"{name}_token_id"):
        found = backend.id_to_token(token)
        if found is not None:
            return str(found)
    return None


def _special_tokens(backend: Any, texts: dict[str, str | None], ids: dict[str, int | None]) -> SpecialTokens:
    tokens = backend.encode("a", add_special_tokens=True).ids or [None]
    return SpecialTokens(
        bos=texts["bos"],
        eos=texts["eos"],
        pad=texts["pad"],
        unk=texts["unk"],
        prepends_bos=ids["bos"] is not None and tokens[0] == ids["bos"],
        appends_eos=ids["eos"] is not None and tokens[-1] == ids["eos"],
    )


def _filler(ids: dict[str, int | None]) -> tuple[int, tuple[str, ...]]:
    if ids["pad"] is not None:
        return ids["pad"], ()
    filler = ids["eos"] if ids["eos"] is not None else 0
    return filler, (f"the tokenizer has no pad token: batches are filled with id {filler}, which is masked everywhere",)


def _special_tokens_of(backend: Any) -> list[Any]:
    """The backend's special tokens, longest name first; a name of one letter would be mistaken for text."""
    added = [token for token in backend.get_added_tokens_decoder().values() if token.special and len(token.content) > 1]
    return sorted(added, key=lambda token: (-len(token.content), token.content))


def _special_pattern(backend: Any) -> str:
    return "|".join(
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in _special_tokens_of(backend)
    )


def _fingerprint(model_dir: Path) -> str:
    """sha256 over names and bytes of the tokenizer's files."""
    digest = hashlib.sha256()
    for name in _FINGERPRINTED:
        path = model_dir / name
        if path.is_file():
            data = path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()
