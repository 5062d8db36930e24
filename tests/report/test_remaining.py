"""Time left, with the measuring in it, on a clock that the test moves."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flatcompress.report.remaining import Remaining
from flatcompress.report.terminal import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


RUN = {"event": "run", "epochs": [10, 5, None], "samples": {"train": 90, "val": 10, "test": 20, "measured": 80}}


def play(left, clock, *events) -> None:
    """Each event with the seconds that pass before it."""
    for seconds, event in events:
        clock.now += seconds
        left.event(event)


def stage(index: int, epochs: int | None) -> dict:
    return {"event": "stage", "stage": f"{index}-x", "index": index, "of": 3, "epochs": epochs}


def step(n: int, of: int = 100) -> dict:
    return {"event": "step", "step": n, "steps": of}


def epoch(n: int, trained: float) -> dict:
    return {"event": "epoch", "epoch": n, "epochs": 10, "seconds": trained}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def left(clock) -> Remaining:
    return Remaining(clock)


def test_what_comes_before_the_first_step_is_not_taken_for_training(left, clock):
    play(left, clock, (0, RUN), (0, stage(0, 10)), (300, step(1)))
    assert left.stage is None and left.run is None
    play(left, clock, (10, step(11)))
    assert left.training == pytest.approx(89)
    clock.now += 4  # it runs down between two steps
    assert left.training == pytest.approx(85)
    clock.now += 1e6
    assert left.training == 0


def test_measuring_is_expected_from_the_validation_at_first_and_then_from_the_stage_before(left, clock):
    play(left, clock, (0, RUN), (0, stage(0, 10)), (0, step(1)), (4, epoch(1, 3.0)))
    assert left.measuring is None
    play(left, clock, (4, step(20)), (1, epoch(2, 3.0)))  # five seconds, three of them training: two for ten samples
    assert left.measuring == pytest.approx(2.0 * 80 / 10)
    assert left.stage == (pytest.approx(left.training + 16), True)
    play(left, clock, (9, {"event": "spent", "seconds": {"the stage": 99.0, "metrics": 5.0, "sharpness": 7.0}}))
    assert left.measuring == 12.0


def test_measuring_runs_down_from_when_the_training_is_over(left, clock):
    spent = {"event": "spent", "seconds": {"the stage": 40.0, "metrics": 12.0}}
    play(left, clock, (0, RUN), (0, spent), (0, stage(1, 5)), (0, step(10)), (10, step(50)))
    assert left.stage == (pytest.approx(12.5 + 12), True)
    play(
        left,
        clock,
        (12, step(100)),
        (0, {"event": "doing", "what": "metrics", "measuring": True}),
        (5, {"event": "doing"}),
    )
    assert left.stage == (pytest.approx(7.0), True)
    clock.now += 100
    assert left.stage == (0.0, True)


def test_calibration_before_the_training_is_no_measuring(left, clock):
    play(left, clock, (0, RUN), (0, stage(1, 5)), (3, {"event": "doing", "what": "calibration", "measuring": False}))
    play(left, clock, (5, step(1)), (5, step(51)))
    assert left.training == pytest.approx(4.9)


def test_the_run_is_this_stage_and_the_planned_ones_with_their_measuring(left, clock):
    spent = {"event": "spent", "seconds": {"metrics": 3.0}}
    play(left, clock, (0, RUN), (0, spent), (0, stage(0, 10)), (0, step(50)), (20, step(60)))
    assert left.pace == pytest.approx(20)
    assert left.run == pytest.approx((4 * 20 + 3) + (5 * 20 + 3) + 3)
    play(left, clock, (0, stage(2, None)))
    assert left.run == pytest.approx(3)
    clock.now += 2
    assert left.stage == (pytest.approx(1), True)


@pytest.mark.parametrize(
    "event",
    [{"event": "step", "step": "x", "steps": 0}, {"event": "epoch"}, {"event": "run", "epochs": 3, "samples": []},
     {"event": "spent", "seconds": None}, {"event": "stage", "index": "a", "epochs": []}, {"event": ["run"]}],
)  # fmt: skip
def test_a_strange_event_leaves_it_unknown(left, event):
    left.event(event)
    assert left.stage is None or left.stage[0] == 0
    assert left.run is None


def shown(progress: Progress) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(progress)
    return out.getvalue()


def test_the_live_line_says_what_is_measured_and_the_time_with_it(clock):
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=160), clock)
    progress.event({"event": "doing", "what": "reading the data", "measuring": False})
    clock.now += 2
    assert "reading the data" in shown(progress) and "2.0 s" in shown(progress)
    spent = {"event": "spent", "seconds": {"metrics": 30.0}}
    play(progress, clock, (0, RUN), (0, spent), (0, stage(0, 10)), (0, step(10)), (10, step(20)))
    assert "1 min 50 s left, about 3 min" in shown(progress)
    play(
        progress, clock, (80, step(100)), (0, {"event": "doing", "what": "metrics under corruption", "measuring": True})
    )
    clock.now += 10
    assert "measuring: metrics under corruption" in shown(progress) and "20.0 s left" in shown(progress)


def test_where_measuring_is_not_known_yet_the_line_says_that_it_follows(clock):
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=160), clock)
    play(progress, clock, (0, stage(0, 10)), (0, step(10)), (10, step(20)))
    assert "1 min 20 s left, then measuring" in shown(progress)


def test_decisions_are_one_line_each(clock):
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200), clock)
    layers = [
        {"name": "stem", "weight_bits": 8},
        {"name": "conv", "weight_bits": 4},
        {"name": "gate", "weight_bits": None},
    ]
    play(
        progress, clock, (0, stage(0, 10)),
        (0, {"event": "prune", "kept_channels": 10, "total_channels": 20}),
        (0, {"event": "bits", "unit": "effective_bits", "budget": 4.0, "bits": {"a": 4, "b": 8, "c": 4}}),
        (0, {"event": "selected", "val_accuracy": 0.875}),
        (0, {"event": "layers", "layers": layers}),
        (0, {"event": "layers", "layers": layers}),
        (0, {"event": "row", "stage": "1-prune", "row": {"stage": "prune", "accuracy": {"test": 0.5}}}),
        (95, {"event": "done"}),
    )  # fmt: skip
    assert out.getvalue().splitlines()[1:] == [
        "  bits chosen for 4 effective bits: 2 at 4, 1 at 8 (layers at bits)",
        "  kept: the weights with val 87.5 %",
        "  2 of 3 layers quantized; stays float: gate",
        "  10 of 20 channels stay",
        "✓ 1-prune  test 50.0 %",
        "done in 1 min 35 s",
    ]
