"""Optimizers by their transformers names: which run here, which of them keep their state in 8 bits or page it."""

from __future__ import annotations

import difflib

# transformers.training_args.OptimizerNames of 5.23, those that need no package beyond ours.
TORCH_OPTIMIZERS = frozenset({"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"})
BITSANDBYTES_OPTIMIZERS = frozenset(
    {
        "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
        "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    }
)  # fmt: skip
KNOWN_OPTIMIZERS = TORCH_OPTIMIZERS | BITSANDBYTES_OPTIMIZERS

# Families of transformers that need another package, another loop (schedule-free switches between training and
# evaluation weights, lomo updates inside the backward pass), or other hardware.
_ELSEWHERE = (
    "galore_", "apollo_", "schedule_free_", "lomo", "adalomo", "grokadamw", "stable_adamw", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla", "adamw_torch_npu_fused",
)  # fmt: skip


def require_optimizer(name: str) -> None:
    """Returns for `auto` and every optimizer that runs here. Raises ValueError naming the nearest one that does."""
    if name == "auto" or name in KNOWN_OPTIMIZERS:
        return
    known_elsewhere = name.startswith(_ELSEWHERE)
    what = "is an optimizer of transformers that does not run here" if known_elsewhere else "is not an optimizer"
    nearest = difflib.get_close_matches(name, sorted(KNOWN_OPTIMIZERS), n=1, cutoff=0.5) or ["adamw_torch_fused"]
    everything = ", ".join(sorted(KNOWN_OPTIMIZERS))
    raise ValueError(f"{name!r} {what}; did you mean {nearest[0]}? (auto, {everything})")
