"""Installs the torch build that this machine can use, into the Python that runs this script.

An NVIDIA driver gets the CUDA build, any other Linux machine the CPU build, a Mac the only build there is.
`CHARKHA_TORCH=cpu` or `CHARKHA_TORCH=cuda` decides instead, for example in a container that is built without a GPU.
The right build already installed is left alone; the CUDA build also runs on a CPU, so it is never replaced for one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

TORCH_VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Sums of the wheels on the package index for Linux x86-64, torch 2.13.0.
CUDA_DOWNLOAD = "about 3.3 GB to download, 7 GB on disk"
# `--no-compile`: `make` writes the bytecode afterwards, on all cores.
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--no-compile")
# torch 2.13.0 is built for CUDA 13, whose first driver series is 580.
CUDA_DRIVER_API = 13000


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver as libcuda reports it: `api` 13010 means CUDA 13.1, 0 means unknown."""

    api: int
    gpus: int


@dataclass(frozen=True)
class Choice:
    """Which build to install ("cpu", "cuda" or "mac"), and why; `warning` is for the user, not an obstacle."""

    build: str
    reason: str
    warning: str | None = None


def choose(system: str, machine: str, wish: str | None, driver: Driver | None) -> Choice:
    """The build for this machine. Raises ValueError where there is none or where `wish` is no build."""
    if wish not in (None, "", "cpu", "cuda"):
        raise ValueError(f"CHARKHA_TORCH={wish} is neither cpu nor cuda")
    if system == "Darwin":
        return _choose_for_mac(machine, wish)
    if wish == "cpu":
        return Choice("cpu", "CHARKHA_TORCH=cpu")
    warning = _driver_warning(driver)
    if wish == "cuda":
        return Choice("cuda", "CHARKHA_TORCH=cuda", warning)
    if driver is None:
        return Choice("cpu", "no NVIDIA driver found")
    return Choice("cuda", f"an NVIDIA driver with {driver.gpus} GPU{'s' * (driver.gpus != 1)}", warning)


def _choose_for_mac(machine: str, wish: str | None) -> Choice:
    if machine != "arm64":
        raise ValueError(f"torch {TORCH_VERSION} has no build for Macs with Intel processors")
    if wish == "cuda":
        raise ValueError("CHARKHA_TORCH=cuda: there is no CUDA on a Mac")
    return Choice("mac", "a Mac with Apple silicon")


def _driver_warning(driver: Driver | None) -> str | None:
    if driver is None:
        return "no NVIDIA driver answers here now; torch will run on the CPU until one does"
    if 0 < driver.api < CUDA_DRIVER_API:
        spoken = f"{driver.api // 1000}.{driver.api % 1000 // 10}"
        return f"the driver speaks CUDA {spoken} and torch {TORCH_VERSION} CUDA 13: update the driver to 580 or newer"
    return None


def find_driver() -> Driver | None:
    """The NVIDIA driver of this machine, asked through libcuda, then through nvidia-smi; None without a usable GPU."""
    return _ask_libcuda() or _ask_nvidia_smi()


def _ask_libcuda() -> Driver | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    gpus, api = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(gpus)) or cuda.cuDriverGetVersion(ctypes.byref(api)):
        return None
    return Driver(api.value, gpus.value) if gpus.value else None


def _ask_nvidia_smi() -> Driver | None:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return Driver(0, gpus) if listed.returncode == 0 and gpus else None


def installed_build() -> str | None:
    """The build ("cpu", "cuda", "mac") that is installed in the pinned version; None for any other version or none."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    number, _, local = version.partition("+")
    if number != TORCH_VERSION:
        return None
    if platform.system() == "Darwin":
        return "mac"
    return "cpu" if local.startswith("cpu") else "cuda"


def serves(installed: str | None, build: str) -> bool:
    """Whether the installed build does what `build` would do."""
    return installed == build or (installed == "cuda" and build == "cpu")


def attempts(build: str) -> list[list[str]]:
    """Arguments of `pip install`, to be tried in this order.

    The CPU build is looked for in the sources that pip is configured with (a folder of wheels, a mirror), then on
    PyTorch's own index. It needs nothing that is not locked, hence `--no-deps`.
    """
    if build == "cpu":
        cpu = ["--no-deps", f"torch=={TORCH_VERSION}+cpu"]
        return [cpu, ["--index-url", CPU_INDEX, *cpu], [f"torch=={TORCH_VERSION}"]]
    # A folder of wheels may hold a CPU build, which `==2.13.0` alone would match.
    return [[f"torch=={TORCH_VERSION},!={TORCH_VERSION}+cpu"]]


def install(build: str) -> int:
    """Exit status of pip; 0 as soon as one attempt succeeds. The last attempt's errors are shown, earlier ones not."""
    tries = attempts(build)
    for number, arguments in enumerate(tries, start=1):
        last = number == len(tries)
        if last and build == "cpu":
            print(f"The CPU build was not found; taking the default one ({CUDA_DOWNLOAD}). It runs on a CPU, too.")
        if _pip(arguments, show_errors=last) == 0:
            return 0
    return 1


def _pip(arguments: Sequence[str], show_errors: bool) -> int:
    command = [sys.executable, "-m", "pip", "install", *PIP_OPTIONS]
    if not show_errors:
        command += ["--retries", "1"]
    stderr = None if show_errors else subprocess.DEVNULL
    return subprocess.run([*command, *arguments], stderr=stderr).returncode


def main() -> int:
    """Say what is chosen and why, and install it."""
    wish = os.environ.get("CHARKHA_TORCH")
    driver = None if wish == "cpu" else find_driver()
    try:
        choice = choose(platform.system(), platform.machine(), wish, driver)
    except ValueError as problem:
        print(f"install_torch: {problem}", file=sys.stderr)
        return 2
    if choice.warning:
        print(f"Note: {choice.warning}.", flush=True)
    if serves(installed_build(), choice.build):
        print(f"torch {TORCH_VERSION} is installed already, the build for this machine ({choice.reason}).")
        return 0
    size = f"; {CUDA_DOWNLOAD}" if choice.build == "cuda" else ""
    print(f"Installing torch {TORCH_VERSION}, {choice.build} build: {choice.reason}{size}.", flush=True)
    return install(choice.build)


if __name__ == "__main__":
    sys.exit(main())
