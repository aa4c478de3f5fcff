"""What answering with the tuned model needs, for the record of a plan: the cache of a conversation, and the peak."""

from __future__ import annotations

from typing import Any

from charkha.plan.architecture import Architecture
from charkha.plan.device_memory import CONTEXT_BYTES
from charkha.plan.generation_memory import GenerationMemory, generation_memory, merged, with_the_adapter
from charkha.plan.search import Candidate


def generation_record(architecture: Architecture, found: Candidate) -> dict[str, Any]:
    """One conversation as long as the longest row, by the run's model and by the merged one.

    After full fine-tuning there is one model, which is told as the merged one.
    """
    settings = found.settings
    loaded = {"adapter": with_the_adapter(settings), "merged": merged(settings)}
    needs = {
        name: generation_memory(architecture, one, rows=1, prompt=settings.tokens, tokens=settings.tokens)
        for name, one in loaded.items()
        if name == "merged" or not settings.is_full
    }
    whole = needs["merged"]
    return {
        "tokens": settings.tokens,
        "kv_cache_bytes": whole.cache_bytes,
        "kv_cache_bytes_1000_tokens": whole.thousand_tokens_bytes,
        "adapter": _told(needs["adapter"], found) if "adapter" in needs else None,
        "merged": _told(whole, found),
    }


def _told(memory: GenerationMemory, found: Candidate) -> dict[str, Any]:
    context = CONTEXT_BYTES if found.settings.device == "cuda" else 0
    limit = found.limit_bytes
    return {
        "peak_allocated_bytes": memory.peak_bytes,
        "peak_moment": memory.peak_moment,
        "breakdown": memory.terms,
        "fits": None if limit is None else memory.peak_bytes + context <= limit,
    }
