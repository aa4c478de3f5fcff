"""What the UPS says: NUT, apcupsd, a laptop's battery or any command; and what that means over time.

A UPS that cannot be read is "unknown" with a reason, never "online" and never an exception. Answers may come from the
network: each read has one deadline for all of it, looking up the host included, and a limit on what it takes in.

Not covered: `upsd` with TLS or a password, which it does not ask of those who only read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from charkha.errors import UsageError

_MOST_BYTES = 256 * 1024  # a large power strip tells about 80 KiB
_HERE = "127.0.0.1"
_TIMEOUT_S = 2.0
_POWER_SUPPLIES = Path("/sys/class/power_supply")  # Linux only; elsewhere psutil's word is enough
_FORMS = "auto, none, nut, nut:NAME@HOST:PORT, apcupsd, apcupsd:HOST:PORT, battery, command:PROGRAM ARGUMENTS"
_ADDRESS = re.compile(r'(?P<name>[^\s@:"\\]*)@(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s@:\[\]]*)(?::(?P<port>[0-9]{1,5}))?')
_STATUS = re.compile(r"[A-Za-z0-9_.:+-]{1,32}(?: +[A-Za-z0-9_.:+-]{1,32}){0,31} *")
_NUT_ROW = re.compile(r'(?:UPS|VAR \S+) (\S+) "((?:[^"\\]|\\.)*)"')
# apcupsd's bits and words in the words of NUT; all its reasons to shut down are one to us.
_APC_BITS = {0x1: "CAL", 0x2: "TRIM", 0x4: "BOOST", 0x8: "OL", 0x10: "OB", 0x20: "OVER", 0x40: "LB", 0x80: "RB"}
_APC_BITS |= {0x100: "COMMLOST"} | dict.fromkeys((0x200, 0x80000, 0x100000, 0x200000, 0x400000, 0x800000), "FSD")
_APC_TEXT = {"ONLINE": "OL", "ONBATT": "OB", "LOWBATT": "LB", "OVERLOAD": "OVER", "REPLACEBATT": "RB",
             "SHUTTING": "FSD"}  # fmt: skip
_EXIT_WORDS = {0: "OL", 1: "OB", 2: "OB LB"}
_Left = tuple[float | None, float | None]  # what is left, and at how much the UPS itself calls it low


@dataclass(frozen=True)
class UpsReading:
    """One UPS at one moment."""

    source: str
    state: Literal["online", "on_battery", "unknown"]
    low: bool = False  # battery low, or a forced shutdown is coming: stop now
    charge: float | None = None  # share, 0 to 1
    runtime_s: float | None = None  # what the UPS says is left; often far too much
    flags: frozenset[str] = frozenset()  # its further words as NUT writes them: BYPASS, RB, OVER, ALARM, CAL, OFF, ...
    reason: str | None = None  # why unknown


class Ups(Protocol):
    """Something that knows whether the mains are on."""

    source: str

    def read(self) -> UpsReading:
        """What it says now. Never raises for anything that a UPS, its daemon or the network can do."""


class _NoAnswer(Exception):
    """Nothing usable came back; the text says why."""


class _NoState(_NoAnswer):
    """A UPS daemon answers, but cannot tell."""


class _Asked:
    """What the sources share that wait for somebody else: they fail in many ways and may take for ever."""

    def __init__(self, source: str, timeout_s: float) -> None:
        self.source = source
        self.timeout_s = timeout_s

    def read(self) -> UpsReading:
        """What it says now, after at most `timeout_s` and a moment."""
        answers: list[UpsReading] = []
        reasons = [f"no complete answer within {self.timeout_s:g} s"]

        def answer() -> None:
            try:
                answers.append(self.ask())
            except TimeoutError:
                pass  # the reason above is better than the system's
            except (OSError, UnicodeError, _NoAnswer) as error:  # UnicodeError: a host name that cannot be one
                reasons.insert(0, getattr(error, "strerror", None) or str(error))

        # In a thread because looking up a host takes no timeout, and in a power cut nobody may be there to ask.
        worker = threading.Thread(target=answer, name="ups", daemon=True)
        worker.start()
        worker.join(self.timeout_s + 0.2)
        return answers[0] if answers else UpsReading(self.source, "unknown", reason=reasons[0])

    def ask(self) -> UpsReading:
        """Like `read`, but raises what went wrong."""
        raise NotImplementedError


class NutUps(_Asked):
    """A UPS behind the `upsd` of Network UPS Tools. Without a name it must be the only one there."""

    def __init__(self, host: str, port: int = 3493, name: str | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        super().__init__(f"nut {name}@{host}:{port}" if name else f"nut {host}:{port}", timeout_s)
        self._host, self._port, self._name = host, port, name

    def ask(self) -> UpsReading:
        """Connects, lists the variables, closes."""
        with contextlib.closing(_Connection(self._host, self._port, self.timeout_s)) as connection:
            names = [self._name] if self._name else sorted(_nut_list(connection, "UPS"))
            if len(names) != 1:
                reason = f"guard.ups has to name one of its {len(names)} UPSes: {_shown(', '.join(names))}"
                raise _NoState(reason) if names else _NoAnswer("it has no UPS")
            told = _nut_list(connection, f"VAR {names[0]}")
        charge = _left(told, "battery.charge", "battery.charge.low", 0.01, 1)
        runtime_s = _left(told, "battery.runtime", "battery.runtime.low")
        source = f"nut {names[0]}@{self._host}:{self._port}"
        return _reading(source, told.get("ups.status", ""), charge, runtime_s)


class ApcUps(_Asked):
    """A UPS behind apcupsd's network information server. Small ones tell few fields."""

    def __init__(self, host: str, port: int = 3551, timeout_s: float = _TIMEOUT_S) -> None:
        super().__init__(f"apcupsd {host}:{port}", timeout_s)
        self._host, self._port = host, port

    def ask(self) -> UpsReading:
        """Connects, asks for the status, closes."""
        told = {}
        with contextlib.closing(_Connection(self._host, self._port, self.timeout_s)) as connection:
            connection.send(b"\x00\x06status")
            while length := int.from_bytes(connection.take(2), "big"):
                key, _, value = connection.take(length).decode(errors="replace").partition(":")
                told[key.strip()] = value.strip()
        charge = _left(told, "BCHARGE", "MBATTCHG", 0.01, 1)
        return _reading(self.source, _apc_status(told), charge, _left(told, "TIMELEFT", "MINTIMEL", 60))


