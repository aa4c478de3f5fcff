"""Fills the tables of docs/70b-on-24gb.md that are arithmetic: what `charkha plan` says of a 70B model, card by card.

Run: python tools/streaming_tables.py    (a second or two, no network, no GPU)
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from charkha.verbs.planning import PlanWish, make_plan

PAGE = Path(__file__).resolve().parents[1] / "docs/70b-on-24gb.md"
CONFIG = """
model: {base: meta-llama/Llama-3.1-70B, quantization: nf4, dtype: bf16}
adapter: {method: lora, r: 16}
data: {train: [rows.jsonl], max_length: 2048}
training: {batch_size: 16}
output: run
"""
GB, GIB = 1e9, 2**30
LINKS = {
    "PCIe 4.0 x16": 25 * GB,
    "PCIe 4.0 x8, 3.0 x16": 12 * GB,
    "NVMe, sustained": 7 * GB,
}


def plan(gpu: str, *overrides: str, ram_gib: int = 64, disk: float = 5 * GB) -> dict[str, Any]:
    """The answer of `charkha plan` for a machine with one card."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "charkha.yaml").write_text(CONFIG)
        machine = {"gpus": [gpu], "ram_bytes": ram_gib * GIB, "disk_read_bytes_per_s": int(disk)}
        (folder / "machine.json").write_text(json.dumps(machine))
        wish = PlanWish(folder / "charkha.yaml", overrides, (str(folder / "machine.json"),), method="closed_form")
        return make_plan(wish)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Markdown, the first row its head."""
    head, *body = rows
    ruled = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, tuple(ruled), *body))


def links() -> str:
    """One row of 2048 tokens on a 4090 at each speed, no layer staying on the card."""
    found = plan("RTX 4090", "training.micro_batch_size=1")["streaming"]
    rows = [("link to where the layers wait", "seconds to move", "hidden", "tokens/s", "all hidden from")]
    speeds = {round(other["bytes_per_second"]): other for other in found["at_other_speeds"]}
    for name, rate in LINKS.items():
        at = speeds[round(rate)]
        free = f"{at['free_from_tokens']:,} tokens"
        hidden, speed = f"{at['hidden_share']:.0%}", f"{at['tokens_per_second']:.0f}"
        rows.append((f"{name}, {rate / GB:.0f} GB/s", f"{at['copy_seconds']:.1f}", hidden, speed, free))
    return table(rows)


def cards() -> str:
    """What the planner settles on."""
    rows = [("machine", "layers wait in", "micro batch", "layers that stay", "card", "host RAM", "hidden", "tokens/s")]
    for gpu, ram in (("RTX 4090", 64), ("RTX 3090", 64), ("RTX 5090", 64), ("RTX 4090", 32), ("RTX 3090", 32)):
        found = plan(gpu, ram_gib=ram)
        streaming = found["streaming"]
        rows.append(
            (
                f"{gpu}, {ram} GB RAM",
                {"ram": "RAM", "disk": "NVMe at 5 GB/s"}[streaming["waits_in"]],
                f"{streaming['micro_batch_rows']} x 2048",
                f"{streaming['hot_layers']} of {streaming['layers']}",
                f"{found['least_device_bytes'] / GIB:.1f} GiB",
                f"{found['host_ram_bytes'] / GIB:.1f} GiB",
                f"{streaming['hidden_share']:.0%}",
                f"{streaming['tokens_per_second']:.0f}",
            )
        )
    return table(rows)


def memory() -> str:
    """The terms of one row of 2048 tokens on a 4090."""
    found = plan("RTX 4090", "training.micro_batch_size=1")
    streaming, terms = found["streaming"], dict(found["breakdown"])
    buffers = streaming["device_buffer_bytes"]
    terms = {
        f"{streaming['slots']} slots and {streaming['hot_layers']} layers that stay": buffers,
        "embedding, head, norms": terms.pop("base_weights") - buffers,
        **{name.replace("_", " "): size for name, size in terms.items()},
        "reserved beyond live tensors, and the CUDA context": found["least_device_bytes"]
        - found["peak_allocated_bytes"],
    }
    rows = [(name, f"{size / GIB:.2f} GiB") for name, size in terms.items()]
    total = ("least a card must have", f"{found['least_device_bytes'] / GIB:.2f} GiB")
    return table([("on the card", "bytes"), *rows, total])


BLOCKS = {"links": links, "cards": cards, "memory": memory}


def page(text: str) -> str:
    """The page with every block between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, made in BLOCKS.items():
        block = f"<!-- {name} -->\n{made()}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
