"""The doctor's checks on this machine and on machines that do not exist: invented folders, cards, children, UPSes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from charkha import doctor, doctor_checks
from charkha.doctor import (
    answer,
    check_base,
    check_config,
    diagnose,
    read_subject,
)
from charkha.doctor_checks import (
    Check,
    Memory,
    check_checkpoints,
    check_clock,
    check_cpu_sensor,
    check_hub_cache,
    check_memory,
    check_offline,
    check_packages,
    check_python,
    check_rapl,
    check_startup_files,
    check_telemetry,
    check_torch_build,
    check_ups,
    host_memory,
)
from charkha.doctor_children import ask_child, check_4bit, check_attention, check_cuda
from charkha.doctor_disk import SPEED_FILE, Mount, check_disk, check_disk_speed
from charkha.doctor_gpus import check_driver, check_link
from charkha.doctor_speed import Learned, check_base_disk, check_transfers
from charkha.errors import RunFolderError, UsageError
from charkha.hardware.sensors import PcieLink
from charkha.hardware.speeds import Speeds, remembered_speeds
from charkha.hardware.ups import UpsReading
from charkha.store.checkpoints import CheckpointStore, NewFile
from charkha.store.durable import Disk, use_disk
from charkha.store.runs import RunFolder

GIB = 1 << 30
CONFIG = "model: {base: starter}\ndata: {train: [rows.jsonl]}\noutput: run\n"


# Packages and torch


def test_this_python_serves_and_an_old_one_does_not():
    assert check_python().verdict == "ok"
    old = check_python("3.9.18")
    assert old.verdict == "fail"
    assert "3.11" in old.remedy


def test_packages_are_held_against_the_floors_of_our_own_package():
    assert check_packages().verdict == "ok"
    versions = {"torch": "2.13.0+cpu", "transformers": "5.22.9", "trl": "1.16.0", "peft": "0.21.10"}
    check = check_packages({**versions, "accelerate": "1.15", "bitsandbytes": "0.50.2"}.get)
    assert check.verdict == "fail"
    assert "datasets missing" in check.fact
    assert "transformers 5.23 or newer, datasets 5.2 or newer" in check.remedy
    assert "peft 0.21" not in check.remedy, "0.21.10 is newer than 0.21.2"


@pytest.mark.parametrize(
    ("gpus", "version", "system", "verdict"),
    [
        (0, "2.13.0+cpu", "Linux", "ok"),
        (1, "2.13.0+cpu", "Linux", "fail"),
        (2, "2.13.0", "Linux", "ok"),
        (0, "2.13.0+cu130", "Linux", "ok"),
        (0, "2.13.0", "Darwin", "ok"),
    ],
)
def test_a_cpu_torch_beside_a_gpu_is_a_failure_with_the_command_that_mends_it(gpus, version, system, verdict):
    check = check_torch_build(gpus, version, system)
    assert check.verdict == verdict
    command = "`CHARKHA_TORCH=cuda .venv/bin/python tools/install_torch.py`"
    assert check.remedy == (command if verdict == "fail" else None)


def program(text):
    return "-c", f"import json, os, signal, sys, time\n{text}"


def cards(*capabilities, error="0.003", built_for=("sm_75", "sm_86", "sm_90", "compute_90"), cudnn=91002):
    told = ", ".join(
        f"{{'kind': 'cuda', 'name': 'card', 'capability': {list(one)}, 'error': {error}}}" for one in capabilities
    )
    rest = {"torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": cudnn, "built_for": list(built_for)}
    return program(f"print('noise'); print(json.dumps({{**{rest!r}, 'cards': [{told}]}}))")


CPU = program(
    "card = {'kind': 'cpu', 'name': 'cpu', 'capability': None, 'error': 0.003}\n"
    "rest = {'torch': '2.13.0+cpu', 'cuda': None, 'cudnn': None, 'built_for': []}\n"
    "print(json.dumps({**rest, 'cards': [card]}))"
)


@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), "7.5, no bf16 units, no fp8"), ((8, 6), "8.6, bf16, no fp8"), ((8, 9), "8.9, bf16, fp8")],
)
def test_a_card_is_told_with_what_it_computes_in(capability, words):
    check, _ = check_cuda(1, cards(capability))
    assert words in check.fact
    assert check.verdict == ("warn" if capability < (8, 0) else "ok")


@pytest.mark.parametrize(
    ("capability", "built_for", "verdict"),
    [
        ((8, 9), ("sm_80", "sm_86"), "ok"),
        ((12, 0), ("sm_90", "compute_90"), "ok"),
        ((12, 0), ("sm_80", "sm_90"), "fail"),
        ((7, 0), ("sm_75", "compute_75"), "fail"),
        ((9, 0), ("sm_90a",), "ok"),
    ],
)
def test_a_build_without_kernels_for_the_card_fails(capability, built_for, verdict):
    _, check = check_cuda(1, cards(capability, built_for=built_for))
    assert check.verdict == verdict
    assert "cuDNN 9.10.2" in check.fact
    assert (check.remedy is not None) == (verdict == "fail")


def test_a_wrong_product_fails_even_as_nan():
    assert check_cuda(1, cards((8, 9), error="0.5"))[0].verdict == "fail"
    assert "wrong product" in check_cuda(1, cards((8, 9), error="float('nan')"))[0].fact


def test_a_torch_that_sees_no_gpu_fails_where_the_driver_has_one(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [check.verdict for check in check_cuda(0, CPU)] == ["ok", "ok"]
    check = check_cuda(1, CPU)[0]
    assert (check.verdict, "install_torch.py" in check.remedy) == ("fail", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is '-1'" in check_cuda(1, CPU)[0].remedy


@pytest.mark.parametrize(
    "check",
    [
        lambda text: check_cuda(1, text, 2)[0],
        lambda text: check_4bit(text, 2),
        lambda text: check_attention(1, text, 2),
        lambda text: check_transfers([PcieLink()], Learned(), text, 2)[0],
    ],
)
def test_a_child_that_crashes_is_told_by_its_signal(check):
    crashed = check(program("os.kill(os.getpid(), signal.SIGSEGV)"))
    assert crashed.verdict == "fail"
    assert "crashed with SIGSEGV" in crashed.fact


def test_a_child_that_hangs_is_killed_and_unknown():
    began = time.monotonic()
    (check,) = check_cuda(1, program("time.sleep(60)"), 0.5)
    assert time.monotonic() - began < 5
    assert (check.verdict, "no answer within 0.5 s" in check.fact) == ("unknown", True)


def test_a_child_that_raises_is_told_by_its_error_not_by_the_advice_below_it():
    text = "raise RuntimeError('CUDA error: no kernel image\\nCompile with TORCH_USE_CUDA_DSA')"
    assert "RuntimeError: CUDA error: no kernel image" in check_cuda(1, program(text))[0].fact
    assert "exit code 3" in check_4bit(program("os._exit(3)")).fact
    assert "no JSON" in check_4bit(program("print('hello')")).fact


def test_a_child_imports_nothing_that_lies_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "numbers.py").write_text("raise SystemExit('the wrong file')\n")
    monkeypatch.chdir(tmp_path)
    assert ask_child(("-c", "import numbers; print(1)"), 20) == 1


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ("{'cuda:0': {'back': 0.092, 'product': 0.001}}", "ok"),
        ("{'cuda:0': {'back': 0.092, 'product': 0}, 'cuda:1': {'back': 0.9, 'product': 0}}", "fail"),
        ("{'cuda:0': {'back': 0.092, 'product': 0.3}}", "fail"),
        ("{'cuda:0': {'back': float('nan'), 'product': 0.0}}", "fail"),
        ("{}", "fail"),
    ],
)
def test_4bit_kernels_must_come_back_close_and_multiply_right(errors, verdict):
    assert check_4bit(program(f"print(json.dumps({errors}))")).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "package", "verdict", "words"),
    [
        (0.004, None, "ok", "the package flash-attn is not installed"),
        (0.004, 0.005, "ok", "the package flash-attn within 0.5%"),
        (0.004, "ImportError: undefined symbol", "warn", "does not run (ImportError: undefined symbol)"),
        (0.004, 0.6, "fail", "within 60.0%"),
        ("RuntimeError: No available kernel.", None, "ok", "torch's FlashAttention does not run"),
        (float("nan"), None, "fail", "within nan%"),
    ],
)
def test_attention_kernels_must_agree_with_plain_attention(ours, package, verdict, words):
    told = repr([{"name": "card", "torch": ours, "package": package}]).replace("nan", "float('nan')")
    check = check_attention(1, program(f"print(json.dumps({{'cards': {told}}}))"))
    assert check.verdict == verdict
    assert words in check.fact
    assert (check.remedy is None) == (verdict == "ok")


def test_without_a_gpu_no_child_is_asked_for_attention_or_copies():
    assert check_attention(0, program("sys.exit(1)")).verdict == "ok"
    assert check_transfers([], Learned(), program("sys.exit(1)"))[0].verdict == "ok"


# Speeds


def transfers(*cards, pairs=()):
    told = [{"to_device": to * 1e9, "to_host": back * 1e9} for to, back in cards]
    between = [{"from": 0, "to": 1, "direct": direct, "bytes_per_s": rate * 1e9} for direct, rate in pairs]
    return program(f"print(json.dumps({{'cards': {told}, 'pairs': {between}}}))")


GEN4 = PcieLink(4, 16, 4, 16)


def test_copies_are_held_against_what_the_link_carries():
    learned = Learned()
    (check,) = check_transfers([GEN4], learned, transfers((25, 24)))
    assert (check.verdict, check.fact) == ("ok", "23.3 GiB/s to the card, 22.4 GiB/s back (pinned memory)")
    assert learned.host_to_device_bytes_per_s == 25e9
    (slow,) = check_transfers([GEN4], learned, transfers((6, 6)))
    assert (slow.verdict, "of 29.3 GiB/s" in slow.fact) == ("warn", True)
    assert check_transfers([PcieLink()], learned, transfers((6, 6)))[0].verdict == "ok"
    assert check_transfers([GEN4], learned, transfers())[0].verdict == "unknown"


def test_of_several_cards_the_slowest_is_remembered_and_copies_between_them_are_told():
    learned = Learned()
    _, pairs = check_transfers([GEN4, GEN4], learned, transfers((25, 24), (12, 11), pairs=[(False, 5), (False, 6)]))
    assert (learned.host_to_device_bytes_per_s, learned.device_to_host_bytes_per_s) == (12e9, 11e9)
    assert (pairs.verdict, "0 of 2 pairs" in pairs.fact) == ("warn", True)
    _, linked = check_transfers([GEN4] * 2, learned, transfers((25, 24), (25, 24), pairs=[(True, 90), (True, 90)]))
    assert (linked.verdict, linked.remedy) == ("ok", None)


def test_what_was_measured_is_what_the_next_plan_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_HISTORY", str(tmp_path / "memory"))
    Learned(25e9, 24e9, {tmp_path: 3e9}).remember(["RTX 4090"])
    Learned(disks={tmp_path: 2e9}).remember([])
    assert remembered_speeds(["RTX 4090"], tmp_path) == Speeds(25e9, 24e9, 2e9)
    Learned().remember(["RTX 3090"])
    monkeypatch.setenv("CHARKHA_HISTORY", "off")
    Learned(25e9, 24e9).remember(["RTX 4090"])


def test_the_disk_of_the_weights_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    learned = Learned()
    assert check_base_disk(None, learned).verdict == "ok"
    assert not learned.disks
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(os.urandom(1 << 20) * 64)
    check = check_base_disk(tmp_path, learned)
    assert check.verdict in ("ok", "warn")
    assert "read in sequence" in check.fact
    assert learned.disks[tmp_path] > 0
    monkeypatch.setattr("charkha.doctor_speed.disk_read_bytes_per_s", lambda path: 100e6)
    assert "NVMe" in check_base_disk(tmp_path, learned).remedy


@pytest.mark.parametrize(
    ("link", "verdict", "words"),
    [
        (PcieLink(4, 16, 4, 16), "ok", "PCIe 4.0 x16"),
        (PcieLink(1, 16, 4, 16), "ok", "1.0 x16 while it rests"),
        (PcieLink(4, 16, 4, 16, nvlinks=4), "ok", "4 NVLink up"),
        (PcieLink(4, 4, 4, 16), "warn", "but 4 lanes now"),
        (PcieLink(3, 4, 3, 4), "warn", "PCIe 3.0 x4"),
        (PcieLink(3, 8, 3, 8), "ok", "PCIe 3.0 x8"),
        (PcieLink(), "unknown", "does not tell"),
    ],
)
def test_a_link_is_told_and_lost_lanes_are_warned_of(link, verdict, words):
    check = check_link(0, link)
    assert check.verdict == verdict
    assert words in check.fact


# GPUs through NVML

MORE_OF_THE_STAND_IN = """
#include "{source}"
typedef struct {{ unsigned long long total, free, used; }} memory_t;
int nvmlDeviceGetMemoryInfo(device_t d, memory_t *out) {{
    long long total = 0, left = 0;
    int code = number("memory_total", index_of(d), &total);
    if (code == SUCCESS) code = number("memory_free", index_of(d), &left);
    out->total = total; out->free = left; out->used = total - left;
    return code;
}}
int nvmlDeviceGetPowerManagementLimit(device_t d, unsigned *out) {{ return unsigned_of("power_limit_mw", d, out); }}
int nvmlSystemGetDriverVersion(char *out, unsigned size) {{
    return find("driver", -1, out, size) ? SUCCESS : NOT_SUPPORTED;
}}
int nvmlSystemGetCudaDriverVersion(int *out) {{
    long long value = 0;
    int code = number("cuda", -1, &value);
    *out = (int)value;
    return code;
}}
"""
ASK = """
import json
from dataclasses import asdict
from functools import partial
from charkha.doctor import answer
from charkha.doctor_checks import Memory, check_memory
from charkha.doctor_gpus import check_driver, check_gpu, check_peers, gpu_memory
from charkha.hardware.sensors import open_nvml
nvml = open_nvml()
checks = answer("nvidia driver", lambda: check_driver(nvml))
for index in range(nvml.count):
    checks += answer(f"gpu {index}", partial(check_gpu, nvml, index))