class LaptopBattery:
    """The battery of this machine: off the charger is off the mains."""

    source = "laptop battery"

    def read(self) -> UpsReading:
        """What psutil says, without batteries of peripherals."""
        import psutil

        try:
            seen = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        except (OSError, TypeError, ValueError) as error:  # a driver that writes words where numbers belong
            return UpsReading(self.source, "unknown", reason=f"the battery cannot be read: {error}")
        # psutil takes the battery of a wireless mouse, which always discharges, for that of the machine.
        if seen is None or set(self._told("Battery", "scope")) == {"Device"}:
            return UpsReading(self.source, "unknown", reason="this machine has no battery")
        charge = _number(min(seen.percent, 100), 0.01, 1)
        plugged: bool | None = seen.power_plugged
        if plugged is None and (mains := self._told("Mains", "online")):  # psutil knows some names of chargers only
            plugged = "1" in mains
        if plugged is None:
            return UpsReading(self.source, "unknown", charge=charge, reason="it does not tell whether it is charged")
        return _reading(self.source, "OL" if plugged else "OB", (charge, 0.1), (_number(seen.secsleft), None))

    def _told(self, kind: str, name: str) -> list[str]:
        """What supplies of one kind say under one name; "" for those that say nothing."""
        with contextlib.suppress(OSError, ValueError):
            supplies = [path.parent for path in _POWER_SUPPLIES.glob("*/type") if path.read_text().strip() == kind]
            return [(path / name).read_text().strip() if (path / name).exists() else "" for path in supplies]
        return []


class CommandUps(_Asked):
    """Any command, for an inverter without a data port: exit 0 mains are on, 1 on battery, 2 battery low.

    If its first line is a JSON object, `charge` (0 to 1) and `runtime_s` are taken from it. It runs without a shell.
    `ping` also ends with 2 where the network is down: wrap it so that every failure is 1. Raises ValueError for a
    command line that cannot be split.
    """

    def __init__(self, command: str, timeout_s: float = 5.0) -> None:
        super().__init__(f"command {command}", timeout_s)
        self._arguments = shlex.split(command)
        if not self._arguments or "\0" in command:
            raise ValueError("there is no command")

    def ask(self) -> UpsReading:
        """Runs it once; it and what it started are killed at `timeout_s`."""
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            self._arguments, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                # Nothing is read meanwhile: a command that prints more than the pipe holds waits for its end there.
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError from None
            os.set_blocking(process.stdout.fileno(), False)  # a child that it left behind may hold the pipe open
            output = process.stdout.read(4096) or b""
        if code not in _EXIT_WORDS:
            raise _NoAnswer(f"it ended with {code} instead of 0, 1 or 2")
        told: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(output.partition(b"\n")[0])
        told = told if isinstance(told, dict) else {}
        charge, runtime_s = _number(told.get("charge"), most=1), _number(told.get("runtime_s"))
        return _reading(self.source, _EXIT_WORDS[code], (charge, None), (runtime_s, None))


