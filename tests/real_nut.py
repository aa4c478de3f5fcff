"""NUT as it is: upsd and the dummy-ups driver on a loopback port, with a UPS whose state a test sets."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from charkha.hardware.ups import NutUps, UpsReading

HERE = "127.0.0.1"


def wait_for(seen: Callable[[], bool], within_s: float = 8.0) -> None:
    ends = time.monotonic() + within_s
    while not seen():
        assert time.monotonic() < ends, f"not seen within {within_s} s"
        time.sleep(0.05)


@dataclass
class RealNut:
    port: int
    folder: Path
    drivers: dict[str, subprocess.Popen[bytes]]

    def set(self, name: str, status: str, charge: int) -> None:
        """The driver sees a change by its file's time, in whole seconds, within a second: each write moves it on."""
        path = self.folder / f"{name}.dev"
        at = path.stat().st_mtime + 2 if path.exists() else time.time() - 1000
        fresh = path.with_suffix(".new")
        fresh.write_text(
            f"ups.status: {status}\nbattery.charge: {charge}\nbattery.runtime: 1800\nbattery.charge.low: 20\n"
        )
        os.utime(fresh, (at, at))
        fresh.replace(path)

    def until(self, name: str, state: str) -> UpsReading:
        wait_for(lambda: NutUps(HERE, self.port, name).read().state == state)
        return NutUps(HERE, self.port, name).read()


def nut_program(name: str) -> str | None:
    # Debian's /usr/sbin/upsd is a wrapper that starts nothing unless the system's own NUT is configured.
    return shutil.which(name, path=os.pathsep.join(("/lib/nut", "/usr/lib/nut", "/usr/libexec/nut", os.defpath, "/sbin",
                                                    "/usr/sbin", "/usr/local/sbin", "/usr/local/ups/bin")))  # fmt: skip


@contextlib.contextmanager
def running_nut() -> Iterator[RealNut]:
    """NUT until the block ends; skips the test where it is not installed."""
    server, driver = nut_program("upsd"), nut_program("dummy-ups")
    if server is None or driver is None:
        pytest.skip("NUT's upsd and dummy-ups are not installed (Debian: nut-server)")
    with socket.create_server((HERE, 0)) as listener:
        port = int(listener.getsockname()[1])
    # A short path: the drivers' sockets lie there.
    with tempfile.TemporaryDirectory(prefix="nut") as text, contextlib.ExitStack() as stack:
        folder = Path(text)
        real = RealNut(port, folder, {})
        sections = [f"[{name}]\n  driver = dummy-ups\n  port = {folder}/{name}.dev\n" for name in ("home", "shop")]
        (folder / "ups.conf").write_text("pollinterval = 1\n" + "".join(sections))
        (folder / "upsd.conf").write_text(f"LISTEN {HERE} {port}\nMAXAGE 3\n")
        (folder / "upsd.users").write_text("")
        for path in folder.iterdir():
            path.chmod(0o600)
        paths = {name: text for name in ("NUT_CONFPATH", "NUT_STATEPATH", "NUT_ALTPIDPATH")}  # noqa: C420

        def start(*command: str) -> subprocess.Popen[bytes]:
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(
                [*command, "-F", "-u", getpass.getuser()], env=os.environ | paths, stdout=quiet, stderr=quiet
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        for name in ("home", "shop"):
            real.set(name, "OL", 100)
            real.drivers[name] = start(driver, "-a", name)
        wait_for(lambda: all((folder / f"dummy-ups-{name}").exists() for name in real.drivers))
        start(server)
        yield real
