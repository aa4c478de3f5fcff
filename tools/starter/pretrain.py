"""Pretrain the starter model from nothing on the generated text, and write it where the package finds it.

    python tools/starter/pretrain.py --out src/charkha/starter/model --log tools/starter/pretrain.log

The text is made while it is read, and checked for JSON and for held-out names as it goes by.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from copying import lay_copying_heads
from make_text import FIRST_DOCUMENTS, FORBIDDEN, SEED, documents, heldout_words_in
from tokenizer import END_OF_TEXT, PAD, TURN_END, TURN_START, save_tokenizer, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CONTEXT_TOKENS = 256
CHUNK_DOCUMENTS = 5_000


def build_model(tokenizer: tokenizers.Tokenizer, hidden: int, layers: int, mlp: int) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings. Their scale is that of tokens which pretraining leaves as they are."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 0.06 if "embed" in name else 1.0 / math.sqrt(weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= 0.02  # blocks start as almost nothing, so that the heads laid below read the tokens themselves
            torch.nn.init.normal_(weight, std=std)
    lay_copying_heads(model)
    return model


class TextStream:
    """The pretraining text as packed token blocks; checks each chunk for JSON and held-out names as it goes by."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, first: int) -> None:
        """Stand before document `first` with nothing read."""
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        self.next_document = first
        self.bytes_read = 0
        self.digest = hashlib.sha256()

    def _tokens(self) -> list[int]:
        texts = list(documents(CHUNK_DOCUMENTS, start=self.next_document))
        joined = "\n".join(texts)
        if FORBIDDEN.search(joined) or heldout_words_in(joined):
            raise SystemExit(f"JSON or a held-out name near document {self.next_document}")
        self.next_document += CHUNK_DOCUMENTS
        self.bytes_read += len(joined.encode())
        self.digest.update(joined.encode())
        return [token for encoded in self.tokenizer.encode_batch(texts) for token in (*encoded.ids, self.end)]

    def batches(self, rows: int) -> Iterator[torch.Tensor]:
        """Token ids, [rows, CONTEXT_TOKENS + 1], without end; no document is seen twice."""
        size = rows * (CONTEXT_TOKENS + 1)
        left: list[int] = []
        while True:
            left += self._tokens()
            whole = len(left) // size
            for block in np.array(left[: whole * size], dtype=np.int64).reshape(whole, rows, -1):
                yield torch.from_numpy(block)
            left = left[whole * size :]


def never_seen_bias(tokenizer: tokenizers.Tokenizer, sample: int = 20_000) -> torch.Tensor:
    """A logit bias, [vocabulary], that takes the tokens absent from the text out of the softmax.

    Otherwise Adam drives their rows, braces among them, far off in one direction, and since LoRA does not train the
    embeddings no fine-tune could bring them back.
    """
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for encoded in tokenizer.encode_batch(list(documents(sample, start=FIRST_DOCUMENTS))):
        np.add.at(counts, np.array(encoded.ids), 1)
    counts[tokenizer.token_to_id(END_OF_TEXT)] = 1
    return torch.where(torch.from_numpy(counts) > 0, 0.0, -1e4)


def loss_weights(batch: torch.Tensor, roles: tuple[int, int, int], message_weight: float) -> torch.Tensor:
    """A weight per token of `batch`, `message_weight` in a customer's turn and 1 elsewhere.

    Names and amounts of a message cannot be foretold; what can be learned is what the bank makes of them. A turn that
    began in the block before counts in full.
    """
    start, end, user = roles
    places = torch.arange(batch.shape[1]).expand_as(batch)
    opens = batch == start
    opens[:, :-1] &= batch[:, 1:] == user
    last_open = torch.where(opens, places, -1).cummax(dim=1).values
    last_end = torch.where(batch == end, places, -1).cummax(dim=1).values
    return torch.where(last_open > last_end, message_weight, 1.0)


def make_optimizers(model: LlamaForCausalLM, rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, Adam for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    if muon_rate <= 0:
        adam.add_param_group({"params": matrices, "weight_decay": 0.1})
        return [adam]
    muon = torch.optim.Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def rate_at(done: float) -> float:
    """Share of the peak learning rate when a share `done` of the time has gone: warm-up, then cosine to 2 %."""
    if done < 0.02:
        return max(done / 0.02, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.02) / 0.98)))


def train(arguments: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Train for `--steps` steps (or until `--minutes` end them early) and save."""
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer, arguments.hidden, arguments.layers, arguments.mlp)
    bias = never_seen_bias(tokenizer)
    roles = tuple(tokenizer.token_to_id(token) for token in (TURN_START, TURN_END, "user"))
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {int((bias < 0).sum())} tokens never seen")
    if arguments.start_from:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(arguments.start_from, dtype=torch.float32).state_dict())
    stream = TextStream(tokenizer, arguments.first_document)
    optimizers = make_optimizers(model, arguments.rate, arguments.muon_rate)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    forward = torch.compile(model.model) if arguments.compile else model.model
    started, tokens = time.perf_counter(), 0
    recent: list[float] = []
    for step, batch in enumerate(stream.batches(arguments.rows), start=1):
        elapsed = time.perf_counter() - started
        share = rate_at(max((step - 1) / arguments.steps, elapsed / (60 * arguments.minutes)))
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * share
        inputs, labels = batch[:, :-1], batch[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = forward(input_ids=inputs).last_hidden_state
            logits = model.lm_head(hidden)
        each = torch.nn.functional.cross_entropy(
            (logits.float() + bias).flatten(0, 1), labels.flatten(), reduction="none"
        )
        weights = loss_weights(batch, roles, arguments.message_weight)[:, 1:].flatten()
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += inputs.numel()
        recent.append(loss.item())
        if step % arguments.log_every == 0 or step == arguments.steps:
            spent = time.perf_counter() - started
            log(
                f"step {step} loss {np.mean(recent):.4f} tokens {tokens} tok/s {tokens / spent:.0f} seconds {spent:.0f}"
            )
            recent = []
        if step % arguments.save_every == 0:
            save(model, tokenizer, arguments.out)
        if step == arguments.steps or time.perf_counter() - started > 60 * arguments.minutes:
            break
    save(model, tokenizer, arguments.out)
    read = f"documents {arguments.first_document} to {stream.next_document}, {stream.bytes_read} bytes"
    log(f"text: {read}, sha256 {stream.digest.hexdigest()}")
    log("every document read held no JSON and no word of a held-out name or town")


def save(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Weights in bfloat16, config, generation config and tokenizer."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.config.use_cache = True
    copy.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    copy.save_pretrained(folder)
    model.config.use_cache = False
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Read the options, open the log, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--message-weight", type=float, default=0.15, help="loss weight of a customer's turn")
    parser.add_argument("--start-from", type=Path, help="folder of a model to train on from")
    parser.add_argument("--first-document", type=int, default=0, help="where in the text to begin")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with arguments.log.open("w", encoding="utf-8") as file:

        def log(line: str) -> None:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

        log(f"python {platform.python_version()} torch {torch.__version__} transformers {transformers.__version__}")
        log(f"tokenizers {tokenizers.__version__} {platform.machine()} threads {arguments.threads}")
        log(
            " ".join(f"{k}={v}" for k, v in vars(arguments).items() if k not in ("out", "log", "start_from"))
            + f" text_seed={SEED}"
        )
        train(arguments, log)


if __name__ == "__main__":
    main()
