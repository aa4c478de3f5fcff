"""Cards by name, however it is spelt; a user's own table; a machine file of another computer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from charkha.errors import UsageError
from charkha.hardware import catalog as catalog_file
from charkha.hardware.catalog import UnknownGpu, catalog, find_gpu
from charkha.hardware.machine import Machine
from charkha.hardware.machine_file import machine_of, machine_record, read_machine

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("rtx-3060", "RTX 3060 12GB"),
        ("A100-SXM4-80GB", "A100 80GB"),
        ("a100 40gb", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("m3 max 64gb", "Apple M3 Max 64GB"),
        ("B200", "B200"),
    ],
)
def test_a_card_is_found_however_its_name_is_written(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@pytest.mark.parametrize("asked", ["RTX 4091", "A100 64GB", "rtx 3090 48GB", ""])
def test_an_unknown_card_is_answered_with_the_nearest_names(asked: str) -> None:
    with pytest.raises(UnknownGpu) as caught:
        find_gpu(asked)
    assert caught.value.exit_code == 2
    assert "nearest: " in str(caught.value.remedy)


def test_the_nearest_name_to_a_slip_of_the_finger_is_the_one_meant() -> None:
    with pytest.raises(UnknownGpu, match="RTX 4090"):
        find_gpu("RTX 40900")


def test_no_two_cards_share_a_name_and_every_figure_is_plausible() -> None:
    names = [name for gpu in catalog() for name in (gpu.name, *gpu.aliases)]
    assert len({name.lower() for name in names}) == len(names)
    for gpu in catalog():
        assert 3 * GIB < gpu.memory_bytes < 600 * GIB, gpu.name
        assert 2e12 < gpu.flops < 3e15, gpu.name
        assert 60e9 < gpu.bandwidth_bytes_per_s < 1e13, gpu.name
        assert 15 <= gpu.power_w <= 1500, gpu.name


def test_a_users_table_wins_over_a_row_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "own.csv"
    head = "name,memory_gib,gb_s,tflops,power_w,capability,link_gb_s,pcie_gb_s,kind,aliases\n"
    table.write_text(head + "RTX 4090,48,1008,165,450,8.9,10,22,desktop,4090 48GB\nWonder 1,96,1,9,9,0,1,1,amd,\n")
    monkeypatch.setenv("CHARKHA_GPUS", str(table))
    catalog_file.catalog.cache_clear()
    try:
        assert find_gpu("rtx 4090").memory_bytes == 48 * GIB
        assert find_gpu("wonder-1").capability is None
        table.write_text(head + "RTX 4090,much,1008,165,450,8.9,10,22,desktop,\n")
        catalog_file.catalog.cache_clear()
        with pytest.raises(UsageError, match="much"):
            find_gpu("rtx 4090")
    finally:
        monkeypatch.undo()
        catalog_file.catalog.cache_clear()


@pytest.mark.parametrize(
    "row",
    [
        "X,24,0,9,9,8.9,1,1,desktop,", "X,-24,9,9,9,8.9,1,1,desktop,", "X,24,nan,9,9,8.9,1,1,desktop,",
        "X,inf,9,9,9,8.9,1,1,desktop,", "X,24,9,9,9,9,1,1,desktop,", "X,24,9,9,9,8.9,1,1,toaster,", "X,24,9",
    ],
)  # fmt: skip
def test_a_figure_that_no_card_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    table = tmp_path / "own.csv"
    table.write_text(f"name,memory_gib,gb_s,tflops,power_w,capability,link_gb_s,pcie_gb_s,kind,aliases\n{row}\n")
    monkeypatch.setenv("CHARKHA_GPUS", str(table))
    catalog_file.catalog.cache_clear()
    try:
        with pytest.raises(UsageError, match="row 'X'"):
            find_gpu("X")
    finally:
        monkeypatch.undo()
        catalog_file.catalog.cache_clear()


def test_several_cards_are_one_machine() -> None:
    machine = machine_of(["rtx 3090", "RTX3090", "RTX 4090"])
    assert machine.name == "2 x RTX 3090 + RTX 4090"
    assert machine.gpu is not None
    assert machine.gpu.memory_bytes == find_gpu("RTX 4090").memory_bytes  # 23.65 GiB to the 3090's 23.69
    assert machine.gpu.flops == find_gpu("RTX 3090").flops  # every step waits for the slower card
    old = machine_of(["RTX 3060", "T4"]).gpu
    assert old is not None
    assert not old.has_bf16  # though the card with less memory has it


@pytest.mark.parametrize("names", [["2x RTX 4090"], ["2 x 4090"], ["rtx 4090 x2"], ["4090", "4090"]])
def test_a_count_stands_for_as_many_cards(names: list[str]) -> None:
    assert machine_of(names).name == "2 x RTX 4090"


@pytest.mark.parametrize("name", ["0x RTX 4090", "x RTX 4090", "2x Nonsense"])
def test_a_count_of_nothing_is_no_card(name: str) -> None:
    with pytest.raises(UsageError):
        machine_of([name])


@pytest.mark.parametrize("names", [["M3 Max", "4090"], ["M3 Max", "M3 Max"], ["MI300X", "H100"]])
def test_cards_that_no_run_can_use_together_are_no_machine(names: list[str]) -> None:
    with pytest.raises(UsageError, match="together"):
        machine_of(names)


def test_a_machine_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "office.json"
    path.write_text(json.dumps({"gpus": ["A6000", {"name": "A6000", "memory_bytes": 40 * GIB}], "ram_bytes": 64 * GIB}))
    machine = machine_of([str(path)])
    assert machine.gpu is not None
    assert (machine.name, len(machine.gpus), machine.gpu.memory_bytes) == ("office", 2, 40 * GIB)
    path.write_text(json.dumps(machine_record(machine)))
    assert machine_record(read_machine(path)) == machine_record(machine)


def test_a_machine_file_says_all_that_a_plan_asks_of_that_computer(tmp_path: Path) -> None:
    limited = replace(find_gpu("RTX 4090"), name="RTX 9090", power_w=300.0, pcie_bytes_per_s=6e9)  # in no table
    there = Machine("office", (limited,), 64 * GIB, 0, cpu_flops=8e11, cpu_bf16=True)
    path = tmp_path / "office.json"
    path.write_text(json.dumps(machine_record(there)))
    (gpu,) = read_machine(path).gpus
    assert gpu == replace(limited, aliases=())
    assert replace(read_machine(path), gpus=there.gpus) == there


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[" * 100_000, '{"gpus": [7]}', '{"gpus": [{"name": "A6000", "memory_bytes": "48 GB"}]}',
        '{"gpus": ["A6000"], "ram_gb": 64}', '{"gpus": ["A6000"], "ram_bytes": 64}', '{"gpus": ["M1", "M1"]}',
        '{"gpus": [{"name": "A6000", "flops": NaN}]}', '{"gpus": [{"name": "A6000", "capability": "8.9"}]}',
    ],
)  # fmt: skip
def test_a_machine_file_of_another_form_says_what_to_write(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        machine_of([str(path)])
    assert caught.value.remedy
