"""Peak memory of a run's training step, found by running the step itself on fake CPU tensors: no GPU, no weights.

The model, adapter, quantized layers, loss and optimizer are the run's own classes. Every storage's birth and death is
recorded and replayed through a simulation of torch's CUDA caching allocator. It happens in a child process, so that
the caller's memory and start-up stay its own (importing this file loads no framework):

    python -m charkha.backends.torch.trace REQUEST.json RESULT.json

reads a TraceRequest and writes a TraceResult, or {"error": {...}} and leaves with the error's exit code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from charkha.backends.base import AdapterSpec, TraceRequest, TraceResult
from charkha.caches import own_cache
from charkha.errors import CharkhaError, EnvironmentProblem, UsageError

logger = logging.getLogger(__name__)
_PROGRAM = "charkha.backends.torch.trace"
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
_ERRORS = {kind.exit_code: kind for kind in (CharkhaError, UsageError, EnvironmentProblem)}


def trace_memory(request: TraceRequest, *, cache: Path | None = None) -> TraceResult:
    """Peak memory of two optimizer steps of `request`, traced in a child process, or remembered from an earlier trace.

    `cache` is the folder of earlier ones; None: charkha's own. Takes 10 to 90 s the first time, and a GiB of host
    memory at most. Raises what `trace_here` raises, and CharkhaError when the child dies.
    """
    known = remembered_memory(request, cache=cache)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="charkha-trace-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        child = subprocess.run(
            [sys.executable, "-m", _PROGRAM, str(asked), str(answer)], capture_output=True, text=True, check=False
        )
        if not answer.exists():
            said = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise CharkhaError(f"the memory trace ended without a result: {said[-1]}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise _error_from_json(result["error"])
    _store(_stored(request, cache), result)
    return result_from_json(result)


def remembered_memory(request: TraceRequest, *, cache: Path | None = None) -> TraceResult | None:
    """The result of an earlier trace of the same request under the same libraries; None where there is none.

    A file that a power cut has left empty, or that holds something else, is none: the step is traced again.
    """
    try:
        text = _stored(request, cache).read_bytes()
        return TypeAdapter(TraceResult).validate_json(text, strict=True)
    except (OSError, ValidationError):
        return None


def _stored(request: TraceRequest, cache: Path | None) -> Path:
    return (cache or own_cache() / "traces") / f"{cache_key(request)}.json"


def trace_here(request: TraceRequest) -> TraceResult:
    """Peak memory of two optimizer steps of `request`, traced in this process.

    Raises EnvironmentProblem for a model that the installed libraries cannot build or whose step asks for numbers that
    a fake tensor does not have, and UsageError for an adapter that does not fit it.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    from charkha.backends.torch.tracing import trace_step

    started = time.monotonic()
    try:
        result = trace_step(request)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise EnvironmentProblem(
            f"this model's step cannot be traced: it reads numbers that only a real run has ({error})",
            where=str(request.config.get("model_type")),
            remedy="plan it with the closed form",
        ) from error
    return dataclasses.replace(result, seconds=round(time.monotonic() - started, 2))


def cache_key(request: TraceRequest) -> str:
    """A hash of the whole request, of the versions of all libraries that run in it, and of this backend's source."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(request), sort_keys=True).encode())
    for package in _PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def request_from_json(values: dict[str, Any]) -> TraceRequest:
    """A request from its JSON; lists become tuples. Raises UsageError for a key that it does not have."""
    try:
        adapter = AdapterSpec(**_with_tuples(values["adapter"]))
        return TraceRequest(**{**_with_tuples(values), "adapter": adapter})
    except (TypeError, KeyError) as error:
        raise UsageError(f"is not a trace request: {error}", where="REQUEST.json") from None


def result_from_json(values: dict[str, Any]) -> TraceResult:
    """A result from its JSON."""
    return TraceResult(**_with_tuples(values))


def main(arguments: list[str]) -> int:
    """The child process; its exit code."""
    asked, answer = (Path(argument) for argument in arguments)
    try:
        result = dataclasses.asdict(trace_here(request_from_json(json.loads(asked.read_text(encoding="utf-8")))))
        code = 0
    except CharkhaError as error:
        told = {name: getattr(error, name) for name in ("message", "where", "remedy")}
        result, code = {"error": {**told, "exit_code": error.exit_code}}, error.exit_code
    answer.write_text(json.dumps(result), encoding="utf-8")
    return code


def _error_from_json(told: dict[str, Any]) -> CharkhaError:
    kind = _ERRORS.get(told["exit_code"], CharkhaError)
    return kind(told["message"], where=told["where"], remedy=told["remedy"])


def _store(path: Path, result: dict[str, Any]) -> None:
    """Remembers a result; a folder that cannot be written costs only the time of the next trace."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(result), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        logger.warning("the trace is not remembered in %s: %s", path.parent, error)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process: its stderr is read by the parent for a last word
    sys.exit(main(sys.argv[1:]))
