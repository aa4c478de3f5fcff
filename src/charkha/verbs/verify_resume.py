"""`charkha verify-resume`: proof on the user's machine that a killed run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.config_file import load_config
from charkha.errors import TrainingFailed
from charkha.store.durable import sha256_of_file
from charkha.store.runs import RunFolder

Say = Callable[[str], None]
_TRAJECTORY = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@dataclass(frozen=True)
class ResumeProof:
    """The JSON contract of `charkha verify-resume`. `differences` is empty when every bit is the same."""

    identical: bool
    steps: int
    kills: list[int]  # the step after which each SIGKILL was sent
    differences: list[str]
    seconds: float


def verify_resume(config: Path, overrides: list[str], *, steps: int, kills: int, seed: int, say: Say) -> ResumeProof:
    """Trains `steps` steps of the config twice, once undisturbed and once killed `kills` times, and compares.

    Both runs are in a temporary folder beside the config's output and are removed. Raises the errors of the config, and
    TrainingFailed when a run ends for a reason of its own.
    """
    began = time.monotonic()
    loaded = load_config(config, overrides)
    output = (loaded.folder / loaded.config.output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen = sorted(random.Random(seed).sample(range(1, steps), min(kills, steps - 1)))
    with tempfile.TemporaryDirectory(prefix=".verify-resume-", dir=output.parent) as folder:
        short = [*overrides, f"training.max_steps={steps}", "checkpoint.every=1 steps"]
        whole, cut = RunFolder(Path(folder, "whole")), RunFolder(Path(folder, "cut"))
        say(f"{steps} steps undisturbed")
        _train(config, short, whole)
        for place, step in enumerate(chosen):
            say(f"kill {place + 1} of {len(chosen)}: after step {step}")
            _train(config, short, cut, kill_after=step)
        say("the rest of the killed run")
        _train(config, short, cut)
        differences = _differences(whole, cut)
        shutil.rmtree(folder, ignore_errors=True)
    return ResumeProof(not differences, steps, chosen, differences, round(time.monotonic() - began, 1))


def _train(config: Path, overrides: list[str], run: RunFolder, kill_after: int | None = None) -> None:
    """A worker in a process of its own, killed as soon as it has recorded that step."""
    sets = [part for override in [*overrides, f"output={run.path}"] for part in ("--set", override)]
    command = [sys.executable, "-P", "-m", "charkha", "train", str(config), *sets, "--foreground", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        while kill_after is not None and worker.poll() is None:
            if any(event["event"] == "step" and event["step"] >= kill_after for event in run.events()):
                worker.kill()
            time.sleep(0.01)
        out, err = worker.communicate()
    if worker.returncode not in (0, -signal.SIGKILL):
        told = _message(out) or err.strip()[-500:]
        raise TrainingFailed(f"a run of the proof ended with {worker.returncode}: {told}", where=str(config))


def _message(out: str) -> str | None:
    try:
        return str(json.loads(out)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _differences(whole: RunFolder, cut: RunFolder) -> list[str]:
    found = []
    left, right = _trajectory(whole), _trajectory(cut)
    for one, other in zip(left, right, strict=False):
        if one != other:
            found.append(f"step {one['step']}: {one} undisturbed, {other} resumed")
            break
    if len(left) != len(right):
        found.append(f"{len(left)} steps undisturbed, {len(right)} resumed")
    for path in sorted(whole.path.glob("*/*.safetensors")):
        if path.parent.name not in ("adapter", "model"):
            continue
        twin = cut.path / path.relative_to(whole.path)
        if not twin.is_file() or sha256_of_file(path) != sha256_of_file(twin):
            found.append(f"{path.relative_to(whole.path)} has other bytes")
    return found


def _trajectory(run: RunFolder) -> list[dict[str, Any]]:
    return [{key: event[key] for key in _TRAJECTORY} for event in run.events() if event["event"] == "step"]
