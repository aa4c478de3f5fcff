"""A systemd user unit that goes on with a run after a reboot or a power cut: its text, and putting it in its place.

Not covered: launchd (macOS), system units, and a UPS daemon that starts after the unit where `guard.ups` is `auto`,
which then finds none and does not wait for it: name the UPS in the config.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from charkha.caches import VARIABLES
from charkha.config_file import LoadedConfig, load_config
from charkha.errors import EnvironmentProblem, UsageError
from charkha.hardware.ups import MainsWatch, open_ups
from charkha.store import durable
from charkha.store.runs import RunFolder
from charkha.summary import summarize

MARKER = "# Written by charkha service;"
EXIT_RESUMES = 69  # of after-exit; systemd would take 75 for a success here too
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are no UTF-8
# How guard.py words a stop because of the battery; a test holds the two together.
_BATTERY_STOP = re.compile(r"the battery (is low|lasts .*): saving and stopping")
_UNIT = """\
{marker} `charkha service remove CONFIG` removes it. Installing again overwrites it.
[Unit]
Description=Trains {name} with charkha
# What cannot start (exit code 1, or 5: a driver that is not up yet) is tried 20 times in an hour, then given up.
StartLimitIntervalSec=1h
StartLimitBurst=20

[Service]
Type=simple
WorkingDirectory={folder}
{environment}
# Waits for stable mains, for hours if need be. The minus: whatever goes wrong here, the training is to say it.
TimeoutStartSec=infinity
ExecStartPre=-{wait}
ExecStart={train}
# Exit code 75 is a stop with everything saved. After `charkha stop`, SIGTERM, heat or a spent budget it stays so: it
# counts as a success. After a low battery, after-exit fails on purpose, which makes it a failure to be restarted:
# ExecStartPre then waits until the mains are back, unless the machine goes down first and boots into WantedBy.
SuccessExitStatus=75
ExecStopPost={after}
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=0 2 3 4 6 7
# A worker that the kernel kills for memory is started again by its supervisor; the unit need not fall with it.
OOMPolicy=continue
KillSignal=SIGTERM
# SIGTERM goes to the supervisor, which hands it on once. When the machine goes down, systemd gives all services of a
# user 120 s together (user@.service); a save that takes longer is lost then, the checkpoint before it is not.
KillMode=mixed
TimeoutStopSec=300

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True)
class Installed:
    """What `install_service` did. `to_do`: commands that are left to the person, as typed into a shell."""

    unit: str
    enabled: bool
    started: bool
    linger: bool | None  # whether the unit starts at boot rather than at login; None: nobody here can tell
    to_do: tuple[str, ...]
    reason: str | None  # why systemctl could not do it


@dataclass(frozen=True)
class ServiceStatus:
    """Where the unit and its run stand. `enabled` and `active` are systemctl's words, `unknown` where it has none."""

    unit: str
    installed: bool
    enabled: str
    active: str
    run: str
    run_status: str  # as in summary.py, or `not started`
    run_reason: str | None


@dataclass(frozen=True)
class Removed:
    """Units that are gone, and what is left to the person."""

    units: tuple[str, ...]
    to_do: tuple[str, ...]


@dataclass(frozen=True)
class MainsWait:
    """How the wait for the mains ended."""

    outcome: Literal["no_ups", "stable", "unknown"]
    source: str | None
    waited_s: float
    reason: str | None = None


def unit_text(config: Path, run: Path, python: str = sys.executable, environ: Mapping[str, str] = os.environ) -> str:
    """The unit for a config (absolute). Raises UsageError for a path that no unit can hold."""
    caches = [f"{name}={Path(environ[name]).expanduser().absolute()}" for name in VARIABLES if environ.get(name)]
    for text in (str(config), str(run), python, *caches):
        if _UNWRITABLE.search(text):
            raise UsageError(f"{text!r} cannot stand in a systemd unit", remedy="rename the folder or file")
    # Modules are not looked for in the config's folder, by the worker neither: a `datasets.py` there would be run.
    settings = ["PYTHONSAFEPATH=1", *caches]
    folder = str(config.parent)
    return _UNIT.format(
        marker=MARKER,
        name=run.name.replace("%", "%%"),
        # Not unquoted by systemd, which strips the line and joins it to the next after a backslash.
        folder=folder.replace("%", "%%") + ("/." if folder.endswith((" ", "\\")) else ""),
        environment="\n".join(f"Environment={_quoted(setting)}" for setting in settings),
        wait=_command_line(python, "service", "wait-mains", str(config)),
        train=_command_line(python, "train", str(config)),
        after=_command_line(python, "service", "after-exit", str(config)),
    )


