"""What `charkha plan` says and what `charkha train` freezes are the same choices, made by the same code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from charkha.config_file import load_config
from charkha.store.runs import RunFolder
from charkha.training.opening import Session, open_session
from charkha.verbs.planning import PlanWish, make_plan

MakeProject = Callable[..., Any]
AUTO = {"micro_batch_size": "auto"}
CONFIGS: dict[str, dict[str, Any]] = {
    "everything auto": {"training": AUTO},
    "nothing auto": {"training": {"gradient_checkpointing": "full", "loss_head": "chunked", "optimizer": "sgd"}},
    "4 bits": {"model": {"quantization": "nf4"}, "training": AUTO},
    "full": {"adapter": {"method": "full"}, "training": AUTO},
    "packed": {"data": {"packing": True}, "training": AUTO},
    "virtual tokens": {"adapter": {"method": "prompt_tuning"}, "training": AUTO},
    "experts": {"base": "mixtral", "adapter": {"lora_dropout": 0.0}, "training": AUTO},
    "without sdpa": {"base": "gemma2", "training": AUTO},
    "streamed": {"model": {"placement": "streamed", "quantization": "nf4"}, "training": AUTO},
    "two processes": {"devices": {"processes": 2}, "training": AUTO},
}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much free memory at every look; what other programs hold changes from second to second."""
    monkeypatch.setattr("charkha.hardware.machine.free_host_bytes", lambda: 8 * 2**30)


def opened(work: Any) -> Session:
    """The session that training would begin with."""
    return open_session(load_config(work.config, []), RunFolder(work.run_folder()), lambda event: None)


@pytest.mark.parametrize("name", CONFIGS)
def test_plan_and_train_decide_the_same(project: MakeProject, name: str) -> None:
    work = project(**CONFIGS[name])
    session = opened(work)
    planned = make_plan(PlanWish(work.config, method="closed_form"))
    assert planned["choices"] == [vars(choice) for choice in session.choices]
    assert planned["peak_allocated_bytes"] == session.memory.record["peak_allocated_bytes"]
    settings = planned["settings"]
    assert settings["rows"] == session.plan.micro_batch_size
    assert settings["gradient_checkpointing"] == session.plan.gradient_checkpointing
    assert settings["optimizer"] == session.plan.optimizer
    assert (settings["dtype"], settings["attention"]) == (session.base.dtype, session.base.attention)
    assert settings["processes"] == session.processes


def test_a_model_that_the_planner_does_not_know_is_trained_with_fixed_values(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.plan.config_keys import UnknownArchitecture

    def unknown(config: Any) -> Any:
        raise UnknownArchitecture("model_type 'new' is not one that charkha can plan for")

    monkeypatch.setattr("charkha.training.opening.read_architecture", unknown)
    session = opened(project(training=AUTO))
    assert session.plan.micro_batch_size == 8
    assert session.memory.record["fits"] is None
    assert "'new'" in session.memory.sentence()


def test_a_run_that_the_disk_may_not_hold_is_begun_and_that_is_said(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charkha.hardware.machine.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    work, events = project(), []
    open_session(load_config(work.config, []), RunFolder(work.run_folder()), events.append)
    assert any("the disk is short: the run writes" in event.get("text", "") for event in events)
