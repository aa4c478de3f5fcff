"""Which tables of a streamed base stay on the host, as its loading sees it: taken out of the model, and bound again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from charkha.backends.base import BaseModelSpec
from charkha.backends.torch.slab_making import DTYPE_NAMES
from charkha.backends.torch.slab_parts import Weights
from charkha.backends.torch.tensor_files import torch_dtype_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


_OTHER_HEADS = ("embed_out.weight",)  # names of heads in files (GPT-NeoX), which transformers renames


def keep_tables_on_host(model: PreTrainedModel, base: BaseModelSpec) -> None:
    """Takes the weights out of embedding and head of a model that is not loaded yet, as `base.streaming` says.

    A tied pair is one table: it goes to the host with the head, and else stays on the device.
    """
    import torch

    from charkha.backends.torch.host_tables import HostEmbedding, HostHead, keep_on_host

    settings = base.streaming
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if settings is None:
        return
    tied = _is_tied(model)
    to_host = settings.head_on_host and isinstance(head, torch.nn.Linear)
    if to_host:
        keep_on_host(head, HostHead)
    if to_host and tied:
        model.all_tied_weights_keys = {}  # transformers' own list, of parameters that are there no more
    if isinstance(embedding, torch.nn.Embedding) and (to_host if tied else settings.embedding_on_host):
        keep_on_host(embedding, HostEmbedding)


def has_tied_table_on_host(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one table that is on the host: there is nothing to tie then."""
    from charkha.backends.torch.host_tables import HostHead

    return _is_tied(model) and isinstance(model.get_output_embeddings(), HostHead)


def bind_tables(model: PreTrainedModel, weights: Weights, base: BaseModelSpec, device: torch.device) -> None:
    """Opens the tables of a loaded model in the base's files."""
    from charkha.backends.torch.host_tables import HostEmbedding, HostHead, open_table

    dtype = torch_dtype_of(DTYPE_NAMES[base.dtype])
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    of_embedding, of_head = names[id(embedding)], names.get(id(head), "")
    if isinstance(head, HostHead):
        stored = [of_head, of_embedding] if _is_tied(model) else [of_head, *_OTHER_HEADS]
        head.table, head.device = open_table(weights, stored, dtype, str(base.path)), device
    if isinstance(embedding, HostEmbedding):
        if _is_tied(model):
            embedding.table = head.table
        else:
            embedding.table = open_table(weights, [of_embedding], dtype, str(base.path))
        embedding.device = device


def weights_on_host(model: Any) -> int:
    """Weights of the tables that are on the host, which are no parameters of the model; a tied table counts once."""
    from charkha.backends.torch.host_tables import HostEmbedding, HostHead

    tables = {
        id(module.table): module.table
        for module in model.modules()
        if isinstance(module, (HostEmbedding, HostHead)) and module.table is not None
    }
    return sum(table.tensor.numel() for table in tables.values())


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