def _quoted(text: str) -> str:
    """A word of a unit, in C-style quotes, that means just `text`."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _command_line(python: str, *arguments: str) -> str:
    words = [_quoted(word).replace("$", "$$") for word in (python, "-m", "charkha", *arguments)]
    if re.search(r"[$\"'\\]", python):  # systemd allows none of these in the name of the program, only in arguments
        return " ".join(["/bin/sh", "-c", '"exec \\"$$0\\" \\"$$@\\""', *words])
    return " ".join(words)


def install_service(config: Path, *, start: bool = False) -> Installed:
    """Writes the unit and enables it; starts it only when asked.

    Raises ConfigError for a broken config, UsageError for a run that is done and for a unit that is somebody else's,
    EnvironmentProblem elsewhere than on Linux.
    """
    config, run = _placed(config), _run_of(load_config(config))
    done = next((path for path in (run.adapter, run.path / "model") if path.is_dir()), None)
    if done is not None:
        raise UsageError("this run is done", where=str(done), remedy="for a new run, give the config a new `output`")
    if not sys.platform.startswith("linux"):
        remedy = "after a reboot, run `charkha train CONFIG` again: it goes on"
        raise EnvironmentProblem("a service needs systemd, which only Linux has", remedy=remedy)
    unit, before = _unit_path(config, run), _units_of(config)
    for path in {unit, *before}:
        _require_ours(path)
    text = unit_text(config, run.path)
    durable.make_folder(unit.parent)
    durable.write_durably(unit, text.encode())
    for path in before:
        if path != unit:  # of an earlier `output`
            _drop(path)
    actions = [["daemon-reload"], ["enable", unit.name], *([["start", "--no-block", unit.name]] if start else [])]
    left, reason = _systemctl(actions)
    linger = _lingers()
    to_do = [*left, *([] if linger else [shlex.join(["loginctl", "enable-linger", _user()])])]
    return Installed(str(unit), not left, start and not left, linger, tuple(to_do), reason)


def service_status(config: Path) -> ServiceStatus:
    """Unit and run of a config. Raises ConfigError for a broken one."""
    config, run = _placed(config), _run_of(load_config(config))
    unit = next(iter(_units_of(config)), _unit_path(config, run))
    summary = summarize(run) if run.exists else None
    return ServiceStatus(
        unit=str(unit),
        installed=_is_ours(unit),
        enabled=_word("is-enabled", unit.name),
        active=_word("is-active", unit.name),
        run=str(run.path),
        run_status=summary.status if summary else "not started",
        run_reason=summary.reason if summary else None,
    )


def remove_service(config: Path) -> Removed:
    """Disables and deletes the config's unit; a training that goes on now is left to go on.

    The config need not exist any more. Raises UsageError where there is no unit, or one that is somebody else's.
    """
    units = _units_of(_placed(config))
    if not units:
        raise UsageError("no service is installed for it", where=str(config), remedy="`charkha service install` does")
    for unit in units:
        _require_ours(unit)
    for unit in units:
        _drop(unit)
    left, _ = _systemctl([["daemon-reload"]])
    return Removed(tuple(map(str, units)), tuple(left))


def resumes_after_exit(config: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the training that has just ended stopped for a low battery. `environ`: as systemd sets it afterwards."""
    if environ.get("EXIT_STATUS") != "75":
        return False
    said = [event for event in _run_of(load_config(config)).events() if event["event"] == "status"]
    last = said[-1] if said else {}
    return last.get("status") == "paused" and bool(_BATTERY_STOP.search(last.get("reason") or ""))


