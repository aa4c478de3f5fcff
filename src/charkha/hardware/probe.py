"""What this machine is: processor, memory, GPU. Reads only; torch is asked in the backend, which may import it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostFacts:
    """The machine without its GPUs."""

    system: str
    processor: str
    physical_cores: int
    ram_bytes: int
    python: str


def probe_host() -> HostFacts:
    """Facts of the host, for provenance and messages."""
    import psutil

    return HostFacts(
        system=f"{platform.system()} {platform.release()}",
        processor=_processor_name(),
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        ram_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
    )


def machine_identity(places: Sequence[Path] = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))) -> str:
    """A hash that is this machine's and says nothing about it; machines without an id are one where they are alike."""
    host = probe_host()
    own = next((path.read_text(errors="replace").strip() for path in places if path.is_file()), "")
    told = f"{own} {host.processor} {host.physical_cores} {host.ram_bytes >> 30}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def cpu_threads() -> int:
    """How many threads torch computes with on the CPU: OMP_NUM_THREADS, else one a core."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return int(wished) if wished.isdigit() and int(wished) else probe_host().physical_cores


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bf16 (x86: AVX512-BF16 or AMX; ARM: BF16); unknown is no."""
    if not cpuinfo.exists():
        return False
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
    return False


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_rss_bytes() -> int:
    """The most resident memory this process ever had (ru_maxrss: KiB on Linux, bytes on macOS)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
