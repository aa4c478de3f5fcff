"""`charkha doctor`: every check of this machine as fact, verdict and remedy; its GPUs, torch, and a run's folder.

torch and bitsandbytes are asked in a child process with a time limit, so that a broken CUDA is a finding, not a crash.
A check that fails itself, or hangs, is "unknown" and hides no other. Reads only, apart from one file of 64 MiB that
is written to measure the disk, and a power limit that is set to what it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from charkha import doctor_checks as host
from charkha.config import Config
from charkha.config_file import load_config
from charkha.doctor_checks import INSTALL_CUDA_TORCH, SPEED_FILE, Check
from charkha.errors import CharkhaError, ConfigError, EnvironmentProblem, UsageError
from charkha.hardware.sensors import GpuLimits, GpuReading, NotPermitted, Nvml, open_nvml
from charkha.store import durable
from charkha.store.runs import RunFolder
from charkha.training.base_model import find_base
from charkha.units import format_bytes, format_seconds

Question = Callable[[], "Check | list[Check]"]
Found = TypeVar("Found")
_CHECK_LIMIT_S, _CHILD_LIMIT_S, _NVML_LIMIT_S = 90.0, 60.0, 20.0
_CUDA_13 = 13000  # what torch's builds speak now; driver series 580 is the first that does
_MATMUL_ERROR, _NF4_ERROR = 0.02, 0.15  # relative; 0.003 and 0.092 where the kernels are right
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception)\b")
_HOT_REASONS = {
    "hw_slowdown": "the card halves its clocks: heat, its power supply, or an external brake",
    "hw_thermal_slowdown": "too hot: clean it, give it air, or set a lower power limit",
    "hw_power_brake_slowdown": "the power supply calls for less: check its cables and its watts",
    "sw_thermal_slowdown": "the driver holds its temperature: give it air, or set a lower power limit",
}
_COLD_RESTART = "cold restart: cut the power for half a minute; if it comes back check riser, cables, supply"
# Both print one JSON object as their last line.
CUDA_PROGRAM = """
import json, torch
cards = []
kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
torch.manual_seed(0)
left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
for index in range(torch.cuda.device_count() if kind == "cuda" else 1):
    device = torch.device(kind, index)
    name, capability = kind, None
    if kind == "cuda":
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    product = (left.to(device).bfloat16() @ right.to(device).bfloat16()).float().cpu()
    error = ((product - left @ right).norm() / (left @ right).norm()).item()
    cards.append({"kind": kind, "name": name, "capability": capability, "error": error})
