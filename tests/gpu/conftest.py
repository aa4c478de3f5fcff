"""A GPU whose kernels give the same bits every time."""

from __future__ import annotations

import pytest


@pytest.fixture
def deterministic_cuda(monkeypatch, tmp_path):
    """Skips where there is no CUDA GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
