"""UPSes: fake daemons on loopback that answer well, badly or without end, real NUT where it is installed, and time."""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from charkha.errors import UsageError
from charkha.hardware import ups
from charkha.hardware.ups import ApcUps, CommandUps, LaptopBattery, MainsState, MainsWatch, NutUps, UpsReading, open_ups
from real_nut import HERE, RealNut, wait_for

Talk = Callable[[socket.socket], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Talk], int]]:
    """`serve(talk)`: the port at which `talk` holds each conversation in a thread of its own."""
    listeners: list[socket.socket] = []

    def start(talk: Talk) -> int:
        listener = socket.create_server((HERE, 0))
        listeners.append(listener)

        def hold(conversation: socket.socket) -> None:
            with conversation, contextlib.suppress(OSError):  # the client may leave in the middle
                talk(conversation)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conversation = listener.accept()[0]
                    threading.Thread(target=hold, args=(conversation,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        listener.close()


@pytest.fixture
def no_battery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(ups, "_POWER_SUPPLIES", tmp_path / "none")


def upsd(*upses: str, **variables: str) -> Talk:
    """A NUT server; `ups_status="OL"` is the variable `ups.status` of each UPS."""

    def talk(conversation: socket.socket) -> None:
        for line in conversation.makefile("r"):
            query = line.removeprefix("LIST ").rstrip("\n")
            if query == "UPS":
                rows = [f'UPS {name} "of the \\"office\\""' for name in upses]
            elif query.removeprefix("VAR ") in upses:
                rows = [f'{query} {key.replace("_", ".")} "{value}"' for key, value in variables.items()]
            else:
                conversation.sendall(b"ERR UNKNOWN-UPS\n")
                continue
            conversation.sendall("\n".join([f"BEGIN LIST {query}", *rows, f"END LIST {query}\n"]).encode())

    return talk


def apcupsd(**fields: str) -> Talk:
    def talk(conversation: socket.socket) -> None:
        assert conversation.recv(8) == b"\x00\x06status"
        records = [f"{key:<9}: {value}\n".encode() for key, value in fields.items()]
        conversation.sendall(b"".join(len(record).to_bytes(2, "big") + record for record in records) + b"\0\0")

    return talk


def says(answer: bytes, *, then_s: float = 0.0) -> Talk:
    def talk(conversation: socket.socket) -> None:
        conversation.recv(4096)
        conversation.sendall(answer)
        time.sleep(then_s)

    return talk


def floods(start: bytes, again: bytes, pause_s: float = 0.0) -> Talk:
    """Sends without end."""

    def talk(conversation: socket.socket) -> None:
        conversation.recv(4096)
        conversation.sendall(start)
        while True:
            conversation.sendall(again)
            time.sleep(pause_s)

    return talk


# NUT


@pytest.mark.parametrize(
    ("status", "state", "low", "flags"),
    [
        ("OL", "online", False, set()),
        ("OL CHRG LB", "online", False, {"CHRG"}),
        ("OB DISCHRG", "on_battery", False, {"DISCHRG"}),
        ("OB LB DISCHRG", "on_battery", True, {"DISCHRG"}),
        ("FSD OL", "online", True, set()),
        ("FSD OB", "on_battery", True, set()),
        ("ALARM OL BYPASS OFF", "online", False, {"ALARM", "BYPASS", "OFF"}),
        ("OL OB LB FSD", "unknown", True, set()),
        ("OL OB", "unknown", False, set()),
        ("WAIT", "unknown", False, {"WAIT"}),
        ("FSD", "unknown", True, set()),
        ("", "unknown", False, set()),
        ("OLD", "unknown", False, {"OLD"}),
        ("OL \0", "unknown", False, set()),
        ("OL \u202e", "unknown", False, set()),
    ],
)
def test_status_words_combine(
    serve: Callable[[Talk], int], status: str, state: str, low: bool, flags: set[str]
) -> None:
    reading = NutUps(HERE, serve(upsd("home", ups_status=status)), "home").read()
    assert (reading.state, reading.low, reading.flags) == (state, low, flags)
    assert (reading.reason is None) == (state != "unknown")


def test_charge_is_a_share_and_runtime_is_in_seconds(serve: Callable[[Talk], int]) -> None:
    port = serve(upsd("home", ups_status="OL", battery_charge="87", battery_runtime="1260"))
    assert NutUps(HERE, port).read() == UpsReading(f"nut home@127.0.0.1:{port}", "online", False, 0.87, 1260)


@pytest.mark.parametrize("charge", ["-5", "101", "nan", "inf", "1e999", "", "full"])
def test_a_charge_that_cannot_be_is_none(serve: Callable[[Talk], int], charge: str) -> None:
    reading = NutUps(HERE, serve(upsd("home", ups_status="OB", battery_charge=charge, battery_charge_low="20"))).read()
    assert (reading.state, reading.charge, reading.low) == ("on_battery", None, False)


def test_on_battery_the_limits_of_the_ups_count_as_low(serve: Callable[[Talk], int]) -> None:
    at_limit = {"battery_charge": "20", "battery_charge_low": "20"}
    assert NutUps(HERE, serve(upsd("home", ups_status="OB", **at_limit))).read().low
    assert not NutUps(HERE, serve(upsd("home", ups_status="OL", **at_limit))).read().low
    short = {"battery_runtime": "100", "battery_runtime_low": "120"}
    assert NutUps(HERE, serve(upsd("home", ups_status="OB", **short))).read().low


def test_several_upses_and_no_name_is_unknown_and_tells_the_names(serve: Callable[[Talk], int]) -> None:
    port = serve(upsd("shop", "home", ups_status="OL"))
    reading = NutUps(HERE, port).read()
    assert reading.state == "unknown"
    assert "home, shop" in str(reading.reason)
    assert NutUps(HERE, port, "shop").read().state == "online"
    assert "UNKNOWN-UPS" in str(NutUps(HERE, port, "other").read().reason)


@pytest.mark.parametrize("code", ["DATA-STALE", "DRIVER-NOT-CONNECTED", "ACCESS-DENIED"])
def test_an_error_is_unknown_with_its_name(serve: Callable[[Talk], int], code: str) -> None:
    reading = NutUps(HERE, serve(says(f"ERR {code}\n".encode())), "home").read()
    assert (reading.state, code in str(reading.reason)) == ("unknown", True)


def test_odd_text_in_other_variables_does_not_hide_the_status(serve: Callable[[Talk], int]) -> None:
    rows = b'BEGIN LIST VAR home\nVAR home ups.mfr "\xff\xfe\x00"\n\nVAR home ups.status "OB"\nEND LIST VAR home\n'
    assert NutUps(HERE, serve(says(rows)), "home").read().state == "on_battery"


BEGIN = b"BEGIN LIST VAR home\n"
HOSTILE = {
    "a line without end": floods(b"", b"x" * 65536),
    "a list without end": floods(BEGIN + b'VAR home ups.status "OL"\n', b'VAR home a.b "1"\n' * 4000),
    "nothing but NUL": floods(b"", b"\0" * 65536),
    "a byte now and then": floods(BEGIN, b"V", pause_s=0.05),
    "a line now and then": floods(BEGIN + b'VAR home ups.status "OL"\n', b"\n", pause_s=0.05),
    "silence": says(b"", then_s=5),
    "half an answer": says(BEGIN + b'VAR home ups.status "OL"\n'),
    "half an answer, then silence": says(BEGIN + b'VAR home ups.status "OL"\n', then_s=5),
    "no UTF-8": says(b"\xff\xfe\xff\n"),
    "another protocol": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "another UPS's list": says(b'BEGIN LIST VAR other\nVAR other ups.status "OL"\nEND LIST VAR other\n'),
    "control characters": says(b"ERR \x1b[2J\x07\n"),
    "an end at once": says(b""),
}


@pytest.mark.parametrize("kind", [NutUps, ApcUps])
@pytest.mark.parametrize("answer", HOSTILE)
def test_a_hostile_answer_is_unknown_in_bounded_time_and_memory(
    serve: Callable[[Talk], int], answer: str, kind: type[NutUps | ApcUps]
) -> None:
    arguments: dict[str, Any] = {"name": "home"} if kind is NutUps else {}
    source = kind(HERE, serve(HOSTILE[answer]), timeout_s=0.15, **arguments)
    tracemalloc.start()
    began = time.monotonic()
    reading = source.read()
    took_s, (_, peak_bytes) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reading.state == "unknown"
    assert reading.reason
    assert reading.reason.isprintable()
    assert took_s < 1.5
    assert peak_bytes < 2 * 1024 * 1024
    wait_for(lambda: all(thread.name != "ups" for thread in threading.enumerate()), within_s=1)


def test_a_closed_port_and_a_host_that_is_none_are_unknown(free_port: int) -> None:
    assert "refused" in str(NutUps(HERE, free_port).read().reason)
    assert ApcUps("a" * 70 + ".invalid", free_port).read().state == "unknown"
    assert NutUps("no-such-host.invalid", free_port).read().reason


def test_looking_up_the_host_counts_towards_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def look_up(*_: object, **__: object) -> Any:
        release.wait(10)
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    assert "within 0.1 s" in str(NutUps("nas.local", timeout_s=0.1).read().reason)
    assert time.monotonic() - began < 2
    release.set()


# apcupsd


def test_apcupsd_is_read_from_its_bits(serve: Callable[[Talk], int]) -> None:
    fields = {"STATUS": "gibberish", "BCHARGE": "064.0 Percent", "TIMELEFT": "12.5 Minutes", "MBATTCHG": "5 Percent"}
    port = serve(apcupsd(**fields, STATFLAG="0x050200B0 Status Flag"))
    reading = ApcUps(HERE, port).read()
    assert reading == UpsReading(f"apcupsd 127.0.0.1:{port}", "on_battery", False, 0.64, 750, frozenset({"RB", "OVER"}))


@pytest.mark.parametrize(
    ("fields", "state", "low", "flags"),
    [
        ({"STATFLAG": "0x05000008"}, "online", False, set()),
        ({"STATFLAG": "0x05000050"}, "on_battery", True, set()),
        ({"STATFLAG": "0x05000210"}, "on_battery", True, set()),
        ({"STATFLAG": "0x00200010"}, "on_battery", True, set()),
        ({"STATFLAG": "0x05000108"}, "unknown", False, set()),
        ({"STATFLAG": "0x05800310"}, "on_battery", True, {"COMMLOST"}),
        ({"STATFLAG": "0x05000000"}, "unknown", False, set()),
        ({"STATUS": "ONLINE REPLACEBATT"}, "online", False, {"RB"}),
        ({"STATUS": "ONBATT LOWBATT"}, "on_battery", True, set()),
        ({"STATUS": "CAL TRIM ONLINE"}, "online", False, {"CAL", "TRIM"}),
        ({"STATUS": "COMMLOST"}, "unknown", False, set()),
        ({"STATUS": "ONBATT", "BCHARGE": "5.0 Percent", "MBATTCHG": "5 Percent"}, "on_battery", True, set()),
        ({"STATUS": "ONBATT", "TIMELEFT": "3.0 Minutes", "MINTIMEL": "3 Minutes"}, "on_battery", True, set()),
        ({"STATUS": "ONBATT", "MINTIMEL": "-1 Minutes"}, "on_battery", False, set()),
        ({"MODEL": "Back-UPS"}, "unknown", False, set()),
        ({}, "unknown", False, set()),
    ],
)
def test_apcupsd_states(
    serve: Callable[[Talk], int], fields: dict[str, str], state: str, low: bool, flags: set[str]
) -> None:
    reading = ApcUps(HERE, serve(apcupsd(**fields))).read()
    assert (reading.state, reading.low, reading.flags) == (state, low, flags)
    assert (reading.reason is None) == (state != "unknown")


# A laptop's battery


@pytest.fixture
def battery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., UpsReading]:
    """`battery(50, False, 600, BAT0={"type": "Battery"})`: psutil says this, and the kernel that."""

    def read(percent: float, plugged: bool | None, left_s: int, **supplies: dict[str, str]) -> UpsReading:
        seen = SimpleNamespace(percent=percent, power_plugged=plugged, secsleft=left_s)
        monkeypatch.setattr(psutil, "sensors_battery", lambda: seen, raising=False)
        monkeypatch.setattr(ups, "_POWER_SUPPLIES", tmp_path)
        for supply, files in supplies.items():
            (tmp_path / supply).mkdir()
            for name, text in files.items():
                (tmp_path / supply / name).write_text(text + "\n")
        return LaptopBattery().read()

    return read


def test_a_laptop_off_its_charger_is_on_battery(battery: Callable[..., UpsReading]) -> None:
    assert battery(50, False, 600) == UpsReading("laptop battery", "on_battery", False, 0.5, 600)
    assert battery(10, False, 60).low
    full = battery(101.7, True, psutil.POWER_TIME_UNLIMITED)
    assert full == UpsReading("laptop battery", "online", False, 1.0)
    assert not battery(3, True, psutil.POWER_TIME_UNLIMITED).low
    assert battery(50, False, psutil.POWER_TIME_UNKNOWN).runtime_s is None


def test_a_wireless_mouse_is_not_the_battery_of_the_machine(battery: Callable[..., UpsReading]) -> None:
    mouse = {"type": "Battery", "scope": "Device"}
    assert battery(50, False, 600, hidpp_battery_0=mouse).state == "unknown"
    assert battery(50, False, 600, BAT0={"type": "Battery"}).state == "on_battery"


def test_a_charger_that_psutil_does_not_know_is_asked(battery: Callable[..., UpsReading]) -> None:
    held_at_60 = battery(60, None, -1)
    assert (held_at_60.state, held_at_60.charge) == ("unknown", 0.6)
    assert battery(60, None, -1, ADP1={"type": "Mains", "online": "1"}).state == "online"


@pytest.mark.usefixtures("no_battery")
def test_no_battery_and_one_that_cannot_be_read_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LaptopBattery().read().state == "unknown"

    def fail() -> None:
        raise TypeError("bytes")

    monkeypatch.setattr(psutil, "sensors_battery", fail, raising=False)
    assert "bytes" in str(LaptopBattery().read().reason)


# A command


def python(script: str) -> str:
    return shlex.join([sys.executable, "-I", "-S", "-c", script])


@pytest.mark.parametrize(
    ("code", "state", "low"), [(0, "online", False), (1, "on_battery", False), (2, "on_battery", True)]
)
def test_the_exit_code_of_a_command_tells_the_state(code: int, state: str, low: bool) -> None:
    reading = CommandUps(python(f"raise SystemExit({code})")).read()
    assert (reading.state, reading.low, reading.reason) == (state, low, None)


def test_other_ends_of_a_command_are_unknown() -> None:
    assert "ended with 3" in str(CommandUps(python("raise SystemExit(3)")).read().reason)
    assert "ended with -9" in str(CommandUps(python("import os; os.kill(os.getpid(), 9)")).read().reason)
    assert "No such file" in str(CommandUps("/nowhere/probe --now").read().reason)
    assert "denied" in str(CommandUps(str(Path(__file__).parent)).read().reason)


def test_charge_and_runtime_are_taken_from_a_first_line_of_json() -> None:
    reading = CommandUps(python('print(\'{"charge": 0.4, "runtime_s": 600}\\nmore\')')).read()
    assert (reading.state, reading.charge, reading.runtime_s) == ("online", 0.4, 600)


@pytest.mark.parametrize(
    "line",
    ["87", "[]", "{", '{"charge": 87}', '{"charge": true, "runtime_s": "soon"}', '{"charge": NaN, "runtime_s": 1e999}'],
)
def test_other_output_does_not_change_the_state(line: str) -> None:
    reading = CommandUps(python(f"print({line!r}); raise SystemExit(1)")).read()
    assert (reading.state, reading.charge, reading.runtime_s) == ("on_battery", None, None)


def test_json_nested_without_end_does_not_change_the_state() -> None:
    assert CommandUps(python("print('['*60000)")).read().state == "online"


def test_a_command_that_hangs_or_prints_for_ever_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open({!r}, 'w').write(str(p.pid)); p.wait()"
    hangs = CommandUps(python(child.format(str(tmp_path / "pid"))), timeout_s=1)
    assert "within 1 s" in str(hangs.read().reason)
    wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))
    prints = CommandUps(python("while True: print('x' * 9999)"), timeout_s=0.3)
    assert "within 0.3 s" in str(prints.read().reason)


