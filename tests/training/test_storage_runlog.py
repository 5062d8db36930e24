from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from faulty_os import FaultyOs
from hypothesis import given
from hypothesis import strategies as st

from flatcompress.errors import RunError, UserError
from flatcompress.store import runlog, trackers
from flatcompress.store.runlog import RunLog, read_events


def test_events_come_back_in_order_with_a_time(tmp_path):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.event("run", name="a\nb\u2028c")
        log.event("epoch", stage="0-train", epoch=1, loss=torch.tensor(0.5), gap=float("nan"), val_accuracy=None)
    first, second = read_events(tmp_path / "log.jsonl")
    assert first["name"] == "a\nb\u2028c" and first["time"].endswith("+00:00")
    assert second["loss"] == 0.5 and second["gap"] == "NaN" and second["val_accuracy"] is None
    assert (tmp_path / "log.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("torn", [b'{"event": "epo', b"x" * 200_000, b"\xff\xfe"])
def test_a_torn_last_line_is_cut_off_with_a_warning_event(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "run"}\n' + torn)
    with RunLog(path) as log:
        log.event("done")
    assert [e["event"] for e in read_events(path)] == ["run", "warning", "done"]
    assert str(len(torn)) in read_events(path)[1]["message"]


def test_a_log_that_is_only_a_torn_line_starts_afresh(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"ev')
    with RunLog(tmp_path / "log.jsonl"):
        pass
    assert [e["event"] for e in read_events(tmp_path / "log.jsonl")] == ["warning"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_a_run_error_and_tears_no_line(tmp_path, monkeypatch, code):
    log = RunLog(tmp_path / "log.jsonl")
    log.event("run")
    monkeypatch.setattr(runlog, "os", FaultyOs(0, code))
    with pytest.raises(RunError, match="kept"):
        log.event("epoch", loss=1.0)
    log.event("epoch", loss=2.0)
    log.close()
    assert [e.get("loss") for e in read_events(tmp_path / "log.jsonl")] == [None, 2.0]


def test_an_unwritable_log_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        RunLog(tmp_path / "absent" / "log.jsonl")


def test_a_killed_writer_loses_at_most_its_last_line(tmp_path):
    program = (
        "import sys\nfrom flatcompress.store.runlog import RunLog\nlog = RunLog(sys.argv[1])\ni = 0\n"
        "while True:\n    log.event('epoch', epoch=i)\n    i += 1\n    if i == 50: print('on', flush=True)\n"
    )
    path = tmp_path / "log.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"on\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with RunLog(path) as log:
        log.event("done")
    epochs = [e["epoch"] for e in read_events(path) if e["event"] == "epoch"]
    assert len(epochs) >= 50 and epochs == list(range(len(epochs)))


@given(
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b'{"event": "run"}', b'{"event": 3}', b"[" * 90_000]), max_size=6
    )
)
@pytest.mark.filterwarnings("ignore:.*unreadable line")
def test_any_file_reads_as_events(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert all(isinstance(e["event"], str) for e in read_events(path))


def test_unreadable_lines_are_counted_and_monsters_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "MAX_LINE", 50)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "a"}\n' + b"x" * 1000 + b"\n{}\n" + b'{"event": "b"}\n')
    with pytest.warns(UserWarning, match="2 unreadable"):
        assert [e["event"] for e in read_events(path)] == ["a", "b"]
    assert read_events(tmp_path / "absent") == []
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="plain file"):
        read_events(tmp_path / "fifo")


class Recorder:
    def __init__(self, fail: bool = False) -> None:
        self.events: list[dict] = []
        self.fail, self.closed = fail, False

    def event(self, event: dict) -> None:
        if self.fail:
            raise ConnectionError("no network")
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_trackers_see_the_written_events_and_a_failing_one_is_dropped(tmp_path):
    good, bad = Recorder(), Recorder(fail=True)
    with RunLog(tmp_path / "log.jsonl", [bad, good]) as log:
        with pytest.warns(UserWarning, match="no network"):
            log.event("epoch", loss=torch.tensor(0.5))
        log.event("done")
    assert good.events == read_events(tmp_path / "log.jsonl") and good.closed


def test_scalars_flatten_nested_numbers_and_leave_text_out():
    event = {
        "event": "conflict",
        "stage": "2-q",
        "step": 40,
        "quantizers": {"conv1": {"disorder": 0.5, "frozen": True}},
    }
    assert trackers.scalars(event) == (40, {"2-q/quantizers/conv1/disorder": 0.5, "2-q/quantizers/conv1/frozen": 1.0})
    assert trackers.scalars({"event": "done", "seconds": 2, "note": "x", "loss": "NaN"}) == (0, {"done/seconds": 2.0})


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'flatcompress\[{name}\]'"):
        trackers.open_tracker(name, tmp_path)


def test_an_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="'mlflow'"):
        trackers.open_tracker("mlfow", tmp_path)


class FakeBackend(types.ModuleType):
    """Stands for mlflow, wandb, tensorboard and torch.utils.tensorboard: records every call."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def record(*args, **keywords):
            self.calls.append((name, *args, *keywords.values()))
            return self

        return record


@pytest.mark.parametrize("name", list(trackers.TRACKERS))
def test_each_tracker_writes_the_numbers_of_an_event(tmp_path, monkeypatch, name):
    fake = FakeBackend()
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with RunLog(tmp_path / "log.jsonl", [trackers.open_tracker(name, tmp_path)]) as log:
        log.event("epoch", stage="0-train", epoch=2, loss=0.25)
        log.event("warning", message="careful")
    text = json.dumps(fake.calls)
    assert "0-train/loss" in text and "0.25" in text and len(fake.calls) >= 3
