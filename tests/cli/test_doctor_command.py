"""`charkha doctor`: once for real on this machine, and its table, JSON and exit codes over invented findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from charkha import doctor
from charkha.cli.doctor import app
from charkha.doctor_checks import Check

HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "accelerate", "numpy"}
RUN = """
import json, sys
from charkha.cli.environment import prepare_environment
from charkha.cli.doctor import app
prepare_environment()
code = 0
try:
    app(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
print(json.dumps({"code": code, "modules": sorted(name for name in sys.modules if "." not in name)}))
"""


def run(*arguments, **settings):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True, **settings
    )
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return json.loads(last), printed, done.stderr


def test_this_machine_is_examined_within_20_seconds_without_importing_torch(tmp_path):
    began = time.monotonic()
    ended, printed, noise = run("--json", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert time.monotonic() - began < 20
    checks = json.loads(printed)["checks"]
    assert all(set(check) == {"name", "fact", "verdict", "remedy"} for check in checks)
    assert {check["verdict"] for check in checks} <= {"ok", "warn", "fail", "unknown"}
    found = {check["name"]: check for check in checks}
    first = ["python", "packages", "torch build", "nvidia driver", "cuda", "torch kernels", "4-bit kernels"]
    assert list(found)[:7] == first
    for name in ("python", "packages", "torch kernels", "4-bit kernels", "offline", "telemetry", "clock"):
        assert found[name]["verdict"] == "ok", found[name]
    assert not any("could not be checked" in check["fact"] for check in checks), checks
    assert ended["code"] == (5 if any(check["verdict"] == "fail" for check in checks) else 0)
    assert not set(ended["modules"]) & HEAVY
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in noise


def test_help_has_an_example_and_imports_nothing_heavy():
    ended, printed, _ = run("--help")
    assert "Example: charkha doctor" in printed
    assert not set(ended["modules"]) & {*HEAVY, "pydantic", "psutil", "rich"}


@pytest.fixture
def findings(monkeypatch):
    """`findings(check, ...)`: what the doctor finds from now on."""
    return lambda *checks: monkeypatch.setattr(doctor, "diagnose", lambda target, observe: list(checks))


WARNED = Check("ups", "none found [auto]", "warn", "connect one")
FAILED = Check("torch build", "the cpu build", "fail", "`install it`")


def test_a_failed_check_is_exit_code_5_and_a_warning_is_not(findings):
    findings(WARNED)
    assert CliRunner().invoke(app, []).exit_code == 0
    findings(WARNED, FAILED)
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 5
    assert [check["name"] for check in json.loads(result.stdout)["checks"]] == ["ups", "torch build"]


def test_the_table_shows_fact_verdict_and_remedy_as_they_are(findings):
    findings(WARNED, FAILED)
    shown = CliRunner().invoke(app, []).stdout
    for text in ("none found [auto]", "warn", "connect one", "fail", "`install it`"):
        assert text in shown


def test_a_target_that_is_nothing_is_a_usage_error(tmp_path):
    result = CliRunner().invoke(app, [str(tmp_path / "missing"), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["kind"] == "usage"
    assert CliRunner().invoke(app, [str(tmp_path), "--json"]).exit_code == 6