checks += answer("gpu peers", lambda: check_peers(nvml))
sizes = [gpu_memory(index) for index in range(nvml.count)]
checks += answer("memory", lambda: check_memory(sizes, Memory(16 << 30, 8 << 30, 0)))
print(json.dumps({check.name: asdict(check) for check in checks}))
"""
CARD = {
    "count": 1, "name": "NVIDIA GeForce RTX 4090", "uuid": "GPU-1", "temperature_c": 67, "power_limit_mw": 450000,
    "power_default_mw": 450000, "event_reasons": 0x4, "slowdown_c": 97, "memory_total": 24 * GIB,
    "memory_free": 23 * GIB, "driver": "580.95", "cuda": 13010,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    stand_in = Path(__file__).parent / "hardware/nvml_stand_in.c"
    source = folder / "more.c"
    source.write_text(MORE_OF_THE_STAND_IN.format(source=stand_in))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


@pytest.fixture
def examine(library, tmp_path):
    """`examine(**changes)`: the checks, by name, of a fresh process that sees cards in that state."""

    def run(**changes):
        path = tmp_path / "state"
        state = {**CARD, **{key.replace("__", "."): value for key, value in changes.items()}}
        path.write_text("".join(f"{key}={value}\n" for key, value in state.items() if value is not None))
        environ = os.environ | {"LD_LIBRARY_PATH": str(library), "NVML_STAND_IN": str(path)}
        done = subprocess.run([sys.executable, "-c", ASK], env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), path.read_text()

    return run


def test_a_sound_card_is_told_with_memory_heat_and_power(examine):
    checks, _ = examine()
    assert checks["nvidia driver"] == {
        "name": "nvidia driver", "fact": "580.95, 1 GPU, speaks CUDA 13.1", "verdict": "ok", "remedy": None,
    }  # fmt: skip
    assert (
        checks["gpu 0"]["fact"]
        == "NVIDIA GeForce RTX 4090, 24 GiB, 23 GiB free, 67 °C (slows down at 97), 30 of margin"
    )
    assert checks["gpu 0"]["verdict"] == "ok"
    assert checks["gpu 0 slowdown"] == {
        "name": "gpu 0 slowdown", "fact": "sw_power_cap", "verdict": "ok", "remedy": None,
    }  # fmt: skip
    assert checks["gpu 0 memory temperature"]["verdict"] == "unknown"
    assert checks["memory"]["verdict"] == "warn"
    assert "0.7 times the largest GPU's 24 GiB" in checks["memory"]["fact"]


def test_the_right_to_set_the_power_limit_is_tried_with_the_limit_as_it_is(examine):
    refused, _ = examine(power_limit_mw=300000)
    assert refused["gpu 0 power limit"]["verdict"] == "warn"
    assert "300 W, 450 W as delivered; only root" in refused["gpu 0 power limit"]["fact"]
    allowed, state = examine(power_limit_mw=300000, set_limit=0)
    assert allowed["gpu 0 power limit"]["verdict"] == "ok"
    assert state.endswith("power_limit_mw.0=300000\n")


def test_heat_a_brake_a_full_memory_and_an_old_driver_are_warned_of(examine):
    checks, _ = examine(temperature_c=93, event_reasons=0xC4, cuda=12040, field82=101)
    names = ["gpu 0", "gpu 0 slowdown", "gpu 0 memory temperature", "nvidia driver"]
    assert [checks[name]["verdict"] for name in names] == ["warn"] * 4
    assert "power supply" in checks["gpu 0 slowdown"]["remedy"]
    assert "580" in checks["nvidia driver"]["remedy"]
    assert "nvidia-smi" in examine(memory_free=2 * GIB)[0]["gpu 0"]["remedy"]


def test_a_lost_card_and_one_that_cannot_be_read_hide_no_other(examine):
    checks, _ = examine(count=3, handle__0="error:15", handle__1="error:999")
    assert checks["gpu 0"]["verdict"] == "fail"
    assert checks["gpu 0"]["remedy"].startswith("cold restart")
    assert checks["gpu 1"]["verdict"] == "unknown"
    assert checks["gpu 2"]["verdict"] == "ok"


def test_a_card_that_tells_nothing_is_unknown(examine):
    silent = dict.fromkeys(("name", "temperature_c", "memory_total", "power_limit_mw", "slowdown_c", "driver", "cuda"))
    checks, _ = examine(**silent)
    assert checks["gpu 0"]["fact"] == "name unknown, memory unknown, temperature unknown"
    assert [checks[name]["verdict"] for name in ("gpu 0", "gpu 0 power limit")] == ["unknown", "unknown"]
    assert checks["nvidia driver"]["verdict"] == "ok"


def test_the_link_of_a_card_is_read_through_the_driver(examine):
    told = {"pcie_generation": 1, "pcie_width": 16, "pcie_most_generation": 4, "pcie_most_width": 16}
    checks, _ = examine(**told)
    assert (checks["gpu 0 link"]["verdict"], checks["gpu 0 link"]["fact"]) == (
        "ok", "PCIe 4.0 x16, 1.0 x16 while it rests",
    )  # fmt: skip
    lost, _ = examine(**told | {"pcie_width": 8, "nvlink0": 1, "nvlink3": 1})
    assert (lost["gpu 0 link"]["verdict"], "2 NVLink up, but 8 lanes" in lost["gpu 0 link"]["fact"]) == ("warn", True)
    silent, _ = examine()
    assert silent["gpu 0 link"]["verdict"] == "unknown"


def test_cards_that_reach_each_other_are_counted(examine):
    assert examine(count=3, p2p_read=0)[0]["gpu peers"]["fact"] == "3 of 3 pairs may read each other's memory"
    apart, _ = examine(count=2, p2p_read=3)
    assert (apart["gpu peers"]["verdict"], "GeForce" in apart["gpu peers"]["remedy"]) == ("ok", True)
    assert examine(count=2)[0]["gpu peers"]["verdict"] == "unknown"


def test_a_card_on_the_bus_without_a_driver_fails(tmp_path):
    assert check_driver(None, tmp_path).verdict == "ok"
    for name, vendor, kind in (("a", "0x10de", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    check = check_driver(None, tmp_path)
    assert (check.verdict, check.fact[:12]) == ("fail", "1 NVIDIA GPU")
    assert check_driver(TimeoutError("no answer within 20 s"), tmp_path).verdict == "fail"


# Memory and disk


@pytest.mark.parametrize(
    ("gpus", "memory", "verdict"),
    [
        ([], Memory(16 * GIB, 8 * GIB, 0), "ok"),
        ([(24 * GIB, 0), None], Memory(64 * GIB, 50 * GIB, GIB), "ok"),
        ([(24 * GIB, 0), (80 * GIB, 0)], Memory(64 * GIB, 50 * GIB, 0), "warn"),
        ([(24 * GIB, 0)], Memory(64 * GIB, 50 * GIB, 0, limit=16 * GIB), "warn"),
        ([], Memory(16 * GIB, GIB, 0), "warn"),
    ],
)
def test_memory_is_held_against_the_largest_gpu(gpus, memory, verdict):
    assert check_memory(gpus, memory).verdict == verdict


def test_the_limit_of_a_container_is_read(tmp_path):
    assert host_memory(tmp_path).limit is None
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path).limit is None
    (tmp_path / "memory.max").write_text("536870912\n")
    assert host_memory(tmp_path).limit == 1 << 29


@pytest.fixture
def block(tmp_path):
    """sysfs with a spinning sda that has a partition sda1, and an nvme0n1."""
    folder = tmp_path / "class/block"
    folder.mkdir(parents=True)
    for name, flag in (("sda", "1"), ("nvme0n1", "0")):
        queue = tmp_path / "devices" / name / "queue"
        queue.mkdir(parents=True)
        (queue / "rotational").write_text(f"{flag}\n")
        (folder / name).symlink_to(queue.parent)
    (tmp_path / "devices/sda/sda1").mkdir()
    (folder / "sda1").symlink_to(tmp_path / "devices/sda/sda1")
    return folder


class Sized(Disk):
    def __init__(self, free):
        self.free = free

    def free_bytes(self, path):
        return self.free


@pytest.mark.parametrize(
    ("device", "kind", "verdict", "words"),
    [
        ("/dev/nvme0n1", "ext4", "ok", "ext4, solid state, 100 GiB free"),
        ("/dev/sda1", "xfs", "ok", "a spinning disk"),
        ("server:/home", "nfs4", "warn", "a network file system"),
        ("C:\\", "9p", "warn", "/mnt/c"),
        ("tmpfs", "tmpfs", "warn", "a power cut empties"),
        ("overlay", "overlay", "warn", "container"),
    ],
)
def test_the_disk_is_told_by_file_system_and_kind(tmp_path, block, device, kind, verdict, words):
    mounts = [Mount("/dev/other", "/", "btrfs"), Mount(device, str(tmp_path), kind)]
    with use_disk(Sized(100 * GIB)):
        check = check_disk(tmp_path, mounts, block)
    assert check.verdict == verdict
    assert words in check.fact


def test_of_two_mounts_in_one_place_the_later_one_counts(tmp_path, block):
    point = str(tmp_path)
    with use_disk(Sized(100 * GIB)):
        check = check_disk(tmp_path, [Mount("a", point, "ext4"), Mount("b", point, "xfs")], block)
    assert ": xfs, 100 GiB free" in check.fact


@pytest.mark.parametrize(("free", "verdict"), [(GIB // 2, "fail"), (5 * GIB, "warn"), (50 * GIB, "ok")])
def test_a_small_disk_is_warned_of_and_a_full_one_fails(tmp_path, block, free, verdict):
    with use_disk(Sized(free)):
        assert check_disk(tmp_path, [Mount("a", "/", "ext4")], block).verdict == verdict


def test_the_disk_is_measured_and_nothing_is_left_behind(tmp_path):
    rates = {}
    check = check_disk_speed(tmp_path, rates, size=16 << 20)
    assert check.verdict in ("ok", "warn")
    assert "checkpoint of 1 GiB in" in check.fact
    assert "fsync" in check.fact
    assert rates[tmp_path] > 0
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_fails_and_leaves_nothing(tmp_path):
    class Broken(Disk):
        def sync(self, file):
            raise OSError(5, "Input/output error")

    with use_disk(Broken()):
        check = check_disk_speed(tmp_path, {}, size=1 << 20)
    assert (check.verdict, "Input/output error" in check.fact) == ("fail", True)
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_is_warned_of_and_a_full_one_is_not_written(tmp_path):
    class Slow(Disk):
        def sync(self, file):
            time.sleep(0.11)

    with use_disk(Slow()):
        assert check_disk_speed(tmp_path, {}, size=1 << 20).verdict == "warn"
    with use_disk(Sized(GIB)):
        assert check_disk_speed(tmp_path, {}).verdict == "unknown"


# UPS and sensors


def test_a_ups_is_told_with_how_long_a_run_could_hold_out():
    told = """command:sh -c 'echo "{\\"charge\\": 0.8, \\"runtime_s\\": 600}"'"""
    check = check_ups(told)
    assert check.verdict == "ok"
    assert "mains on, charge 80%, by its own word 10 min, paused about 50 min" in check.fact


def test_a_ups_on_battery_or_silent_is_warned_of_and_none_is_the_owners_word(tmp_path):
    on_battery = check_ups("command:sh -c 'exit 1'")
    assert (on_battery.verdict, "on battery" in on_battery.fact) == ("warn", True)
    silent = check_ups(f"command:{tmp_path}/missing")
    assert (silent.verdict, "unknown, No such file" in silent.fact) == ("warn", True)
    assert check_ups("none").verdict == "ok"


def test_no_ups_names_the_ways_to_connect_one(monkeypatch):
    monkeypatch.setattr("psutil.sensors_battery", lambda: None, raising=False)
    check = check_ups("auto", nut_port=1, apc_port=1)
    assert check.verdict == "warn"
    assert all(word in check.remedy for word in ("NUT", "apcupsd", "command:"))


def test_the_flags_of_a_ups_in_trouble_are_words(monkeypatch):
    class Ups:
        source = "nut"

        def read(self):
            return UpsReading("nut", "online", charge=1.0, flags=frozenset({"RB", "CHRG"}))

    monkeypatch.setattr(doctor_checks, "open_ups", lambda setting: Ups())
    check = check_ups("auto")
    assert check.verdict == "warn"
    assert "says CHRG RB" in check.fact
    assert "battery wants replacing" in check.fact


def test_the_processor_is_told_where_it_can_be_read(tmp_path):
    assert [check_cpu_sensor(lambda: value).verdict for value in (None, 61.0, 96.0)] == ["unknown", "ok", "warn"]  # noqa: B023
    assert check_rapl(tmp_path).verdict == "unknown"
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1\n")
    assert check_rapl(tmp_path).fact == "RAPL of 2 packages can be read"


def test_a_counter_that_only_root_may_read_says_how_to_open_it(tmp_path, monkeypatch):
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("1\n")

    def refuse(path, *arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # these tests may run as root, who reads everything
    check = check_rapl(tmp_path)
    assert (check.verdict, "root" in check.remedy) == ("warn", True)


# Network, start of Python, clock


def test_offline_and_telemetry_are_read_from_the_environment():
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    assert check_offline(offline).verdict == "ok"
    left = check_offline({**offline, "TRANSFORMERS_OFFLINE": "0"})
    assert (left.verdict, left.remedy) == ("warn", "`export TRANSFORMERS_OFFLINE=1`")
    telemetry = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "DISABLE_TELEMETRY": "YES"}
    assert [check_telemetry(environ).verdict for environ in (telemetry, {})] == ["ok", "warn"]


def test_the_hub_cache_is_told_with_its_size_counted_once(tmp_path):
    environ = {"HF_HOME": str(tmp_path)}
    assert "nothing there yet" in check_hub_cache(environ).fact
    model = tmp_path / "hub/models--a--b"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots/c").mkdir(parents=True)
    (model / "blobs/x").write_bytes(bytes(2 << 20))
    (model / "snapshots/c/model.safetensors").symlink_to(model / "blobs/x")
    assert check_hub_cache(environ).fact == f"{tmp_path}/hub: 1 model, 2 MiB"


def test_a_pth_file_that_runs_code_is_named_unless_an_installer_wrote_it(tmp_path):
    (tmp_path / "distutils-precedence.pth").write_text("import os; os\n")
    (tmp_path / "_virtualenv.pth").write_text("import _virtualenv")
    (tmp_path / "__editable___x_finder.pth").write_text("import __editable___x_finder\n")
    (tmp_path / "paths.pth").write_text("# import this is a comment\n/opt/important\n")
    assert check_startup_files([tmp_path, tmp_path / "missing"], tmp_path).verdict == "ok"
    (tmp_path / "litellm_init.pth").write_text("\nimport os, subprocess; subprocess\n")
    check = check_startup_files([tmp_path], tmp_path)
    assert check.verdict == "warn"
    assert check.fact.endswith(f": {tmp_path}/litellm_init.pth")


def test_a_file_here_that_hides_a_package_is_named(tmp_path):
    (tmp_path / "datasets.py").touch()
    check = check_startup_files([], tmp_path)
    assert (check.verdict, "datasets.py" in check.fact) == ("warn", True)


def test_a_clock_that_was_set_back_is_warned_of():
    assert check_clock().verdict == "ok"
    assert check_clock(0.0).verdict == "warn"


# A run or a config


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config_path.write_text(CONFIG)
    return folder


def save(run, *steps):
    store = CheckpointStore(run.path)
    return [store.save(step, [NewFile("adapter.safetensors", 1000, lambda: [bytes(1000)])]) for step in steps]


def test_checkpoints_are_verified_and_those_passed_over_are_named(run):
    assert [check.fact for check in check_checkpoints(run, 2)] == ["none yet"]
    first, second = save(run, 10, 20)
    sound, room = check_checkpoints(run, 2)
    assert (sound.verdict, sound.fact) == ("ok", "step 20 verified, 1000 B")
    assert room.verdict == "ok"
    (second.path / "adapter.safetensors").write_bytes(b"damaged")
    passed, _ = check_checkpoints(run, 2)
    assert passed.verdict == "warn"
    assert passed.fact.startswith("step 10 verified")
    assert "step-000020 passed over: adapter.safetensors has 7 bytes" in passed.fact
    (first.path / "adapter.safetensors").unlink()
    (none,) = check_checkpoints(run, 2)
    assert none.verdict == "fail"


@pytest.mark.parametrize(("free", "verdict"), [(3000, "ok"), (1999, "warn"), (999, "fail")])
def test_room_is_held_against_the_checkpoints_to_come(run, free, verdict):
    save(run, 10)
    with use_disk(Sized(free)):
        _, room = check_checkpoints(run, 2)
    assert room.verdict == verdict
    assert "2 kept and one being written need 1.95 KiB more" in room.fact


def test_a_config_is_told_valid_or_with_every_problem(tmp_path):
    path = tmp_path / "charkha.yaml"
    path.write_text(CONFIG)
    subject = read_subject(path)
    assert check_config(path, subject.config).verdict == "ok"
    assert check_base(subject.config, tmp_path).verdict == "ok"
    assert (subject.folder, subject.run) == (tmp_path, None)
    path.write_text(CONFIG + "training: {lerning_rate: 1}\nx: 1\n")
    broken = check_config(path, read_subject(path).config)
    assert broken.verdict == "fail"
    assert "training.lerning_rate" in broken.fact
    assert "x: " in broken.fact


def test_a_base_model_that_is_not_here_or_has_no_weights_fails(tmp_path):
    path = tmp_path / "charkha.yaml"
    path.write_text(CONFIG.replace("starter", "author/name"))
    missing = check_base(read_subject(path).config, tmp_path)
    assert (missing.verdict, "charkha fetch author/name" in missing.remedy) == ("fail", True)
    (tmp_path / "author/name").mkdir(parents=True)
    (tmp_path / "author/name/pytorch_model.bin").touch()
    assert "no safetensors" in check_base(read_subject(path).config, tmp_path).fact


def test_a_target_is_a_run_its_config_or_refused(tmp_path, run):
    assert read_subject(run.path).run is not None
    outer = tmp_path / "charkha.yaml"
    outer.write_text(CONFIG)
    assert read_subject(outer).run.path == run.path
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunFolderError):
        read_subject(empty)
    with pytest.raises(UsageError):
        read_subject(tmp_path / "missing")


# All together


def test_a_check_that_raises_or_hangs_is_unknown_with_what_happened():
    def broken():
        raise ZeroDivisionError("of an invented driver")

    assert answer("x", broken) == [
        Check("x", "could not be checked: ZeroDivisionError: of an invented driver", "unknown")
    ]
    (hung,) = answer("x", lambda: time.sleep(30), limit_s=0.1)
    assert (hung.verdict, "no answer within 0.1 s" in hung.fact) == ("unknown", True)


def test_one_broken_check_hides_no_other(tmp_path, monkeypatch, run):
    def broken(*arguments):
        raise OSError("broken")

    save(run, 10)
    monkeypatch.setattr(doctor, "open_nvml", broken)
    monkeypatch.setattr(doctor, "check_cuda", broken)
    monkeypatch.setattr(doctor, "check_4bit", lambda: Check("4-bit kernels", "stands for the child", "ok"))
    monkeypatch.setattr(doctor_checks, "check_ups", broken)
    seen = []
    checks = {check.name: check for check in diagnose(run.path, seen.append)}
    assert checks["cuda"].verdict == checks["ups"].verdict == "unknown"
    assert checks["nvidia driver"].verdict == "fail"
    assert checks["checkpoints"].verdict == "ok"
    assert len({"python", "packages", "memory", "disk speed", "clock", "base model"} & set(checks)) == 6
    assert seen[:2] == ["python", "packages"]
    assert seen[-1] == "checkpoints"
    assert {"attention", "gpu transfer", "weights disk"} <= set(checks)


def test_an_interrupted_measurement_leaves_no_file(run, monkeypatch):
    (run.path / SPEED_FILE).touch()

    def interrupt(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(run.path, interrupt)
    assert not (run.path / SPEED_FILE).exists()
