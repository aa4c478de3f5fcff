"""What `charkha doctor` asks of a machine apart from GPUs and disks: packages, memory, UPS, sensors, network, clock.

Each function answers one question with a Check. It takes the places that it looks at as arguments, so that tests can
show it machines that do not exist, and it may raise: `doctor.diagnose` turns that into "unknown".
"""

from __future__ import annotations

import os
import platform
import re
import site
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from charkha.caches import hub_cache
from charkha.hardware.sensors import cpu_temperature_c
from charkha.hardware.ups import UpsReading, open_ups
from charkha.store import durable
from charkha.store.checkpoints import CheckpointStore
from charkha.store.runs import RunFolder
from charkha.units import format_bytes, format_seconds

Verdict = Literal["ok", "warn", "fail", "unknown"]
INSTALL_CUDA_TORCH = "CHARKHA_TORCH=cuda .venv/bin/python tools/install_torch.py"
_REINSTALL = "`make setup` in charkha's folder installs the locked versions"
_LEADING = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY")
_ON = {"1", "on", "yes", "true"}
_GIB = 1 << 30
# Paused, the GPU idles: a machine of 600 W then draws about 150 W, and a battery gives more at a lower rate.
_PAUSED_LASTS_TIMES = 5
_BY_INSTALLERS = re.compile(r"distutils-precedence\.pth|_virtualenv\.pth|__editable__.*\.pth")
_UPS_TROUBLE = {
    "RB": "its battery wants replacing",
    "OVER": "it is overloaded",
    "BYPASS": "it is in bypass and protects nothing",
    "OFF": "its output is off",
    "ALARM": "it raises an alarm",
    "CAL": "it calibrates its battery",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor. `remedy` is what to do about it, None where there is nothing to do."""

    name: str
    fact: str
    verdict: Verdict
    remedy: str | None = None


def check_python(version: str | None = None) -> Check:
    """The Python that runs this against the one that charkha's package asks for."""
    version = version or platform.python_version()
    floor = str(metadata.metadata("charkha")["Requires-Python"]).removeprefix(">=")
    old = _numbers(version) < _numbers(floor)
    remedy = f"make the environment anew with Python {floor} or newer: `make setup PYTHON=python3.12`" if old else None
    return Check("python", f"{version} at {sys.executable}", "fail" if old else "ok", remedy)


def installed_version(package: str) -> str | None:
    """From the package's metadata, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_packages(installed: Callable[[str], str | None] = installed_version) -> Check:
    """The packages that train, against the oldest versions that charkha's own package allows."""
    told, wrong = [], []
    for package, floor in _floors():
        version = installed(package)
        told.append(f"{package} {version or 'missing'}")
        if version is None or _numbers(version) < _numbers(floor):
            wrong.append(f"{package} {floor} or newer")
    if wrong:
        return Check("packages", ", ".join(told), "fail", f"{_REINSTALL}; needed: {', '.join(wrong)}")
    return Check("packages", ", ".join(told), "ok")


def _floors() -> Iterator[tuple[str, str]]:
    for requirement in metadata.requires("charkha") or []:
        rule, _, condition = requirement.partition(";")
        match = re.fullmatch(r"\s*([\w.-]+)\s*>=\s*([\d.]+)\s*", rule)
        elsewhere = "platform_system" in condition and platform.system() in condition  # `!= "Darwin"` on a Mac
        if match and match[1] in _LEADING and not elsewhere:
            yield match[1], match[2]


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cu130` -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def check_torch_build(gpus: int, version: str | None = None, system: str | None = None) -> Check:
    """Whether torch was built for what is here: `gpus` is how many the NVIDIA driver has."""
    version, system = version or installed_version("torch"), system or platform.system()
    if version is None:
        return Check("torch build", "torch is not installed", "fail", _REINSTALL)
    local = version.partition("+")[2]
    build = "mac" if system == "Darwin" else "cpu" if local.startswith("cpu") else "rocm" if "rocm" in local else "cuda"
    if gpus and build != "cuda":
        fact = f"{version}, the {build} build, beside {_gpus(gpus)}, which it cannot use"
        return Check("torch build", fact, "fail", f"`{INSTALL_CUDA_TORCH}`")
    here = _gpus(gpus) if gpus else "no NVIDIA GPU here"
    return Check("torch build", f"{version}, the {build} build; {here}", "ok")


def _gpus(count: int) -> str:
    return f"{count} NVIDIA GPU{'s' * (count != 1)}"


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes; `limit` is what a container allows, None without one."""

    total: int
    available: int
    swap: int
    limit: int | None = None


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """This machine's memory, and the limit of the control group (version 2 or 1) that this process is in."""
    import psutil

    ram, limit = psutil.virtual_memory(), None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = cgroup / name
        told = path.read_text().strip() if path.is_file() else "max"
        if told.isdigit() and int(told) < ram.total:
            limit = int(told)
    return Memory(ram.total, ram.available, psutil.swap_memory().total, limit)


def check_memory(gpus: Sequence[tuple[int, int] | None], memory: Memory | None = None) -> Check:
    """Host memory against the largest GPU's (total and free of each): loading, merging, offloading go through it."""
    memory, gpu_bytes = memory or host_memory(), max((gpu[0] for gpu in gpus if gpu), default=0)
    usable = memory.total if memory.limit is None else memory.limit
    swap = f"{format_bytes(memory.swap)} swap" if memory.swap else "no swap"
    fact = f"{format_bytes(usable)} RAM{'' if memory.limit is None else ' allowed to this container'}"
    fact += f", {format_bytes(min(memory.available, usable))} free, {swap}"
    if gpu_bytes:
        ratio = usable / gpu_bytes
        fact += f"; {ratio:.1f} times the largest GPU's {format_bytes(gpu_bytes)} (2 to 4 times is comfortable)"
        if ratio < 1:
            remedy = "add RAM: merging and offloading a model that fills the GPU need more than is here"
            return Check("memory", fact, "warn", remedy)
    if memory.available < 2 * _GIB:
        return Check("memory", fact, "warn", "close other programs, or add RAM or swap")
    return Check("memory", fact, "ok")


def check_ups(setting: str, **ports: int) -> Check:
    """What the UPS that `guard.ups` names says, and how long a run could hold out on it."""
    if setting == "none":
        return Check("ups", "guard.ups is none: a power cut is not seen coming", "ok")
    ups = open_ups(setting, **ports)
    if ups is None:
        remedy = (
            "connect a UPS by USB and install NUT or apcupsd, which `guard.ups: auto` finds; for an inverter without "
            "a data port set guard.ups to `command:PROGRAM` that exits 0 on mains, 1 on battery, 2 when it is low"
        )
        return Check("ups", "none found: a power cut ends the run at its last checkpoint", "warn", remedy)
    reading = ups.read()
    if reading.state == "unknown":
        fact = f"{reading.source}: unknown, {reading.reason}"
        return Check("ups", fact, "warn", "check its cable and its daemon (`upsc -l`, `apcaccess`), and guard.ups")
    trouble = [text for flag, text in _UPS_TROUBLE.items() if flag in reading.flags]
    fact = "; ".join([_reading_text(reading), *trouble])
    if reading.low or reading.state == "on_battery":
        return Check("ups", fact, "warn", "start when the mains are back; a run on battery saves and waits")
    return Check("ups", fact, "warn" if trouble else "ok", "see to the UPS before a long run" if trouble else None)


def _reading_text(reading: UpsReading) -> str:
    parts = [reading.source, {"online": "mains on", "on_battery": "on battery"}.get(reading.state, reading.state)]
    parts += ["battery low"] if reading.low else []
    parts += [] if reading.charge is None else [f"charge {reading.charge:.0%}"]
    parts += [f"says {' '.join(sorted(reading.flags))}"] if reading.flags else []
    if reading.runtime_s is None:
        return ", ".join([*parts, "it does not tell how long it lasts"])
    paused = format_seconds(reading.runtime_s * _PAUSED_LASTS_TIMES)
    return ", ".join([*parts, f"by its own word {format_seconds(reading.runtime_s)}, paused about {paused}"])


def check_cpu_sensor(read: Callable[[], float | None] = cpu_temperature_c) -> Check:
    """The temperature of the processor."""
    found = read()
    if found is None:
        remedy = "on a machine of its own: `sudo modprobe coretemp` (Intel) or `sudo modprobe k10temp` (AMD)"
        fact = "the system shows none (usual in a virtual machine)"
        return Check("cpu temperature", fact, "unknown", remedy)
    hot = found >= 90
    return Check("cpu temperature", f"{found:.0f} °C", "warn" if hot else "ok", "clean fans" if hot else None)


def check_rapl(folder: Path = Path("/sys/class/powercap")) -> Check:
    """The counters of the processor's energy, from which the power of a run on the CPU is told."""
    name, counters = "cpu power", sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
    counters = [path for path in counters if path.parent.name.count(":") == 1]
    if not counters:
        return Check(name, "the system has no RAPL counters (usual in a virtual machine and on a Mac)", "unknown")
    try:
        for path in counters:
            int(path.read_text())
    except OSError as error:
        remedy = f"run as root, or let a group read it: `sudo chgrp $(id -gn) {folder}/intel-rapl:*/energy_uj` and "
        remedy += "`sudo chmod g+r` on the same files (until the next boot)"
        return Check(name, f"RAPL cannot be read: {error.strerror}", "warn", remedy)
    return Check(name, f"RAPL of {len(counters)} package{'s' * (len(counters) != 1)} can be read", "ok")


def check_offline(environ: Mapping[str, str] = os.environ) -> Check:
    """Whether the hub's libraries are told to stay off the network, as charkha tells them for all that trains."""
    return _check_switches("offline", "training looks nothing up", _OFFLINE, environ)


def check_telemetry(environ: Mapping[str, str] = os.environ) -> Check:
    """Whether the dependencies' reports home are switched off."""
    return _check_switches("telemetry", "reports home are off", _TELEMETRY, environ)


def _check_switches(name: str, fact: str, switches: Sequence[str], environ: Mapping[str, str]) -> Check:
    missing = [switch for switch in switches if environ.get(switch, "").lower() not in _ON]
    if missing:
        return Check(name, f"{', '.join(missing)} not set", "warn", f"`export {'=1 '.join(missing)}=1`")
    return Check(name, f"{fact} ({', '.join(switches)})", "ok")


def check_hub_cache(environ: Mapping[str, str] = os.environ) -> Check:
    """Where fetched models lie, how many, and how much room they take."""
    cache = hub_cache(environ)
    if not cache.is_dir():
        return Check("hub cache", f"{cache}: nothing there yet", "ok")
    models = sum(path.is_dir() for path in cache.glob("models--*"))
    held = sum(path.lstat().st_size for path in cache.rglob("*") if path.is_file())  # a snapshot's links are tiny
    return Check("hub cache", f"{cache}: {models} model{'s' * (models != 1)}, {format_bytes(held)}", "ok")


def check_startup_files(folders: Sequence[Path] | None = None, working: Path | None = None) -> Check:
    """`.pth` files that run code whenever Python starts, and files here that would be imported for a package."""
    if folders is None:
        folders = [Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())]
    paths = sorted(path for folder in folders if folder.is_dir() for path in folder.glob("*.pth"))
    strange = [str(path) for path in paths if not _BY_INSTALLERS.fullmatch(path.name) and _runs_code(path)]
    hiding = [name for name in _LEADING if ((working or Path.cwd()) / f"{name}.py").is_file()]
    if strange:
        remedy = "read them; one that no package of yours brought (`pip show -f`) is removed with what it ran"
        return Check("startup files", f"run code at every start of Python: {', '.join(strange)}", "warn", remedy)
    if hiding:
        fact = f"here lie {', '.join(f'{name}.py' for name in hiding)}, which hide the packages of that name"
        return Check("startup files", fact, "warn", "rename them, or work in another folder")
    return Check("startup files", f"none of a stranger runs when Python starts ({len(paths)} looked at)", "ok")


def _runs_code(path: Path) -> bool:
    """Whether `site` would execute one of its lines."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return any(line.startswith(("import ", "import\t")) for line in lines)


def check_clock(now_s: float | None = None) -> Check:
    """Whether the year can be true. A dead battery on the main board sets it back, and certificates then fail."""
    year = time.gmtime(now_s).tm_year
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if year < 2024:
        remedy = "set the clock (`timedatectl set-ntp true`) and replace the battery (CR2032) on the main board; "
        return Check("clock", told, "warn", remedy + "charkha does not depend on it, but `charkha fetch` would fail")
    return Check("clock", told, "ok")


def check_checkpoints(run: RunFolder, keep: int) -> list[Check]:
    """The newest checkpoint whose every byte is as written, those passed over, and the room for the next ones."""
    store = CheckpointStore(run.path)
    newest, skipped = store.newest_verified()
    passed = "; ".join(f"{one.path.name} passed over: {one.reason}" for one in skipped)
    busy = "a process trains in it: look again when it is idle" if run.is_locked() else None
    if newest is None:
        remedy = busy or "copy a checkpoint back from a backup; otherwise the run begins anew"
        return [Check("checkpoints", passed or "none yet", "fail" if skipped else "ok", remedy if skipped else None)]
    fact = f"step {newest.step} verified, {format_bytes(newest.total_bytes)}"
    remedy = busy or "the run goes on from the verified one; a disk that damages files wants replacing"
    first = Check("checkpoints", f"{fact}; {passed}", "warn", remedy) if skipped else Check("checkpoints", fact, "ok")
    return [first, _check_room(run, newest.total_bytes, keep)]


def _check_room(run: RunFolder, size: int, keep: int) -> Check:
    """Free space against `keep` + 1 checkpoints, of which those that are there have their room already."""
    free = durable.free_bytes(run.path)
    there = min(keep, sum(path.is_dir() for path in (run.path / "checkpoints").glob("step-*")))
    needed = (keep + 1 - there) * size
    fact = f"{format_bytes(free)} free; {keep} kept and one being written need {format_bytes(needed)} more"
    verdict: Verdict = "ok" if free >= needed else "warn" if free >= size else "fail"
    return Check("room for checkpoints", fact, verdict, None if verdict == "ok" else "free some space on this disk")
