"""Text as detectors read it: ASCII digits, plain spaces and hyphens, nothing invisible, and the way back to positions.

People write the same number in Devanagari, Bengali or Tamil digits, in full-width letters, with a hard space or a
zero-width joiner inside. Letters of other scripts stay as they are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

# The digit zero of: Arabic, Persian, Devanagari, Bengali, Gurmukhi, Gujarati, Odia, Tamil, Telugu, Kannada, Malayalam,
# Sinhala, Ol Chiki, Meetei Mayek, full width. The other nine follow each.
_ZEROS = (0x660, 0x6F0, 0x966, 0x9E6, 0xA66, 0xAE6, 0xB66, 0xBE6, 0xC66, 0xCE6, 0xD66, 0xDE6, 0x1C50, 0xABF0, 0xFF10)
_INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"


def _plain() -> dict[str, str]:
    table = {chr(zero + digit): str(digit) for zero in _ZEROS for digit in range(10)}
    table |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    table |= dict.fromkeys("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f", " ")
    table |= dict.fromkeys("\u205f\u3000\u2028\u2029", " ")
    table |= dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63", "-")
    return table | dict.fromkeys("\u00b7\u2022\u2219\u22c5\u30fb", ".")


_PLAIN = _plain()
_FOLDABLE = re.compile("[" + "".join(re.escape(letter) for letter in _PLAIN) + "]")
_HIDDEN = re.compile(f"[{_INVISIBLE}]+")


@dataclass(frozen=True, slots=True)
class FoldedText:
    """Text ready for the detectors. `cuts` and `removed`: before which of its characters how many were taken out."""

    text: str
    cuts: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()

    def original(self, start: int, end: int) -> tuple[int, int]:
        """The span in the text as it was written, without invisible characters around it."""
        if not self.cuts:
            return start, end
        return start + self._taken(start), end + self._taken(end - 1)

    def _taken(self, position: int) -> int:
        before = bisect_right(self.cuts, position)
        return self.removed[before - 1] if before else 0


def fold(text: str) -> FoldedText:
    """The text with digits, spaces and hyphens of any script made plain, and invisible characters taken out."""
    if text.isascii():
        return FoldedText(text)
    if _FOLDABLE.search(text):
        text = _FOLDABLE.sub(lambda match: _PLAIN[match[0]], text)
    if _HIDDEN.search(text) is None:
        return FoldedText(text)
    cuts: list[int] = []
    removed: list[int] = []
    taken = 0
    for match in _HIDDEN.finditer(text):
        cuts.append(match.start() - taken)
        taken += match.end() - match.start()
        removed.append(taken)
    return FoldedText(_HIDDEN.sub("", text), tuple(cuts), tuple(removed))


def lowered(text: str) -> str:
    """Lower case of the same length: a letter whose lower case is longer stays."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in text)
