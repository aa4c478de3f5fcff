"""Libraries' chatter goes to the log: what a user must know is said by charkha, once and in its own words."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silences notices that are about the libraries' own future or options, not about this run."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)\.")
    warnings.filterwarnings("ignore", message=".*AVX512-BF16.*")
    for name in ("bitsandbytes", "accelerate", "datasets", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
