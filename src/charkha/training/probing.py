"""A run's own steps tried on this device, in a child process: the parent's part, and what the child does.

The child opens the run as training does, in a folder that is thrown away, and measures a few real steps
(backends/torch/probing.py). What it holds, and whatever ends it, stays its own:

    python -P -m charkha.training.probing REQUEST.json ANSWER.json

writes a Probed, or {"error": {...}} and leaves with the error's exit code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from charkha.backends.base import ProbeResult
from charkha.config_file import LoadedConfig, load_config
from charkha.errors import CharkhaError, DoesNotFit, EnvironmentProblem, TrainingFailed, UsageError
from charkha.plan.schedule import Schedule
from charkha.store.runs import RunFolder
from charkha.training.signals import end_with_parent, under_nohup

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_SMALLER = "a smaller training.micro_batch_size, gradient_checkpointing: full, or a smaller data.max_length"


@dataclass(frozen=True)
class Probed:
    """What a probe found, and the micro batches of the whole run that it is added up over."""

    result: ProbeResult
    schedule: Schedule
    device: str  # cpu | cuda | mps
    device_name: str


class ProbeOutOfMemory(DoesNotFit):
    """Too little memory for the run's longest micro batch: an answer, not a failure of the probe."""

    kind = "out_of_memory"


_probed: TypeAdapter[Probed] = TypeAdapter(Probed)
_ERRORS: dict[int, type[CharkhaError]] = {
    kind.exit_code: kind for kind in (CharkhaError, UsageError, EnvironmentProblem, TrainingFailed)
}


def probe_run(config: Path, overrides: Sequence[str], *, program: Sequence[str] = ()) -> Probed:
    """Tries the longest and a median micro batch of this run on this device; takes the loading of the base and seconds.

    Raises ProbeOutOfMemory where memory is too little, and what `charkha train` would raise before its first step.
    Nothing is left behind, also after Ctrl-C, a kill or a closed terminal: the folder holds rows. `program` stands for
    the child in tests.
    """
    command = [*(program or (sys.executable, "-P", "-m", "charkha.training.probing"))]
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="charkha-probe-") as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(
            json.dumps({"config": str(config.resolve()), "overrides": list(overrides), "parent": os.getpid()}),
            encoding="utf-8",
        )
        child = subprocess.run(  # killed and waited for when an exception comes, before the folder goes
            [*command, str(asked), str(answer)],
            env={**os.environ, **_OFFLINE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if not answer.exists():
            raise _ended(child.returncode, child.stderr)
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in told:
        raise _error(told["error"])
    try:
        return _probed.validate_python(told)
    except ValidationError as error:
        raise CharkhaError(f"the probe answered something else: {error}") from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception, so that it cleans up; only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if not under_nohup(number)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(code: int, stderr: str) -> CharkhaError:
    """A child that left no answer. Linux kills (SIGKILL) what it has no memory for, and nobody else does."""
    if code == -signal.SIGKILL:
        return ProbeOutOfMemory("the system killed the probe, as it does when host memory runs out", remedy=_SMALLER)
    said = stderr.strip().splitlines() or [f"exit code {code}"]
    return CharkhaError(f"the probe ended without a result: {said[-1]}")


def _error(told: dict[str, Any]) -> CharkhaError:
    if told["exit_code"] == DoesNotFit.exit_code:
        return ProbeOutOfMemory(told["message"], where=told["where"], remedy=told["remedy"])
    kind = _ERRORS.get(told["exit_code"], CharkhaError)
    return kind(told["message"], where=told["where"], remedy=told["remedy"])


def probe_here(config: Path, overrides: Sequence[str], scratch: Path) -> Probed:
    """The same in this process, with the run's folder below `scratch`."""
    from charkha.backends.torch.quiet import quiet_libraries

    quiet_libraries()
    from charkha.backends.torch.probing import probe
    from charkha.training.opening import open_session
    from charkha.training.scheduling import run_schedule

    run = RunFolder(scratch / "run")
    with run.lock():
        loaded = _reporting_personal_data(load_config(config, list(overrides)))
        session = open_session(loaded, run, lambda event: None, ignore_plan=True)  # to try is to find out
        if session.processes > 1:
            raise UsageError(
                f"this run trains on {session.processes} devices, and a probe measures one",
                where="--probe",
                remedy="add --set devices.processes=1 to learn what one of them does, or plan without --probe",
            )
        result = probe(
            session.base,
            session.adapter,
            session.plan,
            train_shard=session.data.train,
            fingerprint=session.data.fingerprint,
            pad_id=session.data.pad_id,
            staging=run.path / "staging",
        )
    return Probed(result, run_schedule(session), session.base.device, session.device_name)


def _reporting_personal_data(loaded: LoadedConfig) -> LoadedConfig:
    """Whether rows with personal data may be trained is for training to refuse; here nothing is kept of them."""
    if loaded.config.data.personal != "block":
        return loaded
    data = loaded.config.data.model_copy(update={"personal": "report"})
    return replace(loaded, config=loaded.config.model_copy(update={"data": data}))


def _leave_nothing(scratch: Path) -> NoReturn:
    """The child's end when its parent was killed, which can then not clean up itself."""
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(128 + signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """The child process; its exit code."""
    asked, answer = (Path(argument) for argument in arguments)
    request = json.loads(asked.read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, lambda _number, _frame: _leave_nothing(answer.parent))
    end_with_parent(request["parent"])
    try:
        probed = probe_here(Path(request["config"]), request["overrides"], answer.parent)
        told, code = _probed.dump_python(probed, mode="json"), 0
    except CharkhaError as error:
        words = {name: getattr(error, name) for name in ("message", "where", "remedy")}
        told, code = {"error": {**words, "exit_code": error.exit_code}}, error.exit_code
    except MemoryError:
        words = {"message": "out of host memory", "where": None, "remedy": _SMALLER}
        told, code = {"error": {**words, "exit_code": DoesNotFit.exit_code}}, DoesNotFit.exit_code
    answer.write_text(json.dumps(told), encoding="utf-8")
    return code


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process: its stderr is read by the parent for a last word
    sys.exit(main(sys.argv[1:]))
