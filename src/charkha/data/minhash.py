"""MinHash signatures of texts: how alike two texts are, from 128 numbers each.

A text is the set of its stretches of eight characters (lower case, white space as one space), which needs no words and
so serves every script. Of that set one-permutation hashing keeps the smallest hash in each of 128 bins (Li, Owen and
Zhang, NIPS 2012); an empty bin borrows from another that is not, tried in an order of its own (Shrivastava, "Optimal
densification for fast and accurate minwise hashing", ICML 2017). The share of equal bins estimates the Jaccard
similarity of the sets with a standard error of at most sqrt(0.25 / 128) = 0.044.

Hashing each stretch once over a whole block of texts, instead of 128 times a text, is what makes this fast enough in
NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 128
_WINDOW = 8
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BATCH_CHARACTERS = 1 << 18  # keeps the arrays of one batch in the processor's cache


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The signature of each text, uint32 [texts, 128]; the same text gives the same on every machine."""
    parts = [_signatures(batch) for batch in _batches([plain_form(text) for text in texts])]
    return np.concatenate(parts) if parts else np.empty((0, BINS), dtype=np.uint32)


def plain_form(text: str) -> str:
    """The text as it is compared: lower case, every stretch of white space one space."""
    return " ".join(text.lower().split())


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > _BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return [batch for batch in batches if batch]


def _signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Every window of the joined texts is hashed; those that reach into the next text are left out."""
    padded = [text if len(text) >= _WINDOW else text.ljust(_WINDOW, "\0") for text in texts]
    counts = np.asarray([len(text) - _WINDOW + 1 for text in padded], dtype=np.int64)
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    hashes = mixed(_windows(letters))
    inside = np.ones(len(hashes), dtype=np.bool_)
    ends = np.cumsum(counts + _WINDOW - 1)[:-1]
    for reach in range(1, _WINDOW):
        inside[ends - reach] = False
    hashes = hashes[inside]
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    bins += np.repeat(np.arange(len(padded), dtype=np.int64) * BINS, counts)
    lowest = np.full(len(padded) * BINS, _EMPTY, dtype=np.uint32)
    np.minimum.at(lowest, bins, ((hashes >> np.uint64(20)) & np.uint64(0x7FFFFFFF)).astype(np.uint32))
    return _densified(lowest.reshape(-1, BINS))


def _windows(letters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A polynomial hash of each window of eight letters; uint64 wraps around."""
    length = len(letters) - _WINDOW + 1
    result = letters[:length].copy()
    for index in range(1, _WINDOW):
        result *= _MULTIPLIER
        result += letters[index : index + length]
    return result


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014) of each value: every bit depends on every bit."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@cache
def _borrowing_order() -> NDArray[np.int64]:
    """[attempt, bin]: which bin is asked at each attempt; every bin asks all others in an order of its own."""
    bits = np.random.PCG64(20170806)
    raw = bits.random_raw(BINS * BINS).reshape(BINS, BINS)
    return np.argsort(raw, axis=0, kind="stable").astype(np.int64)


def _densified(lowest: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Empty bins filled; each text has at least one that is not."""
    result = lowest.copy()
    rows, bins = np.nonzero(lowest == _EMPTY)
    for order in _borrowing_order():
        if not len(rows):
            break
        borrowed = lowest[rows, order[bins]]
        result[rows, bins] = borrowed
        still = borrowed == _EMPTY
        rows, bins = rows[still], bins[still]
    return result
