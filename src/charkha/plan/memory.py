"""Peak memory of a training step in closed form, term by term: the instant preview before a run.

The counter is live tensor bytes: `torch.cuda.max_memory_allocated` on a GPU, the allocator's own sum on a CPU. It is
the steady state (optimizer states exist) at the longest micro batch, on the device that holds most. What the CUDA
caching allocator reserves beyond it, and the context, is in device_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.optimizers import KNOWN_OPTIMIZERS
from charkha.plan.activations import LayerMemory, layer_memory
from charkha.plan.architecture import Architecture
from charkha.plan.attention_tape import is_masked
from charkha.plan.loss_memory import HeadMemory, head_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.sharding import Shares, shares
from charkha.plan.weights import targets_outside_layers, trainable_parameters


@dataclass(frozen=True)
class MemoryPreview:
    """Predicted bytes at the moment that needs most. `breakdown` sums to `peak_bytes`, largest term first."""

    peak_bytes: int
    peak_moment: str
    breakdown: dict[str, int]
    moments: dict[str, int]  # bytes at every moment considered, in the order of the step
    trainable_parameters: int
    notes: tuple[str, ...]
    layer_phase_bytes: int = 0  # what comes and goes while layers are gone through backward
    loss_phase_bytes: int = 0  # and while head and loss are computed
    held_bytes: int = 0  # what is there at every moment


@dataclass(frozen=True)
class _Step:
    """One training step of one model, and the bytes of each of its moments by term."""

    architecture: Architecture
    settings: MemorySettings
    layer: LayerMemory
    head: HeadMemory
    shares: Shares

    def always(self) -> dict[str, int]:
        """What is there at every moment of the step."""
        settings = self.settings
        # Token ids, mask and labels in int64; a boolean mask over pairs of positions where rows are padded.
        masked = settings.has_padding or is_masked(self.architecture, settings)
        pairs = settings.positions * settings.tokens if masked else 0
        return {
            "base_weights": self.shares.base_weights,
            "adapter_weights": self.shares.adapter_weights,
            "optimizer_states": self.shares.optimizer_states,
            "gradients": self.shares.gradients if settings.accumulation_steps > 1 else 0,
            "gradient_buckets": self.shares.buckets,
            "batch": 3 * 8 * settings.positions + pairs,
            "workspace": settings.workspace_bytes if settings.device == "cuda" else 0,
        }

    def kept_layers(self, layers: int) -> int:
        """Activations that `layers` layers keep: all of them, or with checkpointing only what entered each."""
        if not self.settings.gradient_checkpointing:
            return layers * self.layer.saved
        if "activations" in self.settings.offload:
            return min(layers, 2) * self.layer.kept  # one on its way to the host, one on its way back
        return layers * self.layer.kept

    def _kept_at_first_layer(self) -> int:
        """Of the layers that backward has been through, nothing; beside frozen shards what entered and its gradient.

        FSDP hangs a hook on what enters a layer of frozen weights, to free them once its gradient is made. With
        re-entrant checkpointing that is a leaf, which the hook keeps alive, gradient and all, to the end of backward.
        """
        frozen_shards = self.settings.strategy == "fsdp" and not self.settings.is_full
        if frozen_shards and self.settings.hooks_keep_inputs and self.settings.gradient_checkpointing:
            others = self.architecture.layers - 1
            return self.kept_layers(1) + others * 2 * self.layer.input
        return self.kept_layers(1)

    def forward(self) -> dict[str, int]:
        """The model's end: every activation, the logits, and autocast's 16-bit copies of all trained matrices."""
        layers = self.architecture.layers
        return {
            "activations": self.kept_layers(layers) + self.head.saved,
            "logits_and_loss": self.head.logits,
            "weight_copies": layers * self.layer.weight_copies if self.settings.gradient_checkpointing else 0,
            "gathered_weights": self.shares.gathered_root,
        }

    def last_layer_forward(self) -> dict[str, int]:
        """What the last layer needs while it runs."""
        checkpointed = self.settings.gradient_checkpointing
        return {
            "activations": self.kept_layers(self.architecture.layers),
            "temporaries": self.layer.forward_kept if checkpointed else self.layer.forward - self.layer.saved,
            "gathered_weights": self.shares.gathered_root + self.shares.gathered_layer,
        }

    def loss(self) -> dict[str, int]:
        return self._all_activations_and(self.head.loss_forward)

    def loss_backward(self) -> dict[str, int]:
        return self._all_activations_and(self.head.loss_backward)

    def head_backward(self) -> dict[str, int]:
        return self._all_activations_and(self.head.head_backward)

    def last_layer_backward(self) -> dict[str, int]:
        waiting = self._pending_head_gradient()
        return {
            "activations": self.kept_layers(self.architecture.layers),
            "gradients": self._new_gradients(self.shares.head_gradient - waiting),
            "temporaries": self.layer_temporaries() + waiting,
            "gathered_weights": self.shares.gathered_root + self.shares.gathered_layer,
        }

    def first_layer_backward(self) -> dict[str, int]:
        """By now nearly every gradient exists, and one layer's activations are left."""
        missing = self.architecture.embedding_parameters + self.architecture.layer_parameters
        share = self.settings.processes if self.settings.shards_gradients else 1
        not_yet = self.settings.trained_bytes * missing // share if self.settings.is_full else 0
        return {
            "activations": self._kept_at_first_layer(),
            "gradients": self._new_gradients(max(0, self.shares.gradients - not_yet)),
            "temporaries": self.layer_temporaries() + self._pending_head_gradient(),
            "gathered_weights": self.shares.gathered_root + self.shares.gathered_layer,
        }

    def embedding_backward(self) -> dict[str, int]:
        """The embedding's gradient is dense; with a tied head it, the head's and their sum exist for a moment."""
        width = self.settings.trained_bytes if self.settings.is_full else 0
        embedding = width * self.architecture.embedding_parameters
        tied, accumulates = self.architecture.tied_embeddings, self.settings.accumulation_steps > 1
        beside = embedding * ((2 if tied else 0) + (1 if accumulates else 0))
        return {
            "gradients": self._new_gradients(self.shares.gradients),
            "temporaries": self.layer.input + beside,
            "gathered_weights": self.shares.gathered_root,
        }

    def optimizer_step(self) -> dict[str, int]:
        return {
            "gradients": self._new_gradients(self.shares.gradients),
            "temporaries": self.shares.optimizer_temporary,
        }

    def _all_activations_and(self, logits_and_loss: int) -> dict[str, int]:
        return {
            "activations": self.kept_layers(self.architecture.layers) + self.head.saved,
            "logits_and_loss": logits_and_loss,
            "gathered_weights": self.shares.gathered_root,
        }

    def _new_gradients(self, size: int) -> int:
        """`size` where gradients are made in this micro batch; when accumulating they are there at every moment."""
        return 0 if self.settings.accumulation_steps > 1 else size

    def _pending_head_gradient(self) -> int:
        """A tied head's gradient waits for the embedding's before either is added to the parameter."""
        return self.shares.head_gradient if self.architecture.tied_embeddings else 0

    def layer_temporaries(self) -> int:
        """What one layer needs while its gradients are taken, beside what it kept."""
        if self.settings.gradient_checkpointing:
            return self.layer.recomputed
        return self.layer.backward - self.layer.saved