print(json.dumps({"cuda": torch.version.cuda, "cards": cards}))
"""
NF4_PROGRAM = """
import json, torch, bitsandbytes.functional as kernels
names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
torch.manual_seed(0)
errors = {}
for name in names:
    weight = torch.randn(1024, 1024).to(name)
    packed, state = kernels.quantize_4bit(weight, quant_type="nf4")
    errors[name] = ((kernels.dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
print(json.dumps(errors))
"""


@dataclass(frozen=True)
class Subject:
    """What is examined beside the machine: the folder that is written to, and the config and run where there are."""

    folder: Path
    config_path: Path | None = None
    config: Config | ConfigError | None = None
    run: RunFolder | None = None


def diagnose(target: Path | None = None, observe: Callable[[str], object] = lambda name: None) -> list[Check]:
    """Every check, in the order in which they are read; `target` is a run folder or a config.

    `observe` is told each check's name before it begins. Raises UsageError or RunFolderError for a target that is
    neither.
    """
    subject = read_subject(target)
    checks: list[Check] = []
    try:
        for name, question in _questions(subject, _within(_NVML_LIMIT_S, open_nvml)):
            observe(name)
            # Checkpoints are hashed to the last byte, however long that takes.
            checks += answer(name, question, None if name == "checkpoints" else _CHECK_LIMIT_S)
    except KeyboardInterrupt:
        durable.remove_file(subject.folder / SPEED_FILE)  # the thread that writes it ends with this process
        raise
    return checks


def answer(name: str, question: Question, limit_s: float | None = _CHECK_LIMIT_S) -> list[Check]:
    """What the question finds; one that raises, or takes longer than `limit_s`, is unknown with what happened."""
    found = _within(limit_s, question)
    if isinstance(found, CharkhaError):
        return [Check(name, found.message, "unknown", found.remedy)]
    if isinstance(found, Exception):
        return [Check(name, f"could not be checked: {type(found).__name__}: {found}", "unknown")]
    return [found] if isinstance(found, Check) else found


def _within(limit_s: float | None, work: Callable[[], Found]) -> Found | Exception:
    """The result or what was raised, after at most `limit_s`. In a thread: a driver or a mount may never answer."""
    results: list[Found | Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - whatever breaks one check must not hide the others
            results.append(error)

    thread = threading.Thread(target=run, name="check", daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else TimeoutError(f"no answer within {limit_s:g} s")


def _questions(subject: Subject, nvml: Nvml | Exception | None) -> Iterator[tuple[str, Question]]:
    cards = nvml if isinstance(nvml, Nvml) else None
    gpus = cards.count if cards else 0
    config, run = subject.config, subject.run
    yield "python", host.check_python
    yield "packages", host.check_packages
    yield "torch build", lambda: host.check_torch_build(gpus)
    yield "nvidia driver", lambda: check_driver(nvml)
    yield "cuda", lambda: check_cuda(gpus)
    yield "4-bit kernels", check_4bit
    yield from ((f"gpu {index}", partial(check_gpu, cards, index)) for index in range(gpus) if cards)
    yield "memory", lambda: host.check_memory([gpu_memory(index) for index in range(gpus)])
    yield "disk", lambda: host.check_disk(subject.folder)
    yield "disk speed", lambda: host.check_disk_speed(subject.folder)
    yield "ups", lambda: host.check_ups(config.guard.ups if isinstance(config, Config) else "auto")
    yield "cpu temperature", host.check_cpu_sensor
    yield "cpu power", host.check_rapl
    yield "offline", host.check_offline
    yield "telemetry", host.check_telemetry
    yield "hub cache", host.check_hub_cache
    yield "startup files", host.check_startup_files
    yield "clock", host.check_clock
    if subject.config_path is not None and config is not None:
        yield "config", partial(check_config, subject.config_path, config)
        if isinstance(config, Config):
            yield "base model", partial(check_base, config, subject.config_path.parent)
    if run is not None:
        keep = config.checkpoint.keep if isinstance(config, Config) else 2
        yield "checkpoints", partial(host.check_checkpoints, run, keep)


def check_driver(nvml: Nvml | Exception | None, pci: Path = Path("/sys/bus/pci/devices")) -> Check:
    """Whether an NVIDIA driver answers, and whether a card is there for which none does."""
    name = "nvidia driver"
    if isinstance(nvml, Exception):
        return Check(name, f"the driver does not answer: {type(nvml).__name__}: {nvml}", "fail", _COLD_RESTART)
    if nvml is None or nvml.count == 0:
        seen = sum(_is_nvidia_gpu(device) for device in pci.glob("*"))
        if not seen:
            return Check(name, "none, and no NVIDIA GPU on the PCI bus", "ok")
        remedy = "install the driver, series 580 or newer, and restart (a container: start it with `--gpus all`)"
        return Check(name, f"{seen} NVIDIA GPU on the PCI bus, but the driver shows none", "fail", remedy)
    version, api = _ask("nvmlSystemGetDriverVersion"), _ask("nvmlSystemGetCudaDriverVersion")
    fact = f"{version or 'version unknown'}, {nvml.count} GPU{'s' * (nvml.count != 1)}"
    if api is None:
        return Check(name, fact, "ok")
    fact += f", speaks CUDA {api // 1000}.{api % 1000 // 10}"
    old = api < _CUDA_13
    return Check(name, fact, "warn" if old else "ok", "torch speaks CUDA 13: update the driver to 580" if old else None)


def _is_nvidia_gpu(device: Path) -> bool:
    vendor, kind = (path.read_text() if path.is_file() else "" for path in (device / "vendor", device / "class"))
    return vendor.strip() == "0x10de" and kind.startswith("0x03")  # NVIDIA; a display controller


def _ask(call: str, *arguments: Any) -> Any:
    """What an NVML call that `sensors` does not make answers; None where it fails. NVML must have been opened."""
    import pynvml

    try:
        return getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError:
        return None


class ChildFailed(Exception):
    """A child process that ended otherwise than with an answer; the text says how. `hung`: it was killed for time."""

    def __init__(self, text: str, hung: bool = False) -> None:
        super().__init__(text)
        self.hung = hung


def ask_child(program: str, limit_s: float) -> Any:
    """The JSON of the last line that the Python program prints; raises ChildFailed. It runs without this folder."""
    command = [sys.executable, "-P", "-c", program]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()  # not waited for: one that hangs in the driver cannot even be killed
            raise ChildFailed(f"no answer within {format_seconds(limit_s)}", hung=True) from None
        if code < 0:
            raise ChildFailed(f"crashed with {signal.Signals(-code).name}")
        if code > 0:
            raise ChildFailed(_last_line(errors, _ERROR_LINE) or f"ended with exit code {code}")
        try:
            return json.loads(_last_line(output))
        except ValueError:
            raise ChildFailed(f"answered no JSON but {_last_line(output)!r}") from None


def _last_line(file: IO[bytes], like: re.Pattern[str] = re.compile("")) -> str:
    """The last line that matches, else the last of all: torch writes advice below its errors."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return ([*lines[-1:], *(line for line in lines if like.match(line))] or [""])[-1].strip()


def _unanswered(name: str, package: str, failure: ChildFailed, remedy: str) -> Check:
    text = f"{package}, in a process of its own: {failure}"
    if failure.hung:
        return Check(name, text, "unknown", "run it again; when it hangs again restart the machine")
    return Check(name, text, "fail", remedy)


def check_cuda(gpus: int, program: str = CUDA_PROGRAM, limit_s: float = _CHILD_LIMIT_S) -> Check:
    """Whether torch computes on every device it finds; `gpus` is how many the NVIDIA driver has."""
    try:
        told = ask_child(program, limit_s)
    except ChildFailed as failure:
        remedy = f"`{INSTALL_CUDA_TORCH}`, and `sudo dmesg | tail` for the driver's errors" if gpus else "`make setup`"
        return _unanswered("cuda", "torch", failure, remedy)
    cards = told["cards"]
    fact = "; ".join(map(_card_text, cards))
    wrong = [card["name"] for card in cards if not card["error"] < _MATMUL_ERROR]
    if wrong:
        remedy = "the card, its memory or an overclock is not sound: back to stock clocks, then test it elsewhere"
        return Check("cuda", f"wrong product of two matrices on {', '.join(wrong)}; {fact}", "fail", remedy)
    if cards[0]["kind"] == "cuda":
        emulated = [card["name"] for card in cards if tuple(card["capability"]) < (8, 0)]
        return Check("cuda", fact, "warn" if emulated else "ok", "set model.dtype: fp16" if emulated else None)
    if not gpus:
        return Check("cuda", f"no CUDA GPU: training runs on {fact}", "ok")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    fact = f"torch (CUDA {told['cuda'] or 'left out'}) sees none of the driver's {gpus} GPU{'s' * (gpus != 1)}"
    remedy = f"`{INSTALL_CUDA_TORCH}`, and a driver of series 580 or newer"
    return Check("cuda", fact, "fail", remedy if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it")


def _card_text(card: dict[str, Any]) -> str:
    if card["capability"] is None:
        return f"{card['name'].upper()}, bf16 product right"
    major, minor = card["capability"]
    bf16 = "bf16" if major >= 8 else "no bf16 units"
    fp8 = "fp8" if (major, minor) >= (8, 9) else "no fp8"
    return f"{card['name']}: compute capability {major}.{minor}, {bf16}, {fp8}"


def check_4bit(program: str = NF4_PROGRAM, limit_s: float = _CHILD_LIMIT_S) -> Check:
    """Whether bitsandbytes quantizes a matrix to nf4 and back on every device."""
    name = "4-bit kernels"
    if sys.platform == "darwin":
        return Check(name, "not on a Mac: only model.quantization none", "ok")
    try:
        errors = ask_child(program, limit_s)
    except ChildFailed as failure:
        remedy = "`make setup` installs the locked bitsandbytes; until then set model.quantization: none"
        return _unanswered(name, "bitsandbytes", failure, remedy)
    fact = "nf4 and back: " + ", ".join(f"{device} within {error:.1%}" for device, error in errors.items())
    if not errors or any(not error < _NF4_ERROR for error in errors.values()):
        return Check(name, f"{fact}, of a normal matrix 9.2% is right", "fail", "set model.quantization: none")
    return Check(name, fact, "ok")


def gpu_memory(index: int) -> tuple[int, int] | None:
    """(total, free) bytes of a card; None where it does not tell. NVML must have been opened."""
    told = _ask("nvmlDeviceGetMemoryInfo", _ask("nvmlDeviceGetHandleByIndex", index))
    return None if told is None else (int(told.total), int(told.free))


def check_gpu(nvml: Nvml, index: int) -> list[Check]:
    """The card with its memory and temperatures, its power limit, and why it runs below its clocks."""
    reading = nvml.read(index)
    if reading.lost:
        return [Check(f"gpu {index}", "lost: it has fallen off the bus", "fail", _COLD_RESTART)]
    limits = nvml.limits(index)
    return [
        _check_card(reading, limits, gpu_memory(index)),
        _check_memory_sensor(reading),
        _check_power(reading, limits, may_set_power(nvml, index)),
        _check_reasons(reading),
    ]


def _check_card(reading: GpuReading, limits: GpuLimits, memory: tuple[int, int] | None) -> Check:
    name, fact = f"gpu {reading.index}", limits.name or "name unknown"
    heat, slows = reading.temperature_c, limits.slowdown_c
    fact += f", {format_bytes(memory[0])}, {format_bytes(memory[1])} free" if memory else ", memory unknown"
    fact += ", temperature unknown" if heat is None else f", {heat:.0f} °C"
    fact += "" if slows is None else f" (slows down at {slows:.0f})"
    if heat is not None and slows is not None and heat >= slows - 5:
        return Check(name, fact, "warn", "let it cool, clean it, give it air")
    if memory and memory[1] < 0.75 * memory[0]:
        return Check(name, fact, "warn", "another program holds its memory: `nvidia-smi` names it")
    return Check(name, fact, "unknown" if heat is None or memory is None else "ok")


def may_set_power(nvml: Nvml, index: int) -> bool:
    """Whether this user may set the power limit: it is set to what it is."""
    milliwatts = _ask("nvmlDeviceGetPowerManagementLimit", _ask("nvmlDeviceGetHandleByIndex", index))
    try:
        if milliwatts is not None:
            nvml.set_power_limit(index, milliwatts / 1000)
    except (NotPermitted, ValueError):
        return False
    return milliwatts is not None


def _check_power(reading: GpuReading, limits: GpuLimits, may_set: bool) -> Check:
    name, now, default = f"gpu {reading.index} power limit", reading.power_limit_w, limits.power_default_w
    if now is None:
        return Check(name, "the card does not tell its power limit", "unknown")
    fact = f"{now:.0f} W" if default is None else f"{now:.0f} W, {default:.0f} W as delivered"
    if may_set:
        return Check(name, f"{fact}; may be set by this user", "ok")
    remedy = f"the guard paces the run instead; to set it yourself: `sudo nvidia-smi -i {reading.index} -pl WATTS`"
    return Check(name, f"{fact}; only root may set it", "warn", remedy)


def _check_reasons(reading: GpuReading) -> Check:
    name = f"gpu {reading.index} slowdown"
    told = [text for reason, text in _HOT_REASONS.items() if reason in reading.event_reasons]
    fact = ", ".join(sorted(reading.event_reasons)) or "none"
    return Check(name, fact, "warn" if told else "ok", "; ".join(told) or None)


def _check_memory_sensor(reading: GpuReading) -> Check:
    name, heat = f"gpu {reading.index} memory temperature", reading.memory_temperature_c
    if heat is None:
        remedy = "watch tokens/s: memory that throttles shows there only"
        return Check(name, "the card does not tell it (a GeForce on Linux never does)", "unknown", remedy)
    return Check(name, f"{heat:.0f} °C", "warn" if heat >= 95 else "ok", "give it air" if heat >= 95 else None)


def read_subject(target: Path | None) -> Subject:
    """What `target` is. Raises UsageError or RunFolderError when it is neither a run folder nor a file."""
    if target is None:
        return Subject(Path.cwd())
    if not target.exists():
        raise UsageError("no such run folder or config", where=str(target), remedy="name a run folder or a config")
    run = RunFolder(target).require() if target.is_dir() else None
    path = run.config_path if run else target
    try:
        loaded = load_config(path)
    except ConfigError as problem:
        return Subject(run.path if run else path.resolve().parent, path, problem, run)
    output = (loaded.folder / loaded.config.output).resolve()
    run = run or (RunFolder(output) if RunFolder(output).exists else None)
    folder = run.path if run else next(place for place in (output, *output.parents) if place.is_dir())
    return Subject(folder, path, loaded.config, run)


def check_config(path: Path, config: Config | ConfigError) -> Check:
    """Whether the config can be read; every problem where not."""
    if isinstance(config, ConfigError):
        fact = "; ".join(f"{problem.key}: {problem.reason}" for problem in config.problems)
        return Check("config", f"{path}: {fact}", "fail", "correct it; `charkha schema` prints every key")
    return Check("config", f"{path} is valid", "ok")


def check_base(config: Config, folder: Path) -> Check:
    """Whether the config's base model is on this machine, with weights that charkha reads."""
    try:
        base = find_base(config.model, folder)
    except EnvironmentProblem as problem:
        return Check("base model", f"{config.model.base}: {problem.message}", "fail", problem.remedy)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    if not weights:
        remedy = "`charkha fetch` brings them; older formats (.bin, .pt) can run code and are not read"
        return Check("base model", f"{base} holds no safetensors weights", "fail", remedy)
    return Check("base model", f"{base}, {format_bytes(weights)} of weights", "ok")
