"""Bytes of final norm, head and loss: logits exist for every trained position at once, or for a chunk of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from charkha.plan.activations import layer_memory, norm_bytes
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, LossKernel, MemorySettings

CHUNK_BYTES = 64 * 2**20  # fp32 logits of one chunk, as backends/torch/loss.py cuts them
LEAST_BLOCK_ROWS = 256  # of a head on the host, in one block


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of final norm, head and loss for one micro batch."""

    saved: int  # by final norm and head, until the head's backward is done
    logits: int  # as the model returns them
    loss_forward: int
    loss_backward: int
    head_backward: int  # the logits' gradient, and what the head makes of it


def with_the_loss_that_runs(settings: MemorySettings, architecture: Architecture) -> MemorySettings:
    """Settings with the model's own loss where training calls it: mixtures of experts, and rows with virtual tokens.

    See choose_loss in backends/torch/loss.py. In transformers 5 that loss peaks at 12 bytes a logit, measured.
    """
    if not architecture.experts and settings.method != "prompt_tuning":
        return settings
    return replace(settings, loss_head="full", loss_kernel="transformers_alone", trained_positions=None)


def head_memory(architecture: Architecture, settings: MemorySettings) -> HeadMemory:
    """What final norm, head and loss keep and need."""
    width = layer_memory(architecture, settings).stream_width
    if settings.streamed and settings.host_tables == "both" and settings.loss_kernel == "own":
        return _in_blocks(architecture, settings, width)
    if settings.loss_head == "chunked":
        return _chunked(architecture, settings, width)
    return _whole(architecture, settings, width)


def _whole(architecture: Architecture, settings: MemorySettings, width: int) -> HeadMemory:
    """Logits of every trained position at once, the loss in fp32.

    Forward holds logits and log-probabilities, backward the latter and two gradients of their size. A head in training
    keeps its input and, under autocast, its 16-bit copy.
    """
    hidden = settings.loss_positions * architecture.hidden_size * settings.activation_bytes
    logits = settings.loss_positions * architecture.vocab_size
    matrix = architecture.vocab_size * architecture.hidden_size
    saved = _final_norm(architecture, settings, width)
    saved += logits * settings.activation_bytes if architecture.logit_softcap else 0
    head_backward = logits * settings.activation_bytes + hidden
    if settings.is_full:
        saved += hidden + (HALF_BYTES * matrix if settings.autocast else 0)
        head_backward += settings.activation_bytes * matrix  # upcast after the logits' gradient is gone
    elif settings.autocast and settings.base_bytes == FULL_BYTES:
        saved += HALF_BYTES * matrix  # autocast's copy of a frozen head in fp32
    forward, backward = _LOSS_BYTES[settings.loss_kernel]
    inside = hidden if settings.loss_kernel != "own" and not settings.is_full else 0  # alive in the model's forward
    return HeadMemory(
        saved=saved,
        logits=logits * settings.activation_bytes,
        loss_forward=logits * forward + inside,
        loss_backward=logits * backward,
        head_backward=head_backward,
    )


# Bytes per logit in forward and backward of the loss, 16-bit logits where they are still held counted.
# own: fp32 logits (accelerate casts them) and log-probabilities; then those and two gradients.
# transformers (to 5.x, inside the model's forward): 16-bit logits, their fp32 copy, the copy shifted by a position (or
# in newer versions the log-probabilities' gradient), log-probabilities.
# in_place: as before up to the shifted copy, in which the kernel writes the gradient.
# ..._alone: versions before 4.46, where the fp32 copy takes the place of the 16-bit logits.
# narrow: logits, their shifted copy, log-probabilities and a gradient, all in 16 bits.
# kept_chunks: logits and log-probabilities in 16 bits, made and kept chunk by chunk.
_LOSS_BYTES: dict[LossKernel, tuple[int, int]] = {
    "own": (8, 12),
    "transformers": (14, 14),
    "transformers_alone": (12, 12),
    "in_place": (10, 10),
    "in_place_alone": (8, 8),
    "narrow": (8, 8),
    "in_place_narrow": (6, 6),
    "kept_chunks": (4, 4),
}


def _chunked(architecture: Architecture, settings: MemorySettings, width: int) -> HeadMemory:
    """Gradients of hidden states and head are made chunk by chunk during forward, so that backward needs no logits.

    This runs outside autocast: in the type of the head's weight, so there are no copies of it.
    """
    hidden = settings.loss_positions * architecture.hidden_size * width
    matrix = architecture.vocab_size * architecture.hidden_size if settings.is_full else 0
    gradients = hidden + settings.trained_bytes * matrix
    return HeadMemory(
        saved=_final_norm(architecture, settings, width),
        logits=0,
        loss_forward=gradients + hidden + _one_chunk(architecture, settings, matrix, width),
        loss_backward=gradients,
        head_backward=gradients + settings.positions * architecture.hidden_size * width,
    )


def _one_chunk(architecture: Architecture, settings: MemorySettings, trained_matrix: int, width: int) -> int:
    """Logits, their distance to the log-sum, and its exponential, beside the gradients of the chunk before, if any."""
    rows = max(1, CHUNK_BYTES // (FULL_BYTES * architecture.vocab_size))
    logits = min(rows, settings.loss_positions) * architecture.vocab_size
    narrow = HALF_BYTES if width == HALF_BYTES else 0  # the exponential in the head's type
    before = FULL_BYTES + narrow if settings.loss_positions > rows else 0
    return max(logits * (3 * FULL_BYTES + before), logits * (2 * FULL_BYTES + narrow) + FULL_BYTES * trained_matrix)


def _in_blocks(architecture: Architecture, settings: MemorySettings, width: int) -> HeadMemory:
    """A head that is on the host: blocks of the vocabulary for all positions, as backends/torch/head_loss.py has them.

    Of a block there are the logits in fp32 beside those of the products, the exponential or the slope; a softcap's
    own slope beside both. A block's weights are there, and the next one's, but where a CPU reads them in the file.
    """
    positions, hidden = settings.loss_positions, architecture.hidden_size
    rows = min(architecture.vocab_size, max(LEAST_BLOCK_ROWS, CHUNK_BYTES // (FULL_BYTES * max(1, positions))))
    at_once = 3 if architecture.logit_softcap else 2
    inside = positions * rows * FULL_BYTES * at_once
    copied = settings.device == "cuda" or settings.casts_tables
    weights = min(2 * rows, architecture.vocab_size) * hidden * settings.activation_bytes if copied else 0
    entering = positions * hidden * width
    narrowed = positions * hidden * settings.activation_bytes if width != settings.activation_bytes else 0
    gradient = positions * hidden * width
    return HeadMemory(
        saved=_final_norm(architecture, settings, width),
        logits=0,
        loss_forward=entering + narrowed + positions * hidden * FULL_BYTES + max(inside + weights, gradient),
        loss_backward=gradient,
        head_backward=gradient + settings.positions * hidden * width,
    )


def _final_norm(architecture: Architecture, settings: MemorySettings, width: int) -> int:
    hidden = settings.positions * architecture.hidden_size
    is_trained = settings.is_full and not settings.fused_norms and architecture.final_norm.kind == "rms"
    return hidden * (norm_bytes(architecture, settings, width) + (width if is_trained else 0))
