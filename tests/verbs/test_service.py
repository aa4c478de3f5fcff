"""The systemd unit of a run: what its text means to systemd, and that it is put in place and taken away with care.

systemctl and loginctl are scripts on PATH that note what they were asked; how long a wait lasts is measured.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from charkha.errors import ConfigError, UsageError
from charkha.guard import GuardState, Readings, decide
from charkha.guard_limits import GuardLimits
from charkha.hardware.ups import MainsState, UpsReading
from charkha.store.runs import RunFolder
from charkha.verbs.service import (
    MARKER,
    install_service,
    remove_service,
    resumes_after_exit,
    service_status,
    unit_text,
    wait_for_mains,
)

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", '"': '"', "'": "'", "s": " "}
AWKWARD = [
    "plain",
    "with  two spaces",
    "100% %h %%",
    "$HOME ${HOME} $$",
    "\"double\" 'single' `back`",
    "back\\slash \\x41 ; # -",
    "हिन्दी मॉडल क्\u200dष",
    "ends with a space ",
    "ends with a backslash\\",
]


def words_of(line: str) -> list[str]:
    """The words of a line as systemd.syntax(7) has them: quotes and C escapes."""
    words, word, quote, position = [], None, None, 0
    while position < len(line):
        letter = line[position]
        position += 1
        if letter == "\\":
            word, position = (word or "") + ESCAPES[line[position]], position + 1
        elif quote:
            quote, word = (None, word) if letter == quote else (quote, word + letter)
        elif letter in "\"'" and word is None:
            quote, word = letter, ""
        elif letter == " ":
            words, word = [*words, *([] if word is None else [word])], None
        else:
            word = (word or "") + letter
    assert quote is None
    return words if word is None else [*words, word]


def without(sign: str, text: str) -> str:
    """Text in which the sign stands doubled only."""
    assert sign not in text.replace(sign * 2, "")
    return text.replace(sign * 2, sign)


def argv_of(line: str) -> list[str]:
    program, *arguments = words_of(line.removeprefix("-"))
    assert not set(program) & set("$\"'\\")  # systemd would refuse it
    return [without("%", program), *(without("$", without("%", argument)) for argument in arguments)]


def read_unit(text: str) -> dict[str, list[str]]:
    """Setting -> its values. A backslash at the end of a line joins it to the next; lines are stripped."""
    settings: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").split("\n"):
        stripped = line.strip(" \t")
        if stripped and stripped[0] not in "#;[":
            key, _, value = stripped.partition("=")
            settings.setdefault(key, []).append(value.strip(" \t"))
    return settings


def python_of(argv: list[str]) -> list[str]:
    """The command that runs in the end: a shell stands before an interpreter that systemd cannot name."""
    return argv[3:] if argv[:3] == ["/bin/sh", "-c", 'exec "$0" "$@"'] else argv


@pytest.mark.parametrize("name", AWKWARD)
def test_a_unit_says_to_systemd_what_was_meant_whatever_the_paths_hold(name, tmp_path):
    folder, python = tmp_path / name, str(tmp_path / name / "bin/python")
    config = folder / f"{name}.yaml"
    unit = read_unit(
        unit_text(
            config,
            folder / name,
            python,
            {"HF_HOME": str(folder / "hub"), "CHARKHA_CACHE": str(folder / "own"), "HF_TOKEN": "hf_secret"},
        )
    )
    start = [python, "-m", "charkha"]
    assert python_of(argv_of(unit["ExecStart"][0])) == [*start, "train", str(config)]
    assert unit["ExecStartPre"][0].startswith("-")
    assert python_of(argv_of(unit["ExecStartPre"][0])) == [*start, "service", "wait-mains", str(config)]
    assert python_of(argv_of(unit["ExecStopPost"][0])) == [*start, "service", "after-exit", str(config)]
    assert without("%", unit["WorkingDirectory"][0]).removesuffix("/.") == str(folder)
    settings = [without("%", word) for line in unit["Environment"] for word in words_of(line)]
    assert settings == ["PYTHONSAFEPATH=1", f"HF_HOME={folder / 'hub'}", f"CHARKHA_CACHE={folder / 'own'}"]
    assert unit["WantedBy"] == ["default.target"]


@pytest.mark.parametrize("name", AWKWARD)
def test_the_command_of_a_unit_runs_whatever_the_paths_hold(name, tmp_path):
    python = tmp_path / name / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$0" "$@"\n')
    python.chmod(0o755)
    config = tmp_path / name / "charkha.yaml"
    argv = argv_of(read_unit(unit_text(config, tmp_path / "run", str(python)))["ExecStart"][0])
    ran = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert ran.rstrip("\n").split("\n") == [str(python), "-m", "charkha", "train", str(config)]


@pytest.mark.parametrize("name", AWKWARD)
def test_systemd_itself_finds_nothing_wrong(name, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    folder = tmp_path / name
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    places = {"XDG_RUNTIME_DIR": str(tmp_path / "rt"), "XDG_CONFIG_HOME": str(tmp_path / "cf"), "LC_ALL": "C.UTF-8"}
    (tmp_path / "rt").mkdir(mode=0o700)

    def verify(text: str) -> subprocess.CompletedProcess[str]:
        unit = tmp_path / "charkha-test.service"
        unit.write_text(text)
        command = ["systemd-analyze", "verify", "--user", "--man=no", str(unit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ | places)

    works = verify("[Service]\nExecStart=/bin/true\n")
    if works.returncode != 0 or works.stderr:
        pytest.skip(f"systemd-analyze verify does not work here: {works.stderr.strip()}")
    assert "Unknown key" in verify("[Service]\nExecStart=/bin/true\nExecStartt=x\n").stderr  # it does look
    text = unit_text(folder / "charkha.yaml", folder / name, str(folder / "bin/python"), {"HF_HOME": str(folder)})
    found = verify(text)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_path_that_no_unit_can_hold_is_refused(tmp_path):
    for name in ("a\nExecStart=x", "a\tb", os.fsdecode(b"\xff")):
        with pytest.raises(UsageError, match="cannot stand in a systemd unit"):
            unit_text(tmp_path / name / "charkha.yaml", tmp_path / "run")


def test_which_ends_are_restarted(tmp_path):
    unit = read_unit(unit_text(tmp_path / "charkha.yaml", tmp_path / "run"))
    assert unit["Restart"] == ["on-failure"]
    assert unit["SuccessExitStatus"] == ["75"]
    assert unit["RestartPreventExitStatus"] == ["0 2 3 4 6 7"]
    assert "RestartForceExitStatus" not in unit  # it would bring back what `charkha stop` ended
    assert unit["TimeoutStartSec"] == ["infinity"]  # of the wait for the mains


# ----------------------------------------------------------------------------------------------------------------
# Installing, asking, removing

FAKE = """#!/bin/sh
printf '%s\\n' "${0##*/} $*" >> "$LOG"
case "${0##*/} $*" in
  *is-enabled*) echo enabled;;
  *is-active*) echo "${ACTIVE:-inactive}"; exit 3;;
  loginctl*) echo "Linger=${LINGER:-no}";;
  *) [ -z "$NO_BUS" ] || { echo "Failed to connect to bus: No medium found" >&2; exit 1; };;
