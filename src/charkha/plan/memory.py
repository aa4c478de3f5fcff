"""Peak memory of a training step in closed form, term by term: the instant preview before a run.

The counter is live tensor bytes: `torch.cuda.max_memory_allocated` on a GPU, the allocator's own sum on a CPU. It is
the steady state (optimizer states exist) at the longest micro batch. Not covered: what the CUDA caching allocator
reserves beyond it (fragmentation), the CUDA context, evaluation, several devices, mixtures of experts, GPT-2.
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.plan.activations import LayerMemory, layer_memory
from charkha.plan.architecture import Architecture, UnknownArchitecture
from charkha.plan.loss_memory import HeadMemory, head_memory
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.weights import (
    adapter_parameters,
    base_weight_bytes,
    targets_outside_layers,
    trainable_parameters,
)

_CUBLAS_WORKSPACE_BYTES = 32 * 2**20  # what torch gives cuBLAS on Hopper, once; older GPUs get about 8 MiB
_FUSED = "adamw_torch_fused"
_KNOWN_OPTIMIZERS = (_FUSED, "adamw_torch")


@dataclass(frozen=True)
class MemoryPreview:
    """Predicted bytes at the moment that needs most. `breakdown` sums to `peak_bytes`, largest term first."""

    peak_bytes: int
    peak_moment: str
    breakdown: dict[str, int]
    moments: dict[str, int]  # bytes at every moment considered, in the order of the step
    trainable_parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """One training step of one model, and the bytes of each of its moments by term."""

    architecture: Architecture
    settings: MemorySettings
    layer: LayerMemory
    head: HeadMemory

    def always(self) -> dict[str, int]:
        """What is there at every moment of the step."""
        settings, trained = self.settings, trainable_parameters(self.architecture, self.settings)
        # Token ids, mask and labels in int64; a boolean mask over pairs of positions where rows are padded.
        pairs = settings.positions * settings.tokens if settings.has_padding else 0
        return {
            "base_weights": base_weight_bytes(self.architecture, settings),
            "adapter_weights": FULL_BYTES * adapter_parameters(self.architecture, settings),
            "optimizer_states": 2 * FULL_BYTES * trained,
            "gradients": self.gradients() if settings.accumulation_steps > 1 else 0,
            "batch": 3 * 8 * settings.positions + pairs,
            "workspace": _CUBLAS_WORKSPACE_BYTES if settings.device == "cuda" else 0,
        }

    def gradients(self) -> int:
        """Gradients of everything trained, in fp32."""
        return FULL_BYTES * trainable_parameters(self.architecture, self.settings)

    def head_gradient(self) -> int:
        """The gradient of the head's matrix, which is the first to be made; none beside frozen weights."""
        if not self._is_full():
            return 0
        return FULL_BYTES * self.architecture.vocab_size * self.architecture.hidden_size

    def kept_layers(self, layers: int) -> int:
        """Activations that `layers` layers keep: all of them, or with checkpointing only what entered each."""
        return layers * (self.layer.input if self.settings.gradient_checkpointing else self.layer.saved)

    def forward(self) -> dict[str, int]:
        """The model's end: every activation, the logits, and autocast's 16-bit copies of all trained matrices."""
        layers = self.architecture.layers
        return {
            "activations": self.kept_layers(layers) + self.head.saved,
            "logits_and_loss": self.head.logits,
            "weight_copies": layers * self.layer.weight_copies if self.settings.gradient_checkpointing else 0,
        }

    def loss(self) -> dict[str, int]:
        return self._all_activations_and(self.head.loss_forward)

    def loss_backward(self) -> dict[str, int]:
        return self._all_activations_and(self.head.loss_backward)

    def head_backward(self) -> dict[str, int]:
        return self._all_activations_and(self.head.head_backward)

    def last_layer_backward(self) -> dict[str, int]:
        return {
            "activations": self.kept_layers(self.architecture.layers),
            "gradients": self._new_gradients(self.head_gradient() - self._pending_head_gradient()),
            "temporaries": self._layer_temporaries() + self._pending_head_gradient(),
        }

    def first_layer_backward(self) -> dict[str, int]:
        """By now nearly every gradient exists, and one layer's activations are left."""
        missing = self.architecture.embedding_parameters + self.architecture.layer_parameters
        return {
            "activations": self.kept_layers(1),
            "gradients": self._new_gradients(self.gradients() - (FULL_BYTES * missing if self._is_full() else 0)),
            "temporaries": self._layer_temporaries() + self._pending_head_gradient(),
        }

    def embedding_backward(self) -> dict[str, int]:
        """The embedding's gradient is dense; with a tied head it, the head's and their sum exist for a moment."""
        embedding = FULL_BYTES * self.architecture.embedding_parameters if self._is_full() else 0
        tied, accumulates = self.architecture.tied_embeddings, self.settings.accumulation_steps > 1
        beside = embedding * ((2 if tied else 0) + (1 if accumulates else 0))
        return {
            "gradients": self._new_gradients(self.gradients()),
            "temporaries": self.layer.input + beside,
        }

    def optimizer_step(self) -> dict[str, int]:
        return {
            "gradients": self._new_gradients(self.gradients()),
            "temporaries": self._optimizer_temporaries(),
        }

    def _all_activations_and(self, logits_and_loss: int) -> dict[str, int]:
        return {
            "activations": self.kept_layers(self.architecture.layers) + self.head.saved,
            "logits_and_loss": logits_and_loss,
        }

    def _is_full(self) -> bool:
        return self.settings.method == "full"

    def _new_gradients(self, size: int) -> int:
        """`size` where gradients are made in this micro batch; when accumulating they are there at every moment."""
        return 0 if self.settings.accumulation_steps > 1 else size

    def _pending_head_gradient(self) -> int:
        """A tied head's gradient waits for the embedding's before either is added to the parameter."""
        if not self.architecture.tied_embeddings:
            return 0
        return self.head_gradient()

    def _layer_temporaries(self) -> int:
        gradient_from_above = self.layer.input  # of the residual, which is as large everywhere
        if self.settings.gradient_checkpointing:
            return gradient_from_above + self.layer.recomputed
        return gradient_from_above + self.layer.backward_temporaries

    def _optimizer_temporaries(self) -> int:
        """The fused kernel needs none; torch's default makes one per tensor at once on a GPU, two for one on a CPU."""
        if self.settings.optimizer == _FUSED:
            return 0
        if self.settings.device == "cuda":
            return self.gradients()
        return 2 * FULL_BYTES * _largest_trained(self.architecture, self.settings)