def open_ups(setting: str | None, *, nut_port: int = 3493, apc_port: int = 3551) -> Ups | None:
    """The UPS that `guard.ups` names; None for "none", and for "auto" where this machine has none.

    A UPS named outright is returned whether or not it answers. Raises UsageError for a form that is not known.
    """
    if setting is None or setting == "none":
        return None
    if setting == "auto":
        return _found_here(nut_port, apc_port)
    try:
        return _named(setting, nut_port, apc_port)
    except ValueError as error:
        message = f"{setting!r} names no UPS: {error}"
        raise UsageError(message, where="guard.ups", remedy=f"write one of: {_FORMS}") from None


@dataclass(frozen=True)
class MainsState:
    """What a run needs to know of its power. Times are on the clock given to `MainsWatch.update`."""

    on_battery: bool  # an outage goes on: from the first such reading until the mains are stable again
    stable: bool  # the mains were on without interruption for `stable_s`; so not in the first seconds of a watch
    low: bool  # stop now
    unknown_since_s: float | None  # the first of the unknown readings up to now; None after a known one
    seconds_on_battery: float  # in this outage; mains that came and went in between do not count


class MainsWatch:
    """Readings in, state of the power out. Mains that come and go are one outage until they stay for `stable_s`.

    One unknown reading changes nothing; from the second in a row the mains are not stable. None ends an outage.
    """

    def __init__(self, stable_s: float = 30.0) -> None:
        self._stable_s = stable_s
        self._state = MainsState(False, False, False, None, 0.0)
        self._online_since_s: float | None = None
        self._drawing, self._before_s = False, 0.0  # whether from the battery, as far as is known; the last reading

    def update(self, reading: UpsReading, now_s: float) -> MainsState:
        """The state after `reading`, which was taken at `now_s` (monotonic seconds)."""
        before = self._state
        spent_s = before.seconds_on_battery + (max(0.0, now_s - self._before_s) if self._drawing else 0.0)
        self._before_s = now_s
        if reading.state == "unknown":
            since_s = now_s if before.unknown_since_s is None else before.unknown_since_s
            stable = before.stable and before.unknown_since_s is None
            if before.unknown_since_s is not None:
                self._online_since_s = None
            self._state = MainsState(before.on_battery, stable, before.low or reading.low, since_s, spent_s)
            return self._state
        self._drawing = reading.state == "on_battery"
        if self._drawing or self._online_since_s is None:
            self._online_since_s = None if self._drawing else now_s
        stable = self._online_since_s is not None and now_s - self._online_since_s >= self._stable_s
        on_battery = self._drawing or (before.on_battery and not stable)
        self._state = MainsState(on_battery, stable, reading.low, None, spent_s if on_battery else 0.0)
        return self._state


