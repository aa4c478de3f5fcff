"""Which script a text is written in, by the letters it has most of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# First code point of each block (Unicode 16, Blocks.txt) and what is written in it; None is no script of its own.
_BLOCKS: tuple[tuple[int, str | None], ...] = (
    (0x0000, None),
    (0x0041, "Latin"),
    (0x005B, None),
    (0x0061, "Latin"),
    (0x007B, None),
    (0x00C0, "Latin"),
    (0x0250, None),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian"),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic (Urdu, Sindhi)"),
    (0x0780, None),
    (0x0900, "Devanagari (Hindi, Marathi, Nepali)"),
    (0x0980, "Bengali (Bengali, Assamese)"),
    (0x0A00, "Gurmukhi (Punjabi)"),
    (0x0A80, "Gujarati"),
    (0x0B00, "Odia"),
    (0x0B80, "Tamil"),
    (0x0C00, "Telugu"),
    (0x0C80, "Kannada"),
    (0x0D00, "Malayalam"),
    (0x0D80, "Sinhala"),
    (0x0E00, "Thai"),
    (0x0E80, None),
    (0x1100, "Hangul (Korean)"),
    (0x1200, None),
    (0x1C50, "Ol Chiki (Santali)"),
    (0x1C80, None),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, None),
    (0x3040, "Kana (Japanese)"),
    (0x3100, None),
    (0x3400, "Han (Chinese, Japanese)"),
    (0xA000, None),
    (0xABC0, "Meetei Mayek (Manipuri)"),
    (0xAC00, "Hangul (Korean)"),
    (0xD7B0, None),
    (0x20000, "Han (Chinese, Japanese)"),
    (0x32000, None),
)
_STARTS = np.asarray([start for start, _ in _BLOCKS], dtype=np.uint32)
_NAMES = [name for _, name in _BLOCKS]
OTHER = "no letters"


def script_of(text: str) -> str:
    """The script of most letters of the text, `no letters` where it has none."""
    if text.isascii():
        return "Latin" if any(letter.isalpha() for letter in text[:4096]) else OTHER
    counts = np.bincount(_block_numbers(text), minlength=len(_BLOCKS))
    totals: dict[str, int] = {}
    for name, count in zip(_NAMES, counts, strict=True):
        if name is not None and count:
            totals[name] = totals.get(name, 0) + int(count)
    return max(totals, key=lambda name: totals[name]) if totals else OTHER


def _block_numbers(text: str) -> NDArray[np.intp]:
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.searchsorted(_STARTS, letters, side="right") - 1