def preview_memory(architecture: Architecture, settings: MemorySettings) -> MemoryPreview:
    """Peak live tensor bytes of training `architecture` with `settings`, and at which moment of the step.

    Raises UnknownArchitecture for a model whose activations are not counted here (experts, GPT-2).
    """
    _require_covered(architecture)
    step = _Step(architecture, settings, layer_memory(architecture, settings), head_memory(architecture, settings))
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
    )


def _moments(step: _Step) -> dict[str, dict[str, int]]:
    return {
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


def _largest_trained(architecture: Architecture, settings: MemorySettings) -> int:
    """Elements of the largest tensor that the optimizer moves."""
    if settings.method == "full":
        linears = (linear.weights for linear in architecture.linears)
        return max(architecture.vocab_size * architecture.hidden_size, *linears)
    return settings.r * max((max(linear.inputs, linear.outputs) for linear in architecture.linears), default=0)


def _require_covered(architecture: Architecture) -> None:
    if architecture.experts or architecture.learned_positions:
        raise UnknownArchitecture(
            f"there is no memory preview for {architecture.model_type}: its activations are not counted yet",
            where="config.json",
            remedy="training does not need the preview",
        )


def _notes(architecture: Architecture, settings: MemorySettings) -> tuple[str, ...]:
    """What a reader of the number must know."""
    notes = ["a closed form of live tensor bytes, at the longest micro batch with optimizer states in place"]
    if settings.device == "cuda":
        notes.append("the CUDA context and what the allocator reserves beyond live tensors come on top")
    if settings.device == "mps":
        notes.append("not measured on Apple GPUs")
    if settings.optimizer not in _KNOWN_OPTIMIZERS:
        notes.append(f"optimizer {settings.optimizer} is counted as AdamW in 32 bits")
    outside = targets_outside_layers(architecture, settings)
    if outside:
        notes.append(f"adapters on {', '.join(outside)} are counted by their weights at most")
    return tuple(notes)
