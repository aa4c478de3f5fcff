from __future__ import annotations

import json
import math

import pytest

from charkha import events


def step(number: int, **fields: object) -> dict[str, object]:
    return {"event": "step", "step": number, **fields}


def test_an_event_carries_its_name_version_and_time() -> None:
    event = events.make_event("step", step=3, loss=1.5)
    assert event["event"] == "step"
    assert event["version"] == events.VERSION
    assert event["time_unix_s"] > 1.6e9
    assert (event["step"], event["loss"]) == (3, 1.5)


def test_a_name_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="known: checkpoint"):
        events.make_event("stepp")


def test_a_line_is_json_even_for_numbers_that_are_not_finite() -> None:
    line = events.to_line(step(1, loss=math.nan, grad_norm=-math.inf, note="हिन्दी\nzwei"))
    assert "\n" not in line
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["loss_text"] == "nan"
    assert record["grad_norm_text"] == "-inf"
    assert record["note"] == "हिन्दी\nzwei"


def test_broken_lines_are_passed_over_wherever_they_stand() -> None:
    good = events.to_line(step(1))
    lines = ["\0\0\0", good[:10], good, "null", "[1]", "{}", '"event"', good, good[:-1]]
    assert [event["step"] for event in events.from_lines(lines)] == [1, 1]


def test_steps_and_evals_beyond_a_resume_are_undone_and_everything_else_stays() -> None:
    history = [
        step(1),
        step(2),
        {"event": "checkpoint", "step": 2},
        {"event": "eval", "step": 3, "eval_loss": 1.0},
        step(3, loss="undone"),
        {"event": "resume", "from_step": 2},
        step(3, loss="kept"),
        {"event": "eval", "step": 3, "eval_loss": 2.0},
    ]
    kept = events.in_effect(history)
    assert [event["loss"] for event in kept if event["event"] == "step" and event["step"] == 3] == ["kept"]
    assert [event["eval_loss"] for event in kept if event["event"] == "eval"] == [2.0]
    assert [event["event"] for event in kept].count("checkpoint") == 1


def test_a_resume_from_zero_undoes_every_step_but_not_the_loss_before_training() -> None:
    kept = events.in_effect([{"event": "eval", "step": 0}, step(1), {"event": "resume", "from_step": 0}])
    assert [event["event"] for event in kept] == ["eval", "resume"]
