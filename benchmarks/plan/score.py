"""Scores the planner's closed form on published measurements and writes docs/plan-accuracy.md.

    python benchmarks/plan/score.py measurements.csv

The table of measurements is not part of this repository; columns are those of the header that `published.py` reads.
Rows are expressed in published.py from what their publishers say, never from the measured number.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from published import Published, Row, read_published

from charkha.plan.device_memory import DeviceMemory, device_memory
from charkha.plan.memory import MemoryPreview, preview_memory
from charkha.plan.speed import step_time

ROOT = Path(__file__).resolve().parents[2]
MISS = 0.12
SPEED_MISS = 0.30
_GIB = 2**30


@dataclass(frozen=True)
class Scored:
    """A row with what was predicted for it. Errors are shares of the published figure."""

    published: Published
    preview: MemoryPreview
    memory: DeviceMemory
    memory_error: float | None
    device_error: float | None
    fits: bool | None
    speed_error: float | None

    @property
    def row(self) -> Row:
        return self.published.row


def score(published: Published) -> Scored:
    """Prediction and errors of one row."""
    preview = preview_memory(published.architecture, published.settings)
    limit = published.gpu.memory_bytes if published.gpu else None
    memory = device_memory(preview, published.settings, limit)
    predicted = {"reserved": memory.reserved, "device": memory.device}.get(published.counter, memory.allocated)
    shown = re.search(r"nvidia-smi peak ([\d.]+) GiB", published.row["notes"])
    measured = published.peak_bytes
    return Scored(
        published=published,
        preview=preview,
        memory=memory,
        memory_error=predicted / measured - 1 if measured else None,
        device_error=memory.device / (float(shown[1]) * _GIB) - 1 if shown and measured else None,
        fits=memory.least <= limit if limit else None,
        speed_error=_speed_error(published),
    )


def _speed_error(published: Published) -> float | None:
    if published.tokens_per_second is None or published.gpu is None:
        return None
    settings = published.speed_settings
    step = step_time(published.architecture, settings, published.gpu).step_seconds(settings.accumulation_steps)
    return settings.accumulation_steps * settings.positions / step / published.tokens_per_second - 1


def summary(errors: list[float]) -> str:
    """`count | median | 90th percentile | bias` of the errors, in percent."""
    if not errors:
        return "0 | - | - | -"
    sizes = sorted(abs(error) for error in errors)
    ninetieth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    bias = statistics.median(errors)
    return f"{len(errors)} | {statistics.median(sizes):.1%} | {ninetieth:.1%} | {bias:+.1%}"


def report(rows: list[Scored], left: list[tuple[Row, str]]) -> str:
    """The page."""
    everything = len(rows) + len(left)
    parts = [
        "# How far off the plan is",
        "Written by `python benchmarks/plan/score.py measurements.csv`; not edited by hand. Figures are those of the "
        "**closed form**, which is what plans for several devices, and for machines without the base model, use. "
        "Errors are predicted / published - 1. Class A rows state everything that decides the number; class B rows "
        "leave something out (lengths, counter, batch), which is then taken from the tool's defaults. Rows are put to "
        "the planner as their publisher's code ran (losses, kernels, versions), in `benchmarks/plan/published.py`. "
        "Only peft-bench's figures include an evaluation, which generates for 50 rows at once and needs less than its "
        "steps; no row states a held-out loss, so none is counted.",
        f"{len(rows)} of {everything} published rows can be put to the planner.",
        "## Memory",
        _table(
            "rows | count | median error | 90th percentile | bias",
            [
                ("class A, allocated", _memory(rows, lambda one: one.row["completeness"] == "A", "allocated")),
                ("class A, reserved", _memory(rows, lambda one: one.row["completeness"] == "A", "reserved")),
                ("class A, reserved, rows of one length", _memory(rows, _one_length, "reserved")),
                ("class A, nvidia-smi", [one.device_error for one in rows if one.device_error is not None]),
                ("class B, any counter", _memory(rows, lambda one: one.row["completeness"] == "B", None)),
                ("2 to 8 cards, allocated", _memory(rows, lambda one: one.row["n_gpus"] != "1", "allocated")),
            ],
        ),
        _by_family(rows),
        "## Does it fit",
        _fit_text(rows),
        "## Tokens per second",
        _table(
            "rows | count | median error | 90th percentile | bias",
            [(f"class {name}", [one.speed_error for one in rows if _speed_of(one, name)]) for name in ("A", "B")]
            + [
                (f"class A, {card}", [one.speed_error for one in rows if _speed_of(one, "A") and _card(one) == card])
                for card in sorted({_card(one) for one in rows if _speed_of(one, "A")})
            ],
        ),
        _nine_of_ten([1 + one.speed_error for one in rows if one.speed_error is not None and _speed_of(one, "A")]),
        "## By library version",
        _by_version(rows),
        "## Misses, one by one",
        f"Memory off by more than {MISS:.0%}, or speed by more than {SPEED_MISS:.0%}; the cause as far as it is known.",
        _misses(rows),
        "## Rows that were not put to the planner",
        "\n".join(f"- {count} x {reason}" for reason, count in Counter(reason for _, reason in left).most_common()),
    ]
    return "\n\n".join(parts) + "\n"


def _nine_of_ten(times: list[float]) -> str:
    """Measured over predicted time: what a plan says that nine of ten runs keep to (plan/history.py)."""
    ordered = sorted(times)
    return f"Nine of ten runs of class A took at most {ordered[int(0.9 * len(ordered))]:.2f} times the predicted time."


def _memory(rows: list[Scored], wanted: Callable[[Scored], bool], counter: str | None) -> list[float]:
    return [
        one.memory_error
        for one in rows
        if one.memory_error is not None and wanted(one) and counter in (None, one.published.counter)
    ]


def _one_length(one: Scored) -> bool:
    varies = re.search("cap|pad|max only", one.row["seq_kind"])
    return one.row["completeness"] == "A" and not varies


def _speed_of(one: Scored, completeness: str) -> bool:
    return one.speed_error is not None and one.row["completeness"] == completeness


def _card(one: Scored) -> str:
    assert one.published.gpu is not None
    return one.published.gpu.name


def _table(head: str, rows: Iterable[tuple[str, list[float] | list[float | None]]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name, errors in rows:
        known = [error for error in errors if error is not None]
        lines.append(f"| {name} | {summary(known)} |")
    return "\n".join(lines)


def _by_family(rows: list[Scored]) -> str:
    keys = sorted({(one.row["family"], one.published.counter) for one in rows if one.memory_error is not None})
    return _table(
        "family, counter | count | median error | 90th percentile | bias",
        [
            (f"{family}, {counter}", _memory(rows, lambda one, family=family: one.row["family"] == family, counter))  # type: ignore[misc]
            for family, counter in keys
        ],
    )


def _by_version(rows: list[Scored]) -> str:
    versions = sorted({one.published.version for one in rows if one.memory_error is not None})
    return _table(
        "version | count | median error | 90th percentile | bias",
        [
            (version, _memory(rows, lambda one, version=version: one.published.version == version, None))  # type: ignore[misc]
            for version in versions
        ],
    )


def _fit_text(rows: list[Scored]) -> str:
    judged = [
        one for one in rows if one.fits is not None and (one.memory_error is not None or one.published.out_of_memory)
    ]
    ran = [one for one in judged if not one.published.out_of_memory]
    ended = [one for one in judged if one.published.out_of_memory]
    refused = [one.row["id"] for one in ran if not one.fits]
    passed = [one.row["id"] for one in ended if one.fits]
    share = len(refused) / max(1, len(ran))
    return (
        f"- Of {len(ended)} published out-of-memory runs, {len(passed)} are called a fit"
        f"{': ' + ', '.join(passed) if passed else ''}.\n"
        f"- Of {len(ran)} published runs that ran, {len(refused)} ({share:.1%}) are called no fit"
        f"{': ' + ', '.join(refused) if refused else ''}."
    )


# Why a row is missed, by what is known of it: (pattern of the id, cause). The first that matches is taken.
_CAUSES = (
    (
        r"fms-a0(68|69|70|71|72|73|74|75)",
        "gpt_bigcode beside a 4-bit base: stream, head and loss ran in fp32 (16 bytes a logit and 4 a hidden element, "
        "by the slope over the batch), which its settings do not say",
    ),
    (
        r"^swift-(3|5)",
        "lengths up to a cap, whose order is not published; ChatGLM and Baichuan have attention of their own, without "
        "FlashAttention's saving",
    ),
    (
        r"^swift",
        "lengths up to a cap: how many outgrown blocks stay reserved depends on how many rows come near it; at 8192 "
        "few do. The lengths and their order are not published",
    ),
    (r"^uns-", "lengths are a cap, not what was trained; datasets of other lengths differ threefold in the same table"),
    (r"^fsdpq-01", "512 tokens: the figure is near that of loading and gathering, not of the step"),
    (
        r"^fsdpq-(13|22)",
        "70B, weights offloaded: less is reserved than live tensors are counted; 10 GiB of these are what entered each "
        "of 80 layers and its gradient, which hooks are taken to keep",
    ),
    (r"^fsdpq", "reserved at the very limit of a 24 GB card, where the allocator gives back what it can"),
    (
        r"^litgpt",
        "litgpt's own GPT-NeoX and Phi modules keep 2 bytes a hidden element and layer more than is explained",
    ),
    (r"^liger-1[2-5]", "gemma-7b in the same table needs less than its fp32 shards would: held in bf16, unlike Llama"),
    (r"^liger", "padded to the longest of a batch of short rows: tokens are counted with or without padding"),
    (r"^tt-0[68]", "405B and offloaded 70B: torchtune gathers and offloads in its own order"),
    (r"^fms-a04[1-7]|^fms-a06[01]", "experts one after another, each with its own launches and a wait for the host"),
    (r"^foundry", "rows of 8,192 to 32,768 tokens with a Triton attention of 2023, slower than today's kernels"),
    (r"^(axo|lf-|ps-|peftdoc|tt-|xtuner)", "class B: lengths, counter or batch are not stated"),
)


def _misses(rows: list[Scored]) -> str:
    lines = ["| row | what | published | predicted | error | cause |", "|---|---|---|---|---|---|"]
    for one in rows:
        cause = next((cause for pattern, cause in _CAUSES if re.search(pattern, one.row["id"])), "not explained")
        if one.memory_error is not None and abs(one.memory_error) > MISS:
            measured = one.published.peak_bytes or 0
            lines.append(
                f"| {one.row['id']} | {one.published.counter} | {measured / _GIB:.2f} GiB | "
                f"{measured * (1 + one.memory_error) / _GIB:.2f} GiB | {one.memory_error:+.0%} | {cause} |"
            )
        if one.speed_error is not None and abs(one.speed_error) > SPEED_MISS:
            rate = one.published.tokens_per_second or 0
            lines.append(
                f"| {one.row['id']} | tokens/s a card | {rate:.0f} | {rate * (1 + one.speed_error):.0f} | "
                f"{one.speed_error:+.0%} | {_speed_cause(one, cause)} |"
            )
    return "\n".join(lines)


def _speed_cause(one: Scored, cause: str) -> str:
    if one.row["family"] == "fms-main" and "santacoder" in one.row["model"]:
        return "a 1 B model at 4,000 to 8,000 tokens a card: launches and fp32 parts (see its memory)"
    return cause


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/plan-accuracy.md")
    arguments = parser.parse_args()
    expressed, left = read_published(arguments.measurements)
    rows = [score(published) for published in expressed]
    arguments.output.write_text(report(rows, left), encoding="utf-8")
    everything = [one.memory_error for one in rows if one.memory_error is not None and one.row["completeness"] == "A"]
    print(f"class A memory: {summary(everything)}  (count | median | 90th percentile | bias)")
    speeds = [one.speed_error for one in rows if one.speed_error is not None and one.row["completeness"] == "A"]
    print(f"class A tokens/s: {summary(speeds)}")
    print(_fit_text(rows))


if __name__ == "__main__":
    main()
