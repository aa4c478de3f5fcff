"""Values of the config's schema that this version carries out, and which of a config it would not."""

from __future__ import annotations

from charkha.config import Config

# Values of the schema that this version does not carry out yet: key -> values that it does. A value that would be
# ignored is refused, because a run that silently does something else is worse than one that does not start.
CARRIED_OUT: dict[str, tuple[object, ...]] = {
    "model.upcast_unquantized": ("auto", False),
    "data.format": ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "oasst", "text"),
    "training.objective": ("sft",),
    "training.init_from": (None,),
    "training.gradient_checkpointing": ("auto", "none", "full", "selective", True, False),
    "training.fused_kernels": ("auto", "none"),
    "training.early_stopping": (None,),
    "devices.strategy": ("auto", "single", "ddp"),
    "devices.hosts": ([],),
    "devices.shard_dtype": ("auto",),
    "devices.offload": ("none",),
    "devices.offload_to": ("cpu",),
}


def unsupported(config: Config) -> list[tuple[str, object, str]]:
    """Keys whose value this version would not carry out: (key, value, values that work)."""
    found = []
    for key, values in CARRIED_OUT.items():
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            found.append((key, value, " or ".join(_yaml_word(known) for known in values)))
    return found


def _yaml_word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