esac
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A config, an empty unit folder, and a PATH without systemctl."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LOGNAME", "asha")
    (tmp_path / "bin").mkdir()
    (tmp_path / "charkha.yaml").write_text(
        "model: {base: starter}\ndata: {train: [a.jsonl]}\noutput: runs/Support desk\nguard: {ups: none}\n"
    )
    return tmp_path


@pytest.fixture
def systemd(place):
    """Fakes of systemctl and loginctl; what they were asked comes from the function that this gives."""
    for name in ("systemctl", "loginctl"):
        (place / "bin" / name).write_text(FAKE)
        (place / "bin" / name).chmod(0o755)
    return lambda: (place / "log").read_text().splitlines() if (place / "log").exists() else []


def test_install_writes_enables_and_says_that_lingering_is_needed(place, systemd):
    done = install_service(place / "charkha.yaml")
    unit = place / "settings/systemd/user" / os.path.basename(done.unit)
    assert re.fullmatch(r"charkha-support-desk-[0-9a-f]{8}\.service", unit.name)
    assert unit.read_text().startswith(MARKER)
    assert (done.enabled, done.started, done.linger) == (True, False, False)
    assert done.to_do == ("loginctl enable-linger asha",)
    assert systemd() == [
        "systemctl --user daemon-reload",
        f"systemctl --user enable {unit.name}",
        "loginctl show-user asha --property=Linger",
    ]


def test_install_starts_only_when_asked_and_does_not_wait_for_it(place, systemd, monkeypatch):
    monkeypatch.setenv("LINGER", "yes")
    done = install_service(place / "charkha.yaml", start=True)
    assert (done.started, done.linger, done.to_do) == (True, True, ())
    assert f"systemctl --user start --no-block {os.path.basename(done.unit)}" in systemd()