def test_a_child_that_stays_behind_does_not_hold_the_reading_up() -> None:
    script = "import subprocess; print('{\"charge\": 0.5}', flush=True); subprocess.Popen(['sleep', '2'])"
    began = time.monotonic()
    assert CommandUps(python(script)).read().charge == 0.5
    assert time.monotonic() - began < 1.8


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert CommandUps(f"true; touch {marker} && false").read().state == "unknown"
    assert CommandUps(f"true $(touch {marker}) | touch {marker}").read().state == "online"
    assert not marker.exists()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# The setting


@pytest.fixture
def free_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("setting", "source"),
    [
        ("nut", "nut 127.0.0.1:3493"),
        ("nut:home", "nut home@127.0.0.1:3493"),
        ("nut:home@nas", "nut home@nas:3493"),
        ("nut:home@nas.local:1234", "nut home@nas.local:1234"),
        ("nut:@nas", "nut nas:3493"),
        ("nut:home@[::1]:1234", "nut home@[::1]:1234"),
        ("apcupsd", "apcupsd 127.0.0.1:3551"),
        ("apcupsd:nas", "apcupsd nas:3551"),
        ("apcupsd:10.0.0.7:1234", "apcupsd 10.0.0.7:1234"),
        ("battery", "laptop battery"),
        ("command:ping -c1 'a b'", "command ping -c1 'a b'"),
    ],
)
def test_a_named_source_is_opened_without_asking_it(setting: str, source: str) -> None:
    opened = open_ups(setting)
    assert opened is not None
    assert opened.source == source


