from __future__ import annotations

import io
import random

import fabricated_run
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from flatcompress.report.terminal import Progress, ledger_table


def printed(thing, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(thing)
    return out.getvalue()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stage(**more):
    return {"event": "stage", "stage": "1-prune", "index": 1, "of": 4, "method": "adasap", "epochs": 8, **more}


def epoch(n: int, **more):
    return {"event": "epoch", "stage": "1-prune", "epoch": n, "epochs": 8, "loss": 0.25, "val_accuracy": 0.975, **more}


def test_the_ledger_table_has_a_row_per_stage_and_a_dash_for_null():
    lines = printed(ledger_table(fabricated_run.rows(random.Random(0)))).splitlines()
    assert len(lines) == 5 and "held out" in lines[0] and "latency" in lines[0] and "passes" not in lines[0]
    assert "98.6 %" in lines[1] and "314.7 kB" in lines[1] and "–" in lines[1] and "0.162 ms" in lines[4]


def test_columns_that_nobody_measured_are_left_out():
    text = printed(ledger_table([{"stage": "train", "accuracy": {"test": 0.5, "held_out": None}, "sharpness": None}]))
    assert "50.0 %" in text and "held out" not in text and "sharpness" not in text and "latency" not in text


def test_names_are_no_console_markup():
    assert "[red]x[/red]" in printed(ledger_table([{"stage": "[red]x[/red]", "method": "[/]"}]))
    out = io.StringIO()
    with Progress(Console(file=out, width=200)) as progress:
        progress.event({"event": "warning", "message": "[bold]no[/bold] [/]"})
    assert "[bold]no[/bold] [/]" in out.getvalue()


def test_without_a_terminal_there_is_one_line_a_stage():
    out = io.StringIO()
    with Progress(Console(file=out, width=40)) as progress:
        progress({"event": "run", "name": "quickstart", "resumed_at": "1-prune"})
        progress(stage())
        for n in range(1, 9):
            progress(epoch(n))
        progress({"event": "warning", "stage": "1-prune", "message": "careful"})
        progress({"event": "row", "stage": "1-prune", "row": fabricated_run.rows(random.Random(0))[1]})
        progress({"event": "stopped", "reason": "stopped after step 9"})
    assert out.getvalue().splitlines() == [
        "quickstart: resumes at 1-prune",
        "[2/4] prune (adasap): 8 epochs",
        "! 1-prune: careful",
        "✓ 1-prune  test 98.3 % · held out 83.9 % · corrupted 82.4 % · 81.6 kB · 22.7 s",
        "! stopped after step 9",
    ]


def test_what_stays_whole_is_said_with_its_reason_and_a_long_list_is_cut():
    out = io.StringIO()
    with Progress(Console(file=out, width=200)) as progress:
        progress(stage())
        for name in ("fc", *"abcdefg"):
            progress({"event": "protected", "stage": "1-prune", "name": name, "reason": "it is the output layer"})
        progress(stage(stage="2-sparsify"))
        progress({"event": "protected", "stage": "2-sparsify", "name": "conv1", "reason": "it is ignored"})
    lines = out.getvalue().splitlines()
    assert lines[1] == "  fc stays whole: it is the output layer" and lines[5].startswith("  d stays whole")
    assert lines[6] == "  and more layers stay whole: see the report" and lines[-1].endswith(
        "conv1 stays whole: it is ignored"
    )
    assert len(lines) == 9


def test_on_a_terminal_the_live_line_has_stage_epoch_loss_accuracy_and_time_left():
    clock = Clock()
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=140), clock)
    assert printed(progress).strip() == ""
    progress.event(stage())
    assert "[2/4] prune (adasap)" in printed(progress) and "epoch 0/8" in printed(progress)
    clock.now += 20
    progress.event(epoch(2))  # resumed: epoch 1 was done before this process began
    line = printed(progress)
    assert "epoch 2/8" in line and "loss 0.25" in line and "val 97.5 %" in line and "2 min 00 s left" in line
    progress.event(epoch(8))
    assert "left" not in printed(progress)


def test_the_live_display_starts_and_stops_cleanly():
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100, legacy_windows=False)) as progress:
        progress.event(stage())
        progress.event(epoch(3))
        progress.event({"event": "row", "stage": "1-prune", "row": {"stage": "prune", "accuracy": {"test": 0.5}}})
    shown = out.getvalue()
    assert "✓ 1-prune  test 50.0 %" in shown and shown.rindex("\x1b[?25h") > shown.rindex(
        "\x1b[?25l"
    )  # the cursor is back


def test_a_stage_without_epochs_shows_the_time_it_takes():
    clock = Clock()
    progress = Progress(Console(file=io.StringIO()), clock)
    progress.event(stage(epochs=None, stage="3-export"))
    clock.now += 4
    assert "export" in printed(progress) and "4.0 s" in printed(progress)


junk = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.integers(), max_size=2)
)


def test_where_scales_could_not_be_moved_is_said():
    out = io.StringIO()
    with Progress(Console(file=out, width=200)) as progress:
        progress({"event": "tie_free", "moved": 3, "left": {}})
        progress({"event": "tie_free", "moved": 3, "left": dict.fromkeys("abcdefgh", "its channels share a scale")})
    lines = out.getvalue().splitlines()
    assert lines[0] == "  a: sums may tie: its channels share a scale"
    assert lines[-1].endswith("more where sums may tie: see the log")


KINDS = ["run", "stage", "epoch", "row", "warning", "stopped", "conflict", "done", "rich__", "__class__"]


FIELDS = [
    "stage",
    "index",
    "of",
    "method",
    "epochs",
    "epoch",
    "loss",
    "val_accuracy",
    "row",
    "message",
    "name",
    "reason",
]
strange = st.fixed_dictionaries({"event": st.sampled_from(KINDS)}, optional=dict.fromkeys(FIELDS, junk))


@given(st.lists(strange, max_size=6))
@example([{"event": "stage", "epochs": -3.7e306}])
@example([{"event": "stage", "epochs": 1e-300}])
def test_a_strange_event_never_raises(events):
    progress = Progress(Console(file=io.StringIO(), width=80))
    for event in events:
        progress.event(event)
        printed(progress)


@given(st.lists(st.dictionaries(st.sampled_from(["stage", "method", "accuracy", "bytes", "macs", "seconds"]), junk)))
def test_a_strange_ledger_is_still_a_table(rows):
    assert printed(ledger_table(rows))
