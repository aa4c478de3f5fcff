"""`charkha doctor`: every check of this machine as fact, verdict and remedy; its GPUs, torch, and a run's folder.

torch and bitsandbytes are asked in a child process with a time limit, so that a broken CUDA is a finding, not a crash.
A check that fails itself, or hangs, is "unknown" and hides no other. Reads only, apart from one file of 64 MiB that
is written to measure the disk, and a power limit that is set to what it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from charkha import doctor_checks as host
from charkha.config import Config
from charkha.config_file import load_config
from charkha.doctor_checks import Check
from charkha.doctor_children import check_4bit, check_attention, check_cuda
from charkha.doctor_disk import SPEED_FILE, check_disk, check_disk_speed
from charkha.doctor_gpus import check_driver, check_gpu, check_peers, gpu_memory
from charkha.doctor_speed import Learned, check_base_disk, check_transfers
from charkha.errors import CharkhaError, ConfigError, EnvironmentProblem, UsageError
from charkha.hardware.machine import this_machine
from charkha.hardware.sensors import Nvml, open_nvml
from charkha.store import durable
from charkha.store.runs import RunFolder
from charkha.training.base_model import find_base
from charkha.units import format_bytes

Question = Callable[[], "Check | list[Check]"]
Found = TypeVar("Found")
_CHECK_LIMIT_S, _NVML_LIMIT_S = 90.0, 20.0


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
    subject, nvml = read_subject(target), _within(_NVML_LIMIT_S, open_nvml)
    checks: list[Check] = []
    learned = Learned()
    try:
        for name, question in _questions(subject, nvml, learned):
            observe(name)
            # Checkpoints are hashed to the last byte, however long that takes.
            checks += answer(name, question, None if name == "checkpoints" else _CHECK_LIMIT_S)
    except KeyboardInterrupt:
        durable.remove_file(subject.folder / SPEED_FILE)  # the thread that writes it ends with this process
        raise
    return [*checks, *answer("remembered", lambda: _remember(learned, nvml))]


def _remember(learned: Learned, nvml: Nvml | Exception | None) -> list[Check]:
    """Keeps measured speeds for the next plan; says something only where the disk does not take them."""
    machine = this_machine(Path.cwd()) if isinstance(nvml, Nvml) else None
    try:
        learned.remember([gpu.name for gpu in machine.gpus] if machine else [])
    except OSError as error:
        fact = f"measured speeds cannot be kept: {error.strerror or error}"
        return [Check("remembered", fact, "warn", "set CHARKHA_HISTORY to a folder that you may write to")]
    return []


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


def _questions(subject: Subject, nvml: Nvml | Exception | None, learned: Learned) -> Iterator[tuple[str, Question]]:
    cards = nvml if isinstance(nvml, Nvml) else None
    gpus = cards.count if cards else 0
    config, run = subject.config, subject.run
    yield "python", host.check_python
    yield "packages", host.check_packages
    yield "torch build", lambda: host.check_torch_build(gpus)
    yield "nvidia driver", lambda: check_driver(nvml)
    yield "cuda", lambda: check_cuda(gpus)
    yield "4-bit kernels", check_4bit
    yield "attention", lambda: check_attention(gpus)
    yield from ((f"gpu {index}", partial(check_gpu, cards, index)) for index in range(gpus) if cards)
    if cards and gpus > 1:
        yield "gpu peers", lambda: check_peers(cards)
    yield (
        "gpu transfer",
        lambda: check_transfers([cards.link(index) for index in range(gpus)] if cards else [], learned),
    )
    yield "memory", lambda: host.check_memory([gpu_memory(index) for index in range(gpus)])
    yield "disk", lambda: check_disk(subject.folder)
    yield "disk speed", lambda: check_disk_speed(subject.folder, learned.disks)
    yield "weights disk", lambda: check_base_disk(_base_folder(subject), learned)
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


def _base_folder(subject: Subject) -> Path | None:
    """Where the config's base model lies; None where there is no config, or no such model here."""
    if subject.config_path is None or not isinstance(subject.config, Config):
        return None
    try:
        return find_base(subject.config.model, subject.config_path.parent)
    except EnvironmentProblem:
        return None


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