@pytest.mark.parametrize(
    "setting",
    ["", "yes", "NUT", "nut:a b", "nut:a@b:c", "nut:a@b:70000", "nut:a@b:0", 'nut:a"@b', "nut:a\nb@c", "apcupsd:a@b",
     "apcupsd:a:b:c", "battery:1", "command:", "command:  ", "command:'unclosed", "command:a\0b"],
)  # fmt: skip
def test_another_setting_is_refused_with_the_forms_that_work(setting: str) -> None:
    with pytest.raises(UsageError, match="nut:NAME@HOST:PORT") as refused:
        open_ups(setting)
    assert refused.value.where == "guard.ups"


def test_none_is_no_ups() -> None:
    assert open_ups("none") is None
    assert open_ups(None) is None


def test_a_named_source_that_does_not_answer_is_unknown(free_port: int) -> None:
    for setting in ("nut", "apcupsd"):
        opened = open_ups(setting, nut_port=free_port, apc_port=free_port)
        assert opened is not None
        assert opened.read().state == "unknown"


@pytest.mark.usefixtures("no_battery")
def test_auto_takes_what_answers_here(
    serve: Callable[[Talk], int], free_port: int, battery: Callable[..., UpsReading]
) -> None:
    def found(nut_port: int = free_port, apc_port: int = free_port) -> str | None:
        opened = open_ups("auto", nut_port=nut_port, apc_port=apc_port)
        return None if opened is None else opened.source.split()[0]

    nut, apc = serve(upsd("home", ups_status="OL")), serve(apcupsd(STATUS="ONLINE"))
    assert found(nut, apc) == "nut"
    assert found(apc_port=apc) == "apcupsd"
    assert found(nut_port=serve(says(b"ERR DATA-STALE\n"))) == "nut", "in trouble, but there"
    assert found(nut_port=serve(upsd("a", "b"))) == "nut"
    assert found(nut_port=serve(upsd())) is None
    assert found(apc_port=serve(apcupsd(STATFLAG="0x100"))) == "apcupsd"
    assert found(nut_port=serve(says(b"", then_s=3)), apc_port=serve(says(b"HTTP/1.1 400\r\n"))) is None
    assert found() is None
    battery(50, True, -2)
    assert found() == "laptop"


