"""The choice of the torch build, without a network, a GPU or pip."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "tools/install_torch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["install_torch"] = module
    spec.loader.exec_module(module)
    return module


install_torch = _load()
CUDA_13 = install_torch.Driver(api=13010, gpus=2)
CUDA_12 = install_torch.Driver(api=12080, gpus=1)


@pytest.mark.parametrize(
    ("system", "machine", "wish", "driver", "build", "reason"),
    [
        ("Linux", "x86_64", None, None, "cpu", "no NVIDIA driver found"),
        ("Linux", "x86_64", "", None, "cpu", "no NVIDIA driver found"),
        ("Linux", "x86_64", None, CUDA_13, "cuda", "an NVIDIA driver with 2 GPUs"),
        ("Linux", "x86_64", None, CUDA_12, "cuda", "an NVIDIA driver with 1 GPU"),
        ("Linux", "x86_64", "cpu", CUDA_13, "cpu", "CHARKHA_TORCH=cpu"),
        ("Linux", "x86_64", "cuda", None, "cuda", "CHARKHA_TORCH=cuda"),
        ("Darwin", "arm64", None, None, "mac", "a Mac with Apple silicon"),
        ("Darwin", "arm64", "cpu", None, "mac", "a Mac with Apple silicon"),
    ],
)
def test_the_build_follows_the_machine_and_the_wish(system, machine, wish, driver, build, reason):
    choice = install_torch.choose(system, machine, wish, driver)
    assert (choice.build, choice.reason) == (build, reason)


@pytest.mark.parametrize(
    ("system", "machine", "wish", "message"),
    [
        ("Linux", "x86_64", "rocm", "CHARKHA_TORCH=rocm is neither cpu nor cuda"),
        ("Darwin", "arm64", "cuda", "no CUDA on a Mac"),
        ("Darwin", "x86_64", None, "Intel"),
    ],
)
def test_a_build_that_does_not_exist_is_refused_by_name(system, machine, wish, message):
    with pytest.raises(ValueError, match=message):
        install_torch.choose(system, machine, wish, None)


def test_an_old_driver_is_named_with_the_series_needed():
    choice = install_torch.choose("Linux", "x86_64", None, CUDA_12)
    assert "CUDA 12.8" in choice.warning
    assert "580" in choice.warning
    assert install_torch.choose("Linux", "x86_64", None, CUDA_13).warning is None


@pytest.mark.parametrize(
    ("version", "system", "build"),
    [
        ("2.13.0+cpu", "Linux", "cpu"),
        ("2.13.0+cu130", "Linux", "cuda"),
        ("2.13.0", "Linux", "cuda"),
        ("2.13.0", "Darwin", "mac"),
        ("2.12.1+cpu", "Linux", None),
    ],
)
def test_the_installed_build_is_read_from_its_version(monkeypatch, version, system, build):
    monkeypatch.setattr(install_torch.metadata, "version", lambda name: version)
    monkeypatch.setattr(install_torch.platform, "system", lambda: system)
    assert install_torch.installed_build() == build


def test_the_right_build_is_not_installed_again(monkeypatch, capsys):
    monkeypatch.setenv("CHARKHA_TORCH", "cpu")
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch, "install", lambda build: pytest.fail("installed again"))
    for installed in ("cpu", "cuda"):
        monkeypatch.setattr(install_torch, "installed_build", lambda installed=installed: installed)
        assert install_torch.main() == 0
        assert "installed already" in capsys.readouterr().out


def test_the_cpu_build_is_replaced_once_a_gpu_is_there(monkeypatch):
    asked = []
    monkeypatch.delenv("CHARKHA_TORCH", raising=False)
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch, "find_driver", lambda: CUDA_13)
    monkeypatch.setattr(install_torch, "installed_build", lambda: "cpu")
    monkeypatch.setattr(install_torch, "install", lambda build: asked.append(build) or 0)
    assert install_torch.main() == 0
    assert asked == ["cuda"]


def test_the_cpu_build_is_tried_locally_then_at_pytorch_then_as_the_default_build(monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(install_torch, "_pip", lambda arguments, show_errors: tried.append(arguments) or len(tried) < 3)
    assert install_torch.install("cpu") == 0
    assert [("--index-url" in arguments) for arguments in tried] == [False, True, False]
    assert tried[0][-1] == tried[1][-1] == "torch==2.13.0+cpu"
    assert tried[2] == ["torch==2.13.0"]
    assert "GB" in capsys.readouterr().out


def test_a_cuda_machine_never_takes_a_cpu_wheel_that_lies_nearby():
    from packaging.requirements import Requirement

    [[requirement]] = install_torch.attempts("cuda")
    accepted = Requirement(requirement).specifier
    assert "2.13.0" in accepted
    assert "2.13.0+cpu" not in accepted
