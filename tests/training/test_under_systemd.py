"""A run as a service of a real systemd user manager, through a power cut and a restart of the machine's services."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from charkha.store.runs import RunFolder

MakeProject = Callable[..., Any]
MANAGER = Path("/lib/systemd/systemd")
BOOTED = Path("/run/systemd/system")  # systemctl and the manager look whether systemd runs this machine


class UserManager:
    """A systemd user manager with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self._runtime = folder / "runtime"
        self._home = folder / "home"
        for path in (self._runtime, self._home):
            path.mkdir(mode=0o700)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        names = {"XDG_RUNTIME_DIR": str(self._runtime), "HOME": str(self._home)}
        bus = {"DBUS_SESSION_BUS_ADDRESS": f"unix:path={self._runtime}/bus"}
        rest = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "CHARKHA_"))}
        return rest | names | bus

    def boot(self) -> None:
        bus = ["dbus-daemon", "--session", f"--address=unix:path={self._runtime}/bus", "--nofork", "--nopidfile"]
        self._start(bus)
        self._wait(lambda: (self._runtime / "bus").exists())
        self._start([str(MANAGER), "--user"])
        self._wait(lambda: self("is-system-running").stdout.strip() in ("running", "degraded"))

    def power_cut(self) -> None:
        """Everything dies at once, the service's processes first."""
        for unit in self("list-units", "--plain", "--no-legend", "charkha-*").stdout.split("\n"):
            if unit.strip():
                self("kill", "--signal=SIGKILL", unit.split()[0])
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()
        shutil.rmtree(self._runtime)
        self._runtime.mkdir(mode=0o700)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", "--user", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def _start(self, command: list[str]) -> None:
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._processes.append(process)

    @staticmethod
    def _wait(until: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                pytest.skip("a systemd user manager does not come up here")
            time.sleep(0.1)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[UserManager]:
    if os.geteuid() or not MANAGER.exists() or shutil.which("dbus-daemon") is None:
        pytest.skip("systemd and dbus-daemon are not installed, or this is not root")
    made = not BOOTED.exists()
    BOOTED.mkdir(parents=True, exist_ok=True)
    running = UserManager(tmp_path)
    running.boot()
    yield running
    running.power_cut()
    if made:
        BOOTED.rmdir()


def wait_for(run: RunFolder, what: Callable[[dict[str, Any]], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not any(what(event) for event in run.events()):
        assert time.monotonic() < end, run.events()[-3:]
        time.sleep(0.05)


@pytest.mark.long
def test_an_installed_run_goes_on_by_itself_after_a_power_cut_and_a_restart(
    project: MakeProject, manager: UserManager
) -> None:
    work = project(
        training={"max_steps": 60, "eval_every": 100}, checkpoint={"every": "2 steps"}, guard={"ups": "none"}
    )
    work.train(output="whole")
    command = [sys.executable, "-P", "-m", "charkha", "service", "install", str(work.config), "--now"]
    installed = subprocess.run(command, env=manager.environment, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    run = RunFolder(work.run_folder())
    wait_for(run, lambda event: event["event"] == "checkpoint" and event["step"] >= 4)
    manager.power_cut()
    reached = max(event["step"] for event in run.events() if event["event"] == "step")
    assert reached < 60, "cut in the middle"
    manager.boot()
    wait_for(run, lambda event: event["event"] == "status" and event["status"] == "done")
    assert any(event["event"] == "resume" and event["from_step"] >= 4 for event in run.events())
    whole, cut = work.weights("whole"), work.weights("run")
    assert all(bool((whole[name] == cut[name]).all()) for name in whole)
