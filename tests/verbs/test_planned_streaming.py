"""`charkha plan` of a base that does not fit: streamed of itself, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.cli.app import app
from charkha.errors import ConfigError
from charkha.units import format_bytes
from charkha.verbs.planning import PlanWish, make_plan

GIB = 2**30
KEYS = {
    "layers", "hot_layers", "slots", "host_tables", "waits_in",
    "layer_bytes", "slab_bytes", "device_buffer_bytes", "pinned_bytes",
    "enough_ram_bytes", "micro_batch_rows", "micro_batch_tokens", "moved_bytes_per_micro_step", "at_other_speeds",
    "bytes_per_second", "bytes_per_second_source", "copy_seconds", "compute_seconds", "exposed_seconds",
    "hidden_share", "tokens_per_second", "free_from_tokens", "free_from_rows",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "charkha.yaml").write_text(
        "model: {base: meta-llama/Llama-3.1-70B, quantization: nf4}\n"
        "data: {train: [rows.jsonl], max_length: 2048}\ntraining: {batch_size: 16}\noutput: runs/x\n"
    )
    return tmp_path


def plan(folder: Path, *overrides: str, **machine: Any) -> dict[str, Any]:
    """With a machine of these facts, or one RTX 4090 of which nothing more is known."""
    gpus = ("RTX 4090",)
    if machine:
        (folder / "machine.json").write_text(json.dumps({"gpus": ["RTX 4090"], **machine}))
        gpus = (str(folder / "machine.json"),)
    return make_plan(PlanWish(folder / "charkha.yaml", overrides, gpus, method="closed_form"))


def chosen(record: dict[str, Any], key: str) -> Any:
    return next(choice["value"] for choice in record["choices"] if choice["key"] == key)


def test_a_70b_model_on_a_24_gb_card_is_streamed_of_itself(folder: Path) -> None:
    record = plan(folder)
    streaming = record["streaming"]
    assert record["fits"] is True
    assert chosen(record, "model.placement") == "streamed"
    assert set(streaming) == KEYS
    assert record["least_device_bytes"] < record["device_limit_bytes"]
    assert streaming["enough_ram_bytes"] <= 64 * GIB
    assert streaming["pinned_bytes"] < record["host_ram_bytes"] < streaming["enough_ram_bytes"]
    assert streaming["moved_bytes_per_micro_step"] == (
        2 * (80 - streaming["hot_layers"] - streaming["slots"]) * streaming["layer_bytes"]
    )
    assert [one["bytes_per_second"] for one in streaming["at_other_speeds"]] == [7e9, 12e9, 25e9]
    assert record["tokens_per_second"] == streaming["tokens_per_second"]
    assert any("RAM is enough" in reason for reason in record["reasons"])
    assert any("resident it needs" in reason for reason in record["reasons"])


def test_the_terminal_shows_it(folder: Path) -> None:
    arguments = ["plan", str(folder / "charkha.yaml"), "--gpu", "rtx 4090", "--method", "closed_form"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("the streamed base", "RAM that is enough", "moved in a micro step", "(assumed)", "at 7.0 GB/s"):
        assert text in shown.output


def test_too_little_ram_puts_the_layers_on_the_disk_and_a_slow_disk_is_told(folder: Path) -> None:
    found = plan(folder, "training.micro_batch_size=1", ram_bytes=32 * GIB, disk_read_bytes_per_s=2 * 10**9)
    streaming = found["streaming"]
    assert found["fits"] is True
    assert streaming["waits_in"] == "disk"
    assert streaming["bytes_per_second"] == 2e9
    assert streaming["pinned_bytes"] == 2 * streaming["layer_bytes"]
    assert streaming["hidden_share"] < 0.5
    assert any("hide more of the copying" in reason for reason in found["reasons"])
    assert any("come from the disk in every step" in reason for reason in found["reasons"])
    fast = plan(folder, "training.micro_batch_size=1", ram_bytes=32 * GIB, disk_read_bytes_per_s=7 * 10**9)
    assert fast["streaming"]["tokens_per_second"] > 1.5 * streaming["tokens_per_second"]


def test_auto_prefers_the_micro_batch_that_moves_least_and_a_given_one_stays(folder: Path) -> None:
    own, given = plan(folder), plan(folder, "training.micro_batch_size=1")
    assert own["settings"]["rows"] > 1 == given["settings"]["rows"]
    assert own["tokens_per_second"] >= given["tokens_per_second"]
    moved = [
        one["streaming"]["moved_bytes_per_micro_step"] * one["settings"]["accumulation_steps"] for one in (own, given)
    ]
    assert moved[0] < moved[1]


def with_memory(folder: Path, gib: float, *overrides: str) -> dict[str, Any]:
    """The plan for an RTX 4090 of so much memory."""
    card = {"name": "RTX 4090", "memory_bytes": int(gib * GIB)}
    (folder / "card.json").write_text(json.dumps({"gpus": [card]}))
    return make_plan(PlanWish(folder / "charkha.yaml", overrides, (str(folder / "card.json"),), method="closed_form"))


def test_tables_leave_a_small_card_one_after_the_other(folder: Path) -> None:
    """Embedding and head of a 70B model are 2 GiB each."""
    found = {gib: with_memory(folder, gib) for gib in (24, 13, 11)}
    tables = {gib: record["streaming"]["host_tables"] for gib, record in found.items()}
    assert tables == {24: "none", 13: "embedding", 11: "both"}
    assert {gib: chosen(record, "model.host_tables") for gib, record in found.items()} == tables
    assert all(record["fits"] and 1.12 * record["least_device_bytes"] < gib * GIB for gib, record in found.items())
    head = 128256 * 8192 * 2
    kept = [
        record["breakdown"]["base_weights"] - record["streaming"]["device_buffer_bytes"] for record in found.values()
    ]
    assert kept[0] - kept[1] == kept[1] - kept[2] == head
    smallest = found[11]["streaming"]
    layers = 2 * (80 - smallest["hot_layers"] - smallest["slots"]) * smallest["layer_bytes"]
    assert smallest["moved_bytes_per_micro_step"] == layers + 2 * head + smallest["micro_batch_tokens"] * 8192 * 2
    assert chosen(found[11], "training.loss_head") == "chunked"


@pytest.mark.parametrize(
    ("overrides", "tables"),
    [
        (("training.loss_head=full",), "embedding"),  # a head in blocks never has all logits
        (("model.host_tables=none",), "none"),
        (("model.host_tables=both",), "both"),
        (("adapter.target_modules=[q_proj, lm_head]",), "none"),
    ],
)
def test_tables_are_where_the_config_lets_them_be(folder: Path, overrides: tuple[str, ...], tables: str) -> None:
    record = with_memory(folder, 13, "model.placement=streamed", *overrides)
    assert record["streaming"]["host_tables"] == tables


def test_a_table_that_is_trained_cannot_be_on_the_host(folder: Path) -> None:
    for trained in ("adapter.modules_to_save=[lm_head]", "adapter.target_modules=[q_proj, embed_tokens]"):
        with pytest.raises(ConfigError, match=r"model\.host_tables: both, but \w+ is trained"):
            plan(folder, "model.placement=streamed", "model.host_tables=both", trained)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model.base=mistralai/Mistral-7B-v0.1",), "the whole base fits on the device"),
        (("model.placement=resident",), None),
        (("training.gradient_checkpointing=none",), "runs each layer twice"),
        (("adapter.method=ia3",), "ia3 does not go with"),
        (("adapter.method=full", "model.quantization=none"), "full does not go with"),
    ],
)
def test_what_fits_or_cannot_be_streamed_stays_resident(folder: Path, overrides: tuple[str, ...], reason: str) -> None:
    record = plan(folder, *overrides)
    assert record["streaming"] is None
    assert record["settings"]["streamed"] is False
    if reason is not None:
        assert chosen(record, "model.placement") == "resident"
        assert any(reason in text for text in record["reasons"])


def test_a_machine_with_room_for_neither_is_told_so(folder: Path) -> None:
    (folder / "small.json").write_text(json.dumps({"gpus": [{"name": "RTX 4090", "memory_bytes": 6 * GIB}]}))
    wish = PlanWish(folder / "charkha.yaml", (), (str(folder / "small.json"),), method="closed_form")
    record = make_plan(wish)
    assert record["fits"] is False
    least = make_plan(replace(wish, overrides=("model.placement=streamed",)))["least_device_bytes"]
    assert least > 6 * GIB
    told = f"neither the whole base nor a streamed one fits, which needs {format_bytes(least)} at the least"
    assert any(told in text for text in record["reasons"])
