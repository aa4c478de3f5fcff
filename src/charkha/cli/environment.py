"""Environment of every command: telemetry of all dependencies off, offline unless fetching, quiet libraries."""

from __future__ import annotations

import os

# Libraries read these when they are imported, so they are set before any is.
_ALWAYS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_UNLESS_SET = {
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # torch's C++ warnings, such as the profiler's about tensors that are older than itself; errors are still written.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Threads that wait for one another asleep instead of spinning. Beside another busy program a spinning one holds the
    # core that the one it waits for needs: seen on two cores, a training step took two to five times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def prepare_environment() -> None:
    """Sets the variables; those a user may reasonably choose are left as they are found."""
    os.environ.update(_ALWAYS)
    for name, value in _UNLESS_SET.items():
        os.environ.setdefault(name, value)


def go_offline() -> None:
    """No library may look anything up from here on; called by every command that works on local models.

    Must run before huggingface_hub is imported, which reads the variables once.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
