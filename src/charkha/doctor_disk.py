"""What `charkha doctor` asks of the disks that runs are written to and that a streamed base is read from."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.doctor_checks import Check
from charkha.hardware.speeds import disk_read_bytes_per_s
from charkha.store import durable
from charkha.units import format_bytes, format_seconds

SPEED_FILE = ".charkha-doctor-speed"  # one name, so that the next look removes what a killed one left
_GIB, _MIB = 1 << 30, 1 << 20
_SPEED_BYTES = 64 * _MIB
_SLOW_BYTES_PER_S, _SLOW_SYNC_S = 50 * _MIB, 0.1
_SMALL_DISK_BYTES = 20 * _GIB  # a base model of 8 B parameters in bf16 takes 15 GiB
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|fuse\.sshfs|ceph|fuse\.ceph.*|glusterfs|fuse\.glusterfs|lustre|beegfs|gpfs|afs"
)
_FOREIGN = {
    "9p": "a folder of another system (WSL's /mnt/c, or a virtual machine's host)",
    "drvfs": "a Windows folder seen from WSL",
    "tmpfs": "memory, which a power cut empties",
    "ramfs": "memory, which a power cut empties",
    "overlay": "a container's own layer, which goes with the container",
    "vfat": "FAT, which keeps no journal and no file over 4 GiB",
    "exfat": "exFAT, which keeps no journal",
    "fuseblk": "a foreign file system (NTFS, exFAT) through FUSE",
}


@dataclass(frozen=True)
class Mount:
    """The file system that a folder is on."""

    device: str
    point: str
    kind: str  # ext4, btrfs, nfs4, ...


def mount_of(folder: Path, mounts: Sequence[Mount] | None = None) -> Mount | None:
    """Of several that are mounted above the folder the longest, of equals the latest, which hides the others."""
    import psutil

    if mounts is None:
        mounts = [Mount(one.device, one.mountpoint, one.fstype) for one in psutil.disk_partitions(all=True)]
    over = [mount for mount in mounts if folder.resolve().is_relative_to(mount.point)]
    return max(reversed(over), key=lambda mount: len(mount.point), default=None)


def check_disk(folder: Path, mounts: Sequence[Mount] | None = None, block: Path = Path("/sys/class/block")) -> Check:
    """File system, free room and kind of the disk that runs are written to."""
    free, mount = durable.free_bytes(folder), mount_of(folder, mounts)
    kind = mount.kind if mount else "unknown file system"
    spins = _rotates(mount.device, block) if mount else None
    word = {True: ", a spinning disk (a virtual disk often says so too)", False: ", solid state", None: ""}[spins]
    fact = f"{folder}: {kind}{word}, {format_bytes(free)} free"
    if free < _GIB:
        return Check("disk", fact, "fail", "free some space, or put `output` on a larger disk")
    if mount and (_NETWORK.fullmatch(kind) or kind in _FOREIGN):
        fact += f": {_FOREIGN.get(kind, 'a network file system')}"
        remedy = "keep runs on a local disk (ext4, xfs, btrfs, APFS; in WSL below ~, in a container a mounted folder)"
        return Check("disk", fact, "warn", remedy)
    if free < _SMALL_DISK_BYTES:
        remedy = "free some space: a base model of 8 B parameters alone takes 15 GiB"
        return Check("disk", fact, "warn", remedy)
    return Check("disk", fact, "ok")


def _rotates(device: str, block: Path) -> bool | None:
    """What sysfs says of a device such as /dev/sda1 or /dev/mapper/home; None for what it does not know."""
    here = block / Path(device).resolve().name
    for flag in (here / "queue/rotational", here.resolve().parent / "queue/rotational"):  # a partition's: its disk's
        if flag.is_file():
            return flag.read_text().strip() == "1"
    return None


def check_disk_speed(folder: Path, rates: dict[Path, float], size: int = _SPEED_BYTES) -> Check:
    """Writes `size` bytes as a checkpoint is written (hashed, fsync'd), reads them back and removes them.

    Then the time of one fsync. Bytes per second of reading are put into `rates` under the folder.
    """
    name, room = "disk speed", durable.free_bytes(folder)
    if room < size + _GIB:
        return Check(name, f"not measured: {format_bytes(room)} free", "unknown", "free some space")
    piece, path = os.urandom(_MIB), folder / SPEED_FILE  # not zeros, which some file systems do not write
    try:
        seconds = _timed(lambda: durable.write_file(path, [piece] * (size // _MIB)))
        read = disk_read_bytes_per_s(path)
        sync_s = statistics.median(_timed(lambda: durable.write_file(path, [piece[:4096]])) for _ in range(9))
    except OSError as error:
        fact = f"{folder} cannot be written: {error.strerror or error}"
        return Check(name, fact, "fail", "choose a folder of your own on a disk that works")
    finally:
        durable.remove_file(path)
    rate = size / seconds
    fact = f"{format_bytes(rate)}/s written and synced: a checkpoint of 1 GiB in {format_seconds(_GIB / rate)}"
    if read is not None:
        rates[folder] = read
        fact += f"; {format_bytes(read)}/s read back"
    fact += f"; fsync {sync_s * 1000:.1f} ms"
    if rate < _SLOW_BYTES_PER_S or sync_s > _SLOW_SYNC_S:
        return Check(name, fact, "warn", "put `output` on a solid-state disk that is not busy")
    return Check(name, fact, "ok")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
