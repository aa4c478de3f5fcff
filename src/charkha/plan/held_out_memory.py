"""Bytes while the held-out loss is taken: between optimizer steps, without gradients, with the training model.

backends/torch/held_out.py takes rows of like length together. Where training makes logits in chunks it does too; else
it keeps those of a whole batch and takes the loss of a row at a time. The model is that of training: where autocast is
around it, logits come in 16 bits and are copied to fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from charkha.plan.activations import forward_alone, layer_memory, norm_bytes
from charkha.plan.architecture import Architecture
from charkha.plan.attention_tape import is_masked
from charkha.plan.loss_memory import CHUNK_BYTES, head_memory
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, HeldOutBatch, MemorySettings

HELD_OUT_TOKENS = 4096  # rows x longest row of a batch; a longer row stands alone


@dataclass(frozen=True)
class HeldOutMemory:
    """The most that one batch needs beside what the device holds at every moment, by term."""

    batch: HeldOutBatch
    terms: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all terms."""
        return sum(self.terms.values())


def largest_batches(batches: Iterable[HeldOutBatch]) -> tuple[HeldOutBatch, ...]:
    """Those of which no other has as many positions, as long rows, and padding too: one of them needs most."""
    kept: list[HeldOutBatch] = []
    for batch in sorted(set(batches), key=lambda one: (one.rows * one.tokens, one.tokens, one.padded), reverse=True):
        if not any(other.tokens >= batch.tokens and other.padded >= batch.padded for other in kept):
            kept.append(batch)
    return tuple(kept)


def full_batch(longest: int) -> HeldOutBatch:
    """As many held-out rows of `longest` tokens as go together: where lengths are not known."""
    return HeldOutBatch(max(1, HELD_OUT_TOKENS // longest), longest, padded=False)


def held_out_memory(
    architecture: Architecture, settings: MemorySettings, room: int | None = None
) -> HeldOutMemory | None:
    """The batch that needs most; None where nothing is held out.

    A batch that does not find `room` is halved until it does, down to single rows, as training does it.
    """
    found = [_that_fits(architecture, settings, batch, room) for batch in settings.held_out]
    return max(found, key=lambda memory: memory.size, default=None)


def single_row_memory(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the longest held-out row alone, the least that evaluation can do with; 0 where nothing is held out."""
    longest = max((batch.tokens for batch in settings.held_out), default=0)
    return _of_batch(architecture, settings, HeldOutBatch(1, longest, padded=False)).size if longest else 0


def _that_fits(
    architecture: Architecture, settings: MemorySettings, batch: HeldOutBatch, room: int | None
) -> HeldOutMemory:
    memory = _of_batch(architecture, settings, batch)
    if batch.rows == 1 or room is None or memory.size <= room:
        return memory
    rows = (batch.rows + 1) // 2
    return _that_fits(architecture, settings, replace(batch, rows=rows, padded=batch.padded and rows > 1), room)


def _of_batch(architecture: Architecture, settings: MemorySettings, batch: HeldOutBatch) -> HeldOutMemory:
    """At the moment that needs most: the last layer, the head, logits copied to fp32, or the loss of a row."""
    settings = replace(
        settings,
        rows=batch.rows,
        tokens=batch.tokens,
        padded=batch.padded,
        lora_dropout=0.0,
        gradient_checkpointing=False,
        trained_positions=None,
    )
    architecture = replace(architecture, dropout=False)
    width = layer_memory(architecture, settings).stream_width
    moments = [_layers(architecture, settings), _head(architecture, settings, width)]
    if settings.loss_head == "chunked":
        moments.append(_chunks(architecture, settings, width))
    else:
        moments.append(_loss(architecture, settings, batch))
    terms = max(moments, key=lambda moment: sum(moment.values()))
    pairs = settings.positions * settings.tokens if is_masked(architecture, settings) else 0
    return HeldOutMemory(batch, terms | {"batch": 3 * 8 * settings.positions + pairs})


def _layers(architecture: Architecture, settings: MemorySettings) -> dict[str, int]:
    """The last layer; what the embedding gave is held by the model's own code till the last layer is done."""
    embedded = layer_memory(architecture, settings).input if architecture.layers > 1 else 0
    return {
        "temporaries": forward_alone(architecture, settings) + embedded,
        "weight_copies": _copies(architecture, settings),
    }


def _copies(architecture: Architecture, settings: MemorySettings) -> int:
    return architecture.layers * layer_memory(architecture, settings).weight_copies


def _head(architecture: Architecture, settings: MemorySettings, width: int) -> dict[str, int]:
    """Final norm and head; the head's matrix is copied where autocast finds it in fp32, for good if it is trained.

    In chunks the model itself makes no logits.
    """
    hidden = settings.positions * architecture.hidden_size
    matrix = architecture.vocab_size * architecture.hidden_size
    copied = HALF_BYTES * matrix if settings.autocast and settings.base_bytes == FULL_BYTES else 0
    logits = settings.positions * architecture.vocab_size * settings.activation_bytes
    normed = hidden * (norm_bytes(architecture, settings, width) + width)
    return {
        "temporaries": normed + (0 if settings.is_full else copied),
        "logits_and_loss": 0 if settings.loss_head == "chunked" else logits,
        "weight_copies": _copies(architecture, settings) + (copied if settings.is_full else 0),
    }


def _chunks(architecture: Architecture, settings: MemorySettings, width: int) -> dict[str, int]:
    """Hidden states where a token counts, of all rows, and fp32 logits of a chunk with the exponential of each.

    A soft cap's quotient and tangent stand beside them. Through a head on the host a chunk is a block of the vocabulary
    for all positions, whose weights are there and the next one's.
    """
    if settings.streamed and settings.host_tables == "both":
        # The memory of training's block, which holds gradients too.
        return {"logits_and_loss": head_memory(architecture, settings).loss_forward}
    rows = min(settings.positions, max(1, CHUNK_BYTES // (FULL_BYTES * architecture.vocab_size)))
    beside = 3 if architecture.logit_softcap else 2
    return {
        "temporaries": settings.positions * architecture.hidden_size * width,
        "logits_and_loss": rows * architecture.vocab_size * FULL_BYTES * beside,
    }


def _loss(architecture: Architecture, settings: MemorySettings, batch: HeldOutBatch) -> dict[str, int]:
    """Logits as they are made and in fp32 at once, or in fp32 with the log-probabilities of one row."""
    row = batch.tokens * architecture.vocab_size
    positions = settings.positions * architecture.vocab_size
    made, capped = settings.activation_bytes, 2 * settings.activation_bytes * bool(architecture.logit_softcap)
    if made == FULL_BYTES:
        return {"logits_and_loss": max(positions * max(made, capped), positions * made + row * FULL_BYTES)}
    if not settings.mixed_precision:
        return {"logits_and_loss": max(positions * capped, positions * made + row * 2 * FULL_BYTES)}
    copying, scoring = positions * (made + FULL_BYTES), (positions + row) * FULL_BYTES
    return {"logits_and_loss": max(copying, scoring, positions * capped)}