def preview_memory(architecture: Architecture, settings: MemorySettings) -> MemoryPreview:
    """Peak live tensor bytes of training `architecture` with `settings`, and at which moment of the step."""
    step = _Step(
        architecture,
        settings,
        layer_memory(architecture, settings),
        head_memory(architecture, settings),
        shares(architecture, settings),
    )
    always = step.always()
    terms = {name: _sum(always, moment) for name, moment in _moments(step).items()}
    peak_moment = max(terms, key=lambda name: sum(terms[name].values()))
    largest_first = sorted(terms[peak_moment].items(), key=lambda term: -term[1])
    breakdown = {name: size for name, size in largest_first if size}
    return MemoryPreview(
        peak_bytes=sum(breakdown.values()),
        peak_moment=peak_moment,
        breakdown=breakdown,
        moments={name: sum(moment.values()) for name, moment in terms.items()},
        trainable_parameters=trainable_parameters(architecture, settings),
        notes=_notes(architecture, settings),
        layer_phase_bytes=step.layer_temporaries(),
        loss_phase_bytes=max(step.head.loss_forward, step.head.loss_backward),
        held_bytes=sum(always.values()),
    )


def _moments(step: _Step) -> dict[str, dict[str, int]]:
    return {
        "forward of the last layer": step.last_layer_forward(),
        "end of the model's forward": step.forward(),
        "loss": step.loss(),
        "backward of the loss": step.loss_backward(),
        "backward of the head": step.head_backward(),
        "backward of the last layer": step.last_layer_backward(),
        "backward of the first layer": step.first_layer_backward(),
        "backward of the embedding": step.embedding_backward(),
        "optimizer step": step.optimizer_step(),
    }


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def _notes(architecture: Architecture, settings: MemorySettings) -> tuple[str, ...]:
    """What a reader of the number must know."""
    notes = ["a closed form of live tensor bytes, at the longest micro batch with optimizer states in place"]
    if settings.device == "cuda":
        notes.append("the CUDA context and what the allocator reserves beyond live tensors come on top")
    if settings.device == "mps":
        notes.append("not measured on Apple GPUs")
    if settings.optimizer not in KNOWN_OPTIMIZERS:
        notes.append(f"optimizer {settings.optimizer} is counted as AdamW in 32 bits")
    if architecture.experts:
        notes.append("tokens are counted as spread evenly over the experts")
    outside = targets_outside_layers(architecture, settings)
    if outside:
        notes.append(f"adapters on {', '.join(outside)} are counted by their weights at most")
    return tuple(notes)
