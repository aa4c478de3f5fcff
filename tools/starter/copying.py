"""First weights in which copying already stirs: heads that look one and two tokens back, heads that continue a match.

A transformer copies in two steps, each useless without the other: a head that notes at each place which token stood
before it, then one that looks for the places whose note is the present token and repeats what stands there (Olsson et
al. 2022, "In-context Learning and Induction Heads"). Chance takes many million tokens to bring both about, more than a
CPU reads in half an hour. Here both are laid as ordinary initial values; every weight is then trained as any other.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

HEAD = 32
_STEEP_PAIRS = 4
"""Rotary pairs that turn fast enough to tell neighbours apart: 0 to 3."""
_LEVEL_PAIRS = range(6, 16)
"""Rotary pairs that turn by less than a radian over a row: what is compared there does not depend on distance."""
SLOT = 20
"""Dimensions, empty in the embeddings, in which a place notes the token before it; as many more for the one before."""
CONSTANT = 0.35
"""Dimension 0 of every embedding: what heads can read at every position alike."""


def lay_copying_heads(
    model: LlamaForCausalLM, look: float = 6.0, match: float = 1.0, note: float = 0.4, repeat: float = 0.5
) -> None:
    """Overwrite heads 0 and 1 of layer 0 and heads 0 to 2 of layer 1; set dimension 0 of the embeddings.

    `look` and `match` are the sharpness of attention, `note` and `repeat` the strength of what is written back.
    """
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        hidden = embeddings.shape[1]
        free = torch.eye(hidden)[1:]
        slots = [free[:SLOT], free[SLOT : 2 * SLOT]]
        content = free[2 * SLOT :]
        basis = torch.linalg.qr(torch.randn(len(content), len(content))).Q @ content
        code = basis[:SLOT]
        embeddings[:, : 1 + 2 * SLOT] = 0
        embeddings[:, 0] = CONSTANT
        frequencies = _frequencies(model)
        for head, slot in enumerate(slots):
            _look_back(model.model.layers[0].self_attn, head, head + 1, look, frequencies)
            _write(model.model.layers[0].self_attn, head, code, note * slot)
        for head in range(3):
            _continue_match(model.model.layers[1].self_attn, head, code, slots, match, note)
            kept = basis[[(head * HEAD + i) % len(basis) for i in range(HEAD)]]
            _write(model.model.layers[1].self_attn, head, kept, repeat * kept)


def _frequencies(model: LlamaForCausalLM) -> torch.Tensor:
    theta = float(model.config.rope_parameters["rope_theta"])
    return theta ** (-torch.arange(HEAD // 2) / (HEAD // 2))


def _rows(head: int) -> slice:
    return slice(head * HEAD, (head + 1) * HEAD)


def _look_back(attention: torch.nn.Module, head: int, offset: int, look: float, frequencies: torch.Tensor) -> None:
    """Attend to the place `offset` before: the constant, turned by that many steps."""
    query, key = torch.zeros(HEAD), torch.zeros(HEAD)
    turn = offset * frequencies[:_STEEP_PAIRS]
    query[:_STEEP_PAIRS] = 1
    key[:_STEEP_PAIRS] = turn.cos()
    key[HEAD // 2 : HEAD // 2 + _STEEP_PAIRS] = turn.sin()
    for projection, vector in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[_rows(head)] *= 0.1
        projection.weight[_rows(head), 0] = look * vector


def _write(attention: torch.nn.Module, head: int, read: torch.Tensor, written: torch.Tensor) -> None:
    """Read the rows of `read`, [at most 32, hidden], and add those of `written` in their place."""
    used = slice(head * HEAD, head * HEAD + len(read))
    attention.v_proj.weight[_rows(head)] *= 0.1
    attention.v_proj.weight[used] = read
    attention.o_proj.weight[:, used] = written.T


def _continue_match(
    attention: torch.nn.Module, head: int, code: torch.Tensor, slots: list[torch.Tensor], match: float, note: float
) -> None:
    """Attend to places whose token before is this one, and whose token before that is the one before this."""
    level = [i for pair in _LEVEL_PAIRS for i in (pair, pair + HEAD // 2)]
    first, second = level[: len(level) * 3 // 5], level[len(level) * 3 // 5 :]
    read = [(head * 7 + i) % SLOT for i in range(len(first))]
    query, key = torch.zeros(HEAD, code.shape[1]), torch.zeros(HEAD, code.shape[1])
    query[first] = code[read]
    key[first] = slots[0][read] / note
    query[second] = slots[0][read[: len(second)]] / note
    key[second] = slots[1][read[: len(second)]] / note
    attention.q_proj.weight[_rows(head)] = match * query
    attention.k_proj.weight[_rows(head)] = match * key
