"""Where fetched models lie, where charkha keeps what it could make again, and what this machine learned of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# What moves these folders. Whoever starts charkha by other means than a shell has to hand them on.
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "CHARKHA_CACHE", "XDG_CACHE_HOME", "CHARKHA_HISTORY")

SLABS = "slabs/*/layers.slab"  # below own_cache(): streamed bases as they were laid out


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Hugging Face tools keep what they fetch: HF_HUB_CACHE, else HF_HOME/hub, else below XDG_CACHE_HOME."""
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def own_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where slabs and traces are kept: CHARKHA_CACHE, else `charkha` below XDG_CACHE_HOME, else below ~/.cache."""
    if environ.get("CHARKHA_CACHE"):
        return Path(environ["CHARKHA_CACHE"]).expanduser()
    wished = Path(environ.get("XDG_CACHE_HOME", ""))  # a relative one counts as none, says its specification
    return (wished if wished.is_absolute() else Path("~/.cache").expanduser()) / "charkha"


def history_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where measured speeds and finished runs are remembered: CHARKHA_HISTORY, else `history` beside slabs and traces.

    None where CHARKHA_HISTORY is `off`: nothing is remembered then, and nothing that was is used.
    """
    own = environ.get("CHARKHA_HISTORY", "")
    if own.lower() == "off":
        return None
    return Path(own).expanduser() if own else own_cache(environ) / "history"
