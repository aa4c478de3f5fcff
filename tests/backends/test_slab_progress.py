"""What is said while a slab is made, and that the run shows that it gets on and can be stopped meanwhile."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from charkha.backends.base import Order
from charkha.backends.torch import slab_making
from charkha.backends.torch.slab_progress import SlabProgress


@dataclass
class Wheel:
    """Steering that counts beats and orders a stop after some."""

    stop_after: int = 1 << 30
    beats: int = 0

    def beat(self) -> None:
        self.beats += 1

    def order(self, step_seconds: float) -> Order:
        return Order(stop=self.beats >= self.stop_after)


def test_layers_beat_and_are_told_now_and_then():
    said: list[str] = []
    wheel = Wheel()
    progress = SlabProgress(said.append, wheel, first_s=0)
    for done in range(1, 81):
        progress.layer(done, 80)
    assert wheel.beats == 80
    assert said == ["making the streamed base, once for all runs: 1 of 80 layers, about 0.0 s to go"]


def test_a_small_base_and_a_short_wait_are_not_spoken_of():
    said: list[str] = []
    progress = SlabProgress(said.append, Wheel())
    progress.waiting()
    progress.layer(1, 2)
    assert said == []


def test_waiting_is_told_and_shows_that_the_run_gets_on(monkeypatch):
    said: list[str] = []
    wheel, clock = Wheel(stop_after=2), [100.0]
    monkeypatch.setattr("charkha.backends.torch.slab_progress.time.monotonic", lambda: clock[0])
    progress = SlabProgress(said.append, wheel)
    for second in range(15):
        clock[0] = 100.0 + second
        progress.waiting()
    assert wheel.beats == 1
    assert said == ["waiting for another process that makes this streamed base (5.0 s so far)"]
    clock[0] = 121.0
    with pytest.raises(KeyboardInterrupt):
        progress.waiting()


def test_a_stop_asked_for_while_the_slab_is_made_pauses_the_run_which_then_goes_on(project, monkeypatch, tmp_path):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    write = slab_making.write_index

    def asked(folder, index):
        write(folder, index)
        if len(index.layers) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(slab_making, "write_index", asked)
    work = project(training={"max_steps": 1}, data={"eval": None})
    result, events = work.train("model.placement=streamed")
    assert (result.status, result.steps) == ("paused", 0)
    assert not [event for event in events if event["event"] == "step"]
    assert len(slab_making.read_index(next((tmp_path / "cache" / "slabs").iterdir())).layers) == 1
    monkeypatch.setattr(slab_making, "write_index", write)
    result, _ = work.train("model.placement=streamed")
    assert (result.status, result.steps) == ("done", 1)
