"""The locks: complete, hashed, free of anything that belongs to one machine."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def _entries(lock: str) -> dict[str, tuple[Requirement, int]]:
    """Package name -> (requirement, number of its hashes)."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    parsed = [(Requirement(block.split("\\\n")[0]), block.count("--hash=sha256:")) for block in blocks]
    return {canonicalize_name(requirement.name): (requirement, hashes) for requirement, hashes in parsed}


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_hashes(lock):
    for name, (requirement, hashes) in _entries(lock).items():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], name
        assert hashes >= 1, name


@pytest.mark.parametrize("lock", LOCKS)
def test_no_package_source_or_path_of_one_machine_is_in_the_lock(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:--(?:index|extra|find|trusted)\S*|.*(?:://|[ =]/\w)).*$", text, re.MULTILINE) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_torch_and_its_cuda_libraries_are_left_to_the_torch_script(lock):
    found = [name for name in _entries(lock) if re.match(r"(torch|triton|nvidia|cuda)(-|$)", name)]
    assert [name for name in found if name != "nvidia-ml-py"] == [], "the binding to the driver is no part of torch"


def test_both_locks_hold_different_packages():
    assert set(_entries(LOCKS[0])) & set(_entries(LOCKS[1])) == set()


def test_every_dependency_of_the_project_is_locked_in_a_version_that_it_allows():
    runtime, dev = _entries(LOCKS[0]), _entries(LOCKS[1])
    for text in _project()["dependencies"]:
        _assert_locked(Requirement(text), runtime)
    for text in _project()["optional-dependencies"]["dev"]:
        _assert_locked(Requirement(text), runtime | dev)


def _assert_locked(wanted: Requirement, locked: dict[str, tuple[Requirement, int]]) -> None:
    name = canonicalize_name(wanted.name)
    if name == "torch":
        return
    [pin] = locked[name][0].specifier
    assert pin.version in wanted.specifier, name


def test_everything_that_torch_needs_on_a_cpu_is_locked():
    needs = [Requirement(text) for text in metadata.requires("torch") or []]
    here = [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    cpu = [name for name in here if not re.match(r"(triton|nvidia|cuda)", name)]
    assert set(map(canonicalize_name, cpu)) <= set(_entries("requirements.lock"))