def test_without_systemctl_the_commands_are_left_to_the_person(place):
    done = install_service(place / "charkha.yaml", start=True)
    name = os.path.basename(done.unit)
    assert os.path.isfile(done.unit)
    assert (done.enabled, done.started, done.linger) == (False, False, None)
    assert done.reason == "systemctl is not installed"
    assert done.to_do == (
        "systemctl --user daemon-reload",
        f"systemctl --user enable {name}",
        f"systemctl --user start --no-block {name}",
        "loginctl enable-linger asha",
    )
    status = service_status(place / "charkha.yaml")
    assert (status.installed, status.enabled, status.active) == (True, "unknown", "unknown")
    assert remove_service(place / "charkha.yaml").to_do == ("systemctl --user daemon-reload",)
    assert not os.path.exists(done.unit)


def test_a_systemctl_without_a_bus_is_as_good_as_none(place, systemd, monkeypatch):
    monkeypatch.setenv("NO_BUS", "1")
    done = install_service(place / "charkha.yaml")
    assert not done.enabled
    assert "No medium found" in (done.reason or "")
    assert done.to_do[0] == "systemctl --user daemon-reload"


def test_no_token_is_written(place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open(install_service(place / "charkha.yaml").unit) as file:
        text = file.read()
    assert "hf_secret" not in text
    assert "TOKEN" not in text


def test_a_broken_config_and_a_run_that_is_done_are_refused(place, systemd):
    (place / "runs/Support desk/adapter").mkdir(parents=True)
    with pytest.raises(UsageError, match="done"):
        install_service(place / "charkha.yaml")
    (place / "charkha.yaml").write_text("model: {base: starter}\nlerning: 1\n")
    with pytest.raises(ConfigError):
        install_service(place / "charkha.yaml")
    assert systemd() == []
    assert not (place / "settings").exists()


def test_a_unit_of_somebody_else_is_left_alone(place, systemd):
    unit = install_service(place / "charkha.yaml").unit
    with open(unit, "w") as file:
        file.write("[Service]\nExecStart=/bin/true\n")
    asked = len(systemd())
    for act in (install_service, remove_service):
        with pytest.raises(UsageError, match="not written by charkha") as error:
            act(place / "charkha.yaml")
        assert "move this file away" in (error.value.remedy or "")
    with open(unit) as file:
        assert file.read() == "[Service]\nExecStart=/bin/true\n"
    assert len(systemd()) == asked
    assert not service_status(place / "charkha.yaml").installed


def test_a_masked_unit_is_somebody_elses_decision(place, systemd):
    unit = install_service(place / "charkha.yaml").unit
    os.unlink(unit)
    os.symlink("/dev/null", unit)
    with pytest.raises(UsageError, match="not written by charkha"):
        install_service(place / "charkha.yaml")
    assert os.readlink(unit) == "/dev/null"


def test_another_output_replaces_the_unit_of_the_same_config(place, systemd):
    before = install_service(place / "charkha.yaml").unit
    config = place / "charkha.yaml"
    config.write_text(config.read_text().replace("Support desk", "हिन्दी"))
    after = install_service(config).unit
    assert re.search(r"/charkha-run-[0-9a-f]{8}\.service$", after)
    assert os.listdir(os.path.dirname(after)) == [os.path.basename(after)]
    assert f"systemctl --user disable {os.path.basename(before)}" in systemd()


def test_status_tells_of_the_unit_and_of_its_run(place, systemd, monkeypatch):
    monkeypatch.setenv("ACTIVE", "activating")
    assert service_status(place / "charkha.yaml").run_status == "not started"
    install_service(place / "charkha.yaml")
    run = RunFolder(place / "runs/Support desk")
    run.path.mkdir(parents=True)
    run.config_path.write_text("model: {base: starter}\n")
    run.append("status", status="paused", step=3, reason="`charkha stop`")
    status = service_status(place / "charkha.yaml")
    assert (status.installed, status.enabled, status.active) == (True, "enabled", "activating")
    assert (status.run_status, status.run_reason) == ("paused", "`charkha stop`")


def test_remove_works_after_the_config_is_gone_and_stops_only_what_waits(place, systemd, monkeypatch):
    unit = install_service(place / "charkha.yaml").unit
    wants = os.path.join(os.path.dirname(unit), "default.target.wants")
    os.mkdir(wants)
    os.symlink(unit, os.path.join(wants, os.path.basename(unit)))
    (place / "charkha.yaml").unlink()
    assert remove_service(place / "charkha.yaml").units == (unit,)
    assert systemd()[-2:] == [f"systemctl --user disable {os.path.basename(unit)}", "systemctl --user daemon-reload"]
    assert os.listdir(wants) == []
    with pytest.raises(UsageError, match="no service is installed"):
        remove_service(place / "charkha.yaml")
    (place / "charkha.yaml").write_text("model: {base: starter}\ndata: {train: [a.jsonl]}\noutput: runs/b\n")
    waiting = os.path.basename(install_service(place / "charkha.yaml").unit)
    monkeypatch.setenv("ACTIVE", "activating")
    remove_service(place / "charkha.yaml")
    assert f"systemctl --user disable --now {waiting}" in systemd()


# ----------------------------------------------------------------------------------------------------------------
# After the end of a training


def end(place, reason: str | None, status: str = "paused") -> bool:
    run = RunFolder(place / "runs/Support desk")
    run.path.mkdir(parents=True, exist_ok=True)
    run.append("status", status=status, step=3, **({"reason": reason} if reason else {}))
    return resumes_after_exit(place / "charkha.yaml", {"EXIT_CODE": "exited", "EXIT_STATUS": "75"})


def battery_stops() -> list[str]:
    """What the guard itself says when the battery will not do."""
    low = MainsState(on_battery=True, stable=False, low=True, unknown_since_s=None, seconds_on_battery=9.0)
    short = MainsState(on_battery=True, stable=False, low=False, unknown_since_s=None, seconds_on_battery=9.0)
    reading = UpsReading("nut", "on_battery", runtime_s=1.0)
    told = []
    for mains in (low, short):
        decision, _ = decide(Readings(1.0, mains=mains, ups=reading), GuardLimits(), GuardState())
        assert (decision.action, decision.stop_kind) == ("stop", "power")
        told.append("; ".join(decision.reasons))
    assert len(set(told)) == 2
    return told


def test_a_stop_for_the_battery_is_restarted(place):
    assert all(end(place, reason) for reason in battery_stops())
    assert end(place, f"GPU 0: hot; {battery_stops()[0]}; GPU 0: less power")


@pytest.mark.parametrize(
    "reason",
    [None, "`charkha stop`", "SIGTERM", "SIGINT", "the budget of 5 INR is used up (5.01 INR): saving and stopping"],
)
def test_any_other_stop_is_not(place, reason):
    assert not end(place, reason)


def test_only_exit_code_75_is_looked_into(place):
    assert end(place, battery_stops()[0])
    for status in ("0", "1", "TERM", ""):
        assert not resumes_after_exit(place / "charkha.yaml", {"EXIT_STATUS": status})
    assert not resumes_after_exit(place / "gone.yaml", {})
    assert not end(place, battery_stops()[0], status="running")


# ----------------------------------------------------------------------------------------------------------------
# Waiting for the mains

FAST = {"stable_s": 0.2, "unknown_s": 0.4, "poll_s": 0.02}


@pytest.fixture
def ups(place):
    """Sets what the config's UPS says: an exit code as `guard.ups: command:...` has it."""
    (place / "state").write_text("1\n")
    (place / "ups.sh").write_text(f"read code < {place}/state\nexit $code\n")
    config = place / "charkha.yaml"
    config.write_text(config.read_text().replace("ups: none", f"ups: 'command:/bin/sh {place}/ups.sh'"))

    def say(code: int) -> None:
        (place / "state.new").write_text(f"{code}\n")
        os.replace(place / "state.new", place / "state")

    return say


def test_without_a_ups_nothing_is_waited_for(place):
    assert wait_for_mains(place / "charkha.yaml", pytest.fail).outcome == "no_ups"


def test_waits_out_an_outage_and_then_for_stable_mains(place, ups):
    said: list[str] = []
    flips = [threading.Timer(0.5, ups, [0]), threading.Timer(0.6, ups, [1]), threading.Timer(0.8, ups, [0])]
    for flip in flips:
        flip.start()
    done = wait_for_mains(place / "charkha.yaml", said.append, **FAST)
    assert done.outcome == "stable"
    assert 1.0 <= done.waited_s < 2.0
    assert [re.search("on battery|online", text)[0] for text in said] == ["on battery", "online"] * 2


def test_a_long_outage_is_waited_out_though_longer_than_a_silence_would_be(place, ups):
    threading.Timer(0.7, ups, [0]).start()
    assert wait_for_mains(place / "charkha.yaml", lambda text: None, **FAST).outcome == "stable"


def test_a_silent_ups_holds_nobody_up(place, ups):
    ups(9)
    began, said = time.monotonic(), []
    done = wait_for_mains(place / "charkha.yaml", said.append, **FAST)
    assert (done.outcome, done.reason) == ("unknown", "it ended with 9 instead of 0, 1 or 2")
    assert 0.4 <= time.monotonic() - began < 1.5
    assert len(said) == 1


def test_a_ups_that_answers_now_and_then_holds_nobody_up_either(place, ups):
    (place / "ups.sh").write_text(
        f"read code < {place}/state\n"
        f"case $code in 0) next=8;; 8) next=9;; *) next=0;; esac\necho $next > {place}/state\nexit $code\n"
    )
    ups(0)
    assert wait_for_mains(place / "charkha.yaml", lambda text: None, **FAST).outcome == "unknown"