# Time


def watched(*readings: tuple[float, str], stable_s: float = 30.0) -> MainsState:
    """The state after readings such as `(12.0, "online")` or `(13.0, "low")`."""
    watch = MainsWatch(stable_s)
    for now_s, state in readings:
        result = watch.update(reading_of(state), now_s)
    return result


def reading_of(state: str) -> UpsReading:
    return UpsReading("test", "on_battery", low=True) if state == "low" else UpsReading("test", state)  # type: ignore[arg-type]


def test_an_outage_begins_at_once_and_ends_when_mains_have_stayed() -> None:
    begun = ((0, "online"), (100, "on_battery"))
    assert watched(*begun) == MainsState(True, False, False, None, 0)
    assert watched(*begun, (110, "on_battery")).seconds_on_battery == 10
    assert watched(*begun, (110, "online"), (139, "online")) == MainsState(True, False, False, None, 10)
    assert watched(*begun, (110, "online"), (140, "online")) == MainsState(False, True, False, None, 0)


def test_mains_are_not_stable_in_the_first_seconds_of_a_watch() -> None:
    assert watched((5, "online")) == MainsState(False, False, False, None, 0)
    assert watched((5, "online"), (35, "online")).stable


def test_power_that_flaps_for_ten_minutes_is_one_outage() -> None:
    watch = MainsWatch()
    watch.update(reading_of("online"), 0.0)
    states = [
        watch.update(reading_of("on_battery" if now_s // 20 % 2 else "online"), float(now_s))
        for now_s in range(20, 620)
    ]
    assert all(state.on_battery and not state.stable for state in states)
    assert states[-1].seconds_on_battery == pytest.approx(300, abs=20)


def test_low_is_told_while_it_holds() -> None:
    assert watched((0, "low")).low
    assert not watched((0, "low"), (1, "online")).low
    forced = MainsWatch().update(UpsReading("test", "unknown", low=True), 0)
    assert (forced.low, forced.on_battery, forced.stable) == (True, False, False)


def test_one_unknown_reading_changes_nothing() -> None:
    stable = ((0, "online"), (30, "online"))
    assert watched(*stable, (31, "unknown")) == MainsState(False, True, False, 31, 0)
    assert watched(*stable, (31, "unknown"), (32, "online")) == MainsState(False, True, False, None, 0)


def test_unknown_is_never_fine() -> None:
    stable = ((0, "online"), (30, "online"))
    assert watched(*stable, (31, "unknown"), (32, "unknown")) == MainsState(False, False, False, 31, 0)
    assert not watched(*stable, (31, "unknown"), (32, "unknown"), (33, "online")).stable
    assert watched((0, "unknown")) == MainsState(False, False, False, 0, 0)


def test_an_outage_does_not_end_by_a_source_that_falls_silent() -> None:
    silent = [(float(now_s), "unknown") for now_s in range(2, 1000)]
    assert watched((0, "on_battery"), (1, "low"), *silent) == MainsState(True, False, True, 2, 999)
    settling = ((0, "on_battery"), (1, "online"), (40, "unknown"))
    assert watched(*settling).on_battery, "only a known reading ends it"
    assert not watched(*settling, (41, "online")).on_battery


# Network UPS Tools themselves


def test_real_nut_on_battery(nut: RealNut) -> None:
    reading = nut.until("home", "online")
    assert reading == UpsReading(f"nut home@127.0.0.1:{nut.port}", "online", False, 1.0, 1800)
    nut.set("home", "OB DISCHRG", 60)
    reading = nut.until("home", "on_battery")
    assert (reading.charge, reading.low, reading.flags) == (0.6, False, {"DISCHRG"})


@pytest.mark.long
def test_real_nut_follows_a_power_cut_that_comes_back_and_runs_the_battery_down(nut: RealNut) -> None:
    nut.set("home", "OL CHRG", 60)
    wait_for(lambda: nut.until("home", "online").flags == {"CHRG"})
    nut.set("home", "OB DISCHRG", 30)
    assert not nut.until("home", "on_battery").low
    nut.set("home", "OL", 30)
    nut.until("home", "online")
    nut.set("home", "OB LB", 19)
    assert nut.until("home", "on_battery").low
    nut.set("home", "OL", 100)


def test_real_nut_with_two_upses_asks_for_a_name(nut: RealNut) -> None:
    assert "home, shop" in str(NutUps(HERE, nut.port).read().reason)
    assert "UNKNOWN-UPS" in str(NutUps(HERE, nut.port, "other").read().reason)
    assert open_ups("auto", nut_port=nut.port) is not None


def test_real_nut_is_unknown_after_its_driver_died(nut: RealNut) -> None:
    nut.until("shop", "online")
    nut.drivers["shop"].kill()
    assert "DRIVER-NOT-CONNECTED" in str(nut.until("shop", "unknown").reason)


@pytest.mark.long
def test_real_nut_is_unknown_while_its_driver_hangs(nut: RealNut) -> None:
    nut.until("home", "online")
    nut.drivers["home"].send_signal(signal.SIGSTOP)
    assert "DATA-STALE" in str(nut.until("home", "unknown").reason)
    nut.drivers["home"].send_signal(signal.SIGCONT)
    nut.until("home", "online")