class _Connection:
    """TCP with one deadline for everything and at most `_MOST_BYTES` received, whatever the other side does."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._ends_s = time.monotonic() + timeout_s
        self._received, self._count = bytearray(), 0
        self._socket = socket.create_connection((host.strip("[]"), port), timeout_s)
        self.send, self.close = self._socket.sendall, self._socket.close

    def line(self) -> str:
        """The next line without its end; bytes that are no UTF-8 replaced."""
        while (end := self._received.find(b"\n")) < 0:
            self._receive()
        return self.take(end + 1)[:-1].decode(errors="replace")

    def take(self, count: int) -> bytes:
        while len(self._received) < count:
            self._receive()
        taken, self._received = bytes(self._received[:count]), self._received[count:]
        return taken

    def _receive(self) -> None:
        rest_s = self._ends_s - time.monotonic()
        if rest_s <= 0:
            raise TimeoutError
        self._socket.settimeout(rest_s)
        chunk = self._socket.recv(4096)
        self._count += len(chunk)
        if not chunk:
            raise _NoAnswer("it closed the connection before its answer was complete")
        if self._count > _MOST_BYTES:
            raise _NoAnswer(f"it sent more than {_MOST_BYTES // 1024} KiB")
        self._received += chunk


def _found_here(nut_port: int, apc_port: int) -> Ups | None:
    for ups in (NutUps(_HERE, nut_port, timeout_s=0.3), ApcUps(_HERE, apc_port, timeout_s=0.3)):
        try:
            ups.ask()
        except _NoState:
            pass  # there is one, in trouble: that is for the reader to see
        except (OSError, _NoAnswer):
            continue
        ups.timeout_s = _TIMEOUT_S
        return ups
    battery = LaptopBattery()
    return None if battery.read().charge is None else battery


def _named(setting: str, nut_port: int, apc_port: int) -> Ups:
    kind, _, rest = setting.partition(":")
    if kind == "command":
        return CommandUps(rest)
    if setting == "battery":
        return LaptopBattery()
    match = _ADDRESS.fullmatch(f"@{rest}" if kind == "apcupsd" else rest if "@" in rest else f"{rest}@")
    if match is None or kind not in ("nut", "apcupsd"):
        raise ValueError("this form is not known")
    host, port = match["host"] or _HERE, int(match["port"] or (nut_port if kind == "nut" else apc_port))
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    return NutUps(host, port, match["name"] or None) if kind == "nut" else ApcUps(host, port)


def _nut_list(connection: _Connection, query: str) -> dict[str, str]:
    """Names and values of a LIST: `{"ups.status": "OL", ...}`."""
    connection.send(f"LIST {query}\n".encode(errors="replace"))
    told: dict[str, str] = {}
    line = connection.line()
    if line.startswith("ERR "):
        raise _NoState(f"it answers {_shown(line[4:])}")
    if line != f"BEGIN LIST {query}":
        raise _NoAnswer(f"it does not speak NUT's protocol: {_shown(line)!r}")
    while (line := connection.line()) != f"END LIST {query}":
        if match := _NUT_ROW.fullmatch(line):
            told[match[1]] = match[2]
    return told


def _apc_status(told: dict[str, str]) -> str:
    """The status in the words of NUT; from STATFLAG, which is the same for every model, where it is told."""
    bits = re.match("0x([0-9A-Fa-f]{1,8})", told.get("STATFLAG", ""))
    if bits:
        words = [word for bit, word in _APC_BITS.items() if int(bits[1], 16) & bit]
    else:
        words = [_APC_TEXT.get(word, word) for word in told.get("STATUS", "").split()]
    if not words:
        raise _NoAnswer("it tells no status")
    if "COMMLOST" in words and "FSD" not in words:
        raise _NoState("apcupsd no longer hears the UPS (COMMLOST)")
    return " ".join(words)


def _reading(source: str, status: str, charge: _Left, runtime_s: _Left) -> UpsReading:
    """A reading from a status in NUT's words, such as `OB LB DISCHRG`."""
    words = frozenset(status.split() if _STATUS.fullmatch(status) else ())
    flags, on_battery = words - {"OL", "OB", "LB", "FSD"}, "OB" in words
    if ("OL" in words) == on_battery:
        reason = f"its status {_shown(status)!r} says neither or both of online and on battery"
        return UpsReading(source, "unknown", "FSD" in words, charge[0], runtime_s[0], flags, reason)
    ends = any(left is not None and low is not None and left <= low for left, low in (charge, runtime_s))
    low = "FSD" in words or (on_battery and ("LB" in words or ends))
    return UpsReading(source, "on_battery" if on_battery else "online", low, charge[0], runtime_s[0], flags)


def _left(told: dict[str, str], left: str, low: str, factor: float = 1.0, most: float = math.inf) -> _Left:
    return _number(told.get(left), factor, most), _number(told.get(low), factor, most)


def _number(told: Any, factor: float = 1.0, most: float = math.inf) -> float | None:
    """The number at the beginning of what was told; None for none, for less than zero and for more than `most`."""
    try:
        number = round(float(str(told).split()[0]) * factor, 6)
    except (ValueError, IndexError):
        return None
    return number if math.isfinite(number) and 0 <= number <= most else None


def _shown(text: str) -> str:
    """What a stranger sent, fit for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])