def wait_for_mains(
    config: Path, say: Callable[[str], None], *, stable_s: float = 30.0, unknown_s: float = 120.0, poll_s: float = 2.0
) -> MainsWait:
    """Returns when the mains have been on for `stable_s`; at once when there is no UPS.

    A UPS that does not answer holds nobody up for long: it is given `unknown_s` from the start, or from the last time
    that it said `on battery`. Raises ConfigError.
    """
    ups, began_s = open_ups(load_config(config).config.guard.ups), time.monotonic()
    if ups is None:
        return MainsWait("no_ups", None, 0.0)
    watch, told, battery_s = MainsWatch(stable_s), "", began_s
    while True:
        reading, now_s = ups.read(), time.monotonic()
        if watch.update(reading, now_s).stable:
            return MainsWait("stable", reading.source, now_s - began_s)
        if reading.state == "on_battery":
            battery_s = now_s
        elif reading.state == "unknown" and now_s - battery_s >= unknown_s:
            return MainsWait("unknown", reading.source, now_s - began_s, reading.reason)
        if reading.state != told:
            told = reading.state
            say(f"{reading.source}: {told.replace('_', ' ')}; waiting until the mains are on for {stable_s:g} s")
        time.sleep(poll_s)


def _placed(config: Path) -> Path:
    """Absolute, its folder without links; the file itself may be one: what it says is relative to where it stands."""
    return config.parent.resolve() / config.name


def _run_of(loaded: LoadedConfig) -> RunFolder:
    return RunFolder((loaded.folder / loaded.config.output).resolve())


def _unit_folder() -> Path:
    wished = Path(os.environ.get("XDG_CONFIG_HOME", ""))  # a relative one counts as none, says its specification
    return (wished if wished.is_absolute() else Path.home() / ".config") / "systemd/user"


def _key(config: Path) -> str:
    return hashlib.sha256(os.fsencode(config)).hexdigest()[:8]


def _unit_path(config: Path, run: RunFolder) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", run.path.name.lower()).strip("-")[:40] or "run"
    return _unit_folder() / f"charkha-{slug}-{_key(config)}.service"


def _units_of(config: Path) -> list[Path]:
    """The config's units that are there, whatever `output` it had when they were made."""
    return sorted(_unit_folder().glob(f"charkha-*-{_key(config)}.service"))


def _is_ours(unit: Path) -> bool:
    return unit.is_file() and unit.read_text(errors="replace").startswith(MARKER)


def _require_ours(unit: Path) -> None:
    if os.path.lexists(unit) and not _is_ours(unit):
        remedy = "nothing was changed; move this file away if you do not need it, then run the command again"
        raise UsageError("this unit was not written by charkha", where=str(unit), remedy=remedy)


def _drop(unit: Path) -> None:
    """Disables and deletes; one that only waits (for the mains, or to be restarted) is also stopped."""
    waits = _word("is-active", unit.name) == "activating"
    _systemctl([["disable", *(["--now"] if waits else []), unit.name]])
    durable.remove_file(unit.parent / "default.target.wants" / unit.name)  # what `disable` does, where it cannot
    durable.remove_file(unit)
    durable.sync_folder(unit.parent)


def _systemctl(actions: Sequence[Sequence[str]]) -> tuple[list[str], str | None]:
    """Does one after the other; from the first that fails on, the commands that are left, and why."""
    for done, action in enumerate(actions):
        answer = _ask("systemctl", "--user", *action)
        if answer.returncode != 0:
            return [shlex.join(["systemctl", "--user", *left]) for left in actions[done:]], answer.stderr.strip()
    return [], None


def _word(question: str, unit: str) -> str:
    """The answer of `systemctl is-enabled` or `is-active`, which may come with any exit code."""
    words = _ask("systemctl", "--user", question, unit).stdout.split()
    return words[0] if words else "unknown"


def _lingers() -> bool | None:
    answer = _ask("loginctl", "show-user", _user(), "--property=Linger").stdout.strip()
    return {"Linger=yes": True, "Linger=no": False}.get(answer)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """How the command ended; with 127 and the reason as `stderr` where it is missing or silent."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "is not installed" if isinstance(error, FileNotFoundError) else f"gives no answer: {error}"
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} {why}")
