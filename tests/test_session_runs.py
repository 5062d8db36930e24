"""One run in one folder: signals, the lock, a changed recipe, damage, trackers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import small_runs

from flatcompress import report
from flatcompress.cli.commands import open_run
from flatcompress.errors import Interrupted, UserError
from flatcompress.recipe import SCHEMA
from flatcompress.session import Progress, Session, how_to_resume, seconds
from flatcompress.store.runfolder import RunFolder

ROOT = Path(__file__).parents[1]
REPORT = Session.report  # as it is, before anything is left out
AGAIN = {"train": {"method": "none", "epochs": 1}}


@pytest.fixture(autouse=True)
def _only_training(monkeypatch):
    small_runs.only_training(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small_runs.only_training(patch)
        return small_runs.pipeline(small_runs.TRAIN, AGAIN).run(tmp_path_factory.mktemp("session") / "whole")


def run(folder, *stages, display=None, **options):
    return small_runs.pipeline(*(stages or (small_runs.TRAIN, AGAIN)), **options).run(folder, display=display)


def on(event, action, times=1):
    """A display that does something at the first events of a kind."""
    left = [times]

    def shown(row):
        if row["event"] == event and left[0]:
            left[0] -= 1
            action()

    return shown


def signalled(count, number=signal.SIGINT):
    def send():
        for _ in range(count):
            os.kill(os.getpid(), number)

    return send


def stopped_in(folder, stage, *stages, **options):
    """A run that was stopped after the first step of this stage."""

    def stop(row):
        if row["event"] == "stage" and row["stage"] == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(folder, *stages, display=stop, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_saves_and_says_how_to_resume(number, whole, tmp_path, capfd):
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=r"stopped after step 6; everything is saved\. The same call resumes the run\."
    ):
        run(tmp_path / "run", display=on("epoch", signalled(1, number)))
    assert "stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped" and "step 6" in last["reason"]
    assert small_runs.same(run(tmp_path / "run"), whole)


def test_the_second_signal_stops_at_once_and_does_no_damage(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", display=on("epoch", signalled(2)))
    assert small_runs.same(run(tmp_path / "run"), whole)


def test_a_signal_between_stages_stops_there(whole, tmp_path):
    with pytest.raises(Interrupted, match="stopped after stage 0-train"):
        run(tmp_path / "run", display=on("row", signalled(1)))
    started = []
    result = run(tmp_path / "run", display=lambda row: started.append(row) if row["event"] == "stage" else None)
    assert [row["stage"] for row in started] == ["1-train"]
    assert small_runs.same(result, whole)


def test_the_way_on_is_the_command_without_restart(monkeypatch):
    words = ["/usr/bin/flatcompress", "run", "my recipe.yaml", "--restart", "--set", "seed=1"]
    monkeypatch.setattr(sys, "argv", words)
    assert how_to_resume() == "Resume with: flatcompress run 'my recipe.yaml' --set seed=1"
    for program in ("C:/Scripts/flatcompress.exe", "/usr/lib/python3/site-packages/flatcompress/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, "run", "a.yaml"])
        assert how_to_resume() == "Resume with: flatcompress run a.yaml"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert how_to_resume() == "The same call resumes the run."


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    refused = []

    def second():
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            run(tmp_path / "run")
        refused.append(True)

    run(tmp_path / "run", AGAIN, display=on("epoch", second))
    assert refused


# ---------------------------------------------------------------------------- a changed recipe


def test_a_change_of_what_was_used_is_refused_with_a_diff(tmp_path):
    stopped_in(tmp_path / "run", "1-train")
    other = {"train": {"method": "sam", "epochs": 3}}
    with pytest.raises(UserError, match=r"(?s)already used:\n  stages\.0\.train\.epochs: 2 -> 3\n.*--restart"):
        run(tmp_path / "run", other, AGAIN)
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        run(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match=r"stages\.1\.train\.epochs: 1 -> 5"):  # it is in the middle of it
        run(tmp_path / "run", small_runs.TRAIN, {"train": {"method": "none", "epochs": 5}})
    with pytest.raises(UserError, match=r"stages\.1: .* -> None"):
        run(tmp_path / "run", small_runs.TRAIN)


def test_a_change_of_what_is_still_to_come_goes_on(tmp_path):
    stopped_in(tmp_path / "run", "0-train")
    later = {"train": {"method": "asam", "epochs": 1}}
    expected = run(tmp_path / "whole", small_runs.TRAIN, later)
    begun = []
    found = run(tmp_path / "run", small_runs.TRAIN, later, display=lambda row: begun.append(row))
    assert next(row for row in begun if row["event"] == "stage")["resumed_at_step"] == 1
    assert small_runs.same(found, expected)
    more = run(tmp_path / "run", small_runs.TRAIN, later, AGAIN)
    assert [row["stage"] for row in more.ledger] == ["train"] * 3


def aged(folder):
    """The folder as a version without a schema number left it."""
    path = folder / "recipe.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("schema:")))


def test_a_folder_of_an_earlier_version_is_read_but_not_resumed(tmp_path):
    before = run(tmp_path / "run", AGAIN)
    aged(tmp_path / "run")
    with pytest.raises(
        UserError, match=rf"(?s)earlier version .*schema 1, this version has {SCHEMA}.*report.*--restart"
    ):
        run(tmp_path / "run", AGAIN)
    _, pipeline = open_run(tmp_path / "run")
    assert pipeline.recipe.stages[0].kind == "train"
    assert RunFolder(tmp_path / "run").load().extra["ledger"] == before.ledger
    again = small_runs.pipeline(AGAIN).run(tmp_path / "run", restart=True)
    assert small_runs.same(again, before)


def test_checkpoints_without_the_recipe_that_made_them_are_not_resumed(tmp_path):
    stopped_in(tmp_path / "run", "0-train")
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"checkpoints and no recipe\.yaml.*--restart"):
        run(tmp_path / "run", AGAIN)


def test_a_folder_of_an_earlier_version_in_which_nothing_is_finished_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("stages: [{train: {}}]\n")
    assert run(tmp_path / "run", AGAIN).ledger


def test_keys_that_cannot_change_the_result_may_change(whole, tmp_path):
    stopped_in(tmp_path / "run", "0-train")
    options = {"checkpoint_every": "1h", "threads": None, "on_divergence": "skip", "on_out_of_memory": "halve"}
    assert small_runs.same(run(tmp_path / "run", **options, max_rollbacks=9), whole)


def test_more_loading_processes_give_the_same_bits(whole, tmp_path):
    stopped_in(tmp_path / "run", "0-train")
    pipeline = small_runs.pipeline(small_runs.TRAIN, AGAIN)
    pipeline.recipe.data.workers = 1
    assert small_runs.same(pipeline.run(tmp_path / "run"), whole)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90.0), ("5m", 300.0), ("1.5h", 5400.0)])
def test_checkpoint_every_reads_times(text, expected, monkeypatch, tmp_path):
    assert seconds(text) == expected
    saved, clock = [], [0.0]
    monkeypatch.setattr("flatcompress.session.time.monotonic", lambda: clock[0])
    save = Progress.save
    monkeypatch.setattr(Progress, "save", lambda self, step, state: (saved.append(step), save(self, step, state)))
    due = Progress.due

    def ticking(self, step):
        clock[0] += expected / 4
        return due(self, step)

    monkeypatch.setattr(Progress, "due", ticking)
    run(tmp_path / "run", small_runs.TRAIN, checkpoint_every=text)
    assert saved == [4, 8]


def test_restart_begins_afresh(tmp_path):
    run(tmp_path / "run", AGAIN)
    seen = []
    changed = small_runs.pipeline({"train": {"method": "sam", "epochs": 1}})
    changed.run(tmp_path / "run", restart=True, display=lambda row: seen.append(row))
    assert [row["stage"] for row in seen if row["event"] == "stage"] == ["0-train"]


# ---------------------------------------------------------------------------- damage


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def newest(folder):
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", display=on("epoch", signalled(1)))
    assert newest(tmp_path / "run").name == "0-train@000000006"
    damage(newest(tmp_path / "run") / "model.safetensors")
    rows = []
    result = run(tmp_path / "run", display=lambda row: rows.append(row))
    said = [row["message"] for row in rows if row["event"] == "warning"]
    assert [text for text in said if "0-train@000000006 is damaged and passed over" in text]
    assert next(row for row in rows if row["event"] == "stage")["resumed_at_step"] == 5
    assert small_runs.same(result, whole)


def test_a_damaged_finished_stage_is_done_again(whole, tmp_path):
    stopped_in(tmp_path / "run", "1-train")
    damage(tmp_path / "run" / "checkpoints" / "0-train" / "model.safetensors")
    with pytest.warns(UserWarning, match="is of no use without 0-train"):
        assert small_runs.same(run(tmp_path / "run"), whole)


def test_when_everything_is_damaged_the_run_begins_again(whole, tmp_path):
    stopped_in(tmp_path / "run", "1-train")
    for path in (tmp_path / "run" / "checkpoints").rglob("*.json"):
        damage(path)
    with pytest.warns(UserWarning, match="no sound checkpoint is left"):
        assert small_runs.same(run(tmp_path / "run"), whole)


def test_a_torn_log_and_a_lost_ledger_do_no_harm(whole, tmp_path):
    stopped_in(tmp_path / "run", "1-train")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    (tmp_path / "run" / "ledger.json").unlink()
    result = run(tmp_path / "run")
    assert small_runs.same(result, whole)
    assert json.loads((tmp_path / "run" / "ledger.json").read_text())["rows"] == result.ledger
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(row["event"] == "warning" and "torn" in row["message"] for row in events)


def test_a_folder_that_was_copied_goes_on_elsewhere(whole, tmp_path):
    stopped_in(tmp_path / "run", "1-train")
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    assert small_runs.same(run(tmp_path / "elsewhere"), whole)


# ---------------------------------------------------------------------------- trackers


def test_a_tracker_named_in_the_recipe_gets_the_events(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, log_dir):
            written.append(log_dir)

        def add_scalar(self, tag, value, step):
            written.append((tag, step))

        def add_text(self, *args):
            pass

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run(tmp_path / "run", log=["tensorboard"])
    assert written[0] == str(tmp_path / "run" / "tensorboard") and written[-1] == "closed"
    assert ("0-train/loss", 1) in written and ("0-train/loss", 2) in written


def test_an_unknown_or_missing_tracker_is_said_before_anything_runs(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'tensorboard', 'mlflow' or 'wandb'"):
        run(tmp_path / "run", log=["tensorbored"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'flatcompress\[wandb\]'"):
        run(tmp_path / "run", log=["wandb"])
    assert not (tmp_path / "run" / "log.jsonl").exists()


# ---------------------------------------------------------------------------- the command itself


@pytest.mark.slow
def test_the_command_exits_130_and_prints_the_command_that_goes_on(tmp_path):
    from faults import RECIPE

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    words = [sys.executable, "-m", "flatcompress", "run", str(recipe), "-o", str(tmp_path / "run"), "-q"]
    process = subprocess.Popen([*words, "--restart"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and '"stage"' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert f"Resume with: flatcompress run {recipe} -o {tmp_path / 'run'} -q\n" in err
    assert "Traceback" not in err
    assert subprocess.run(words, cwd=ROOT).returncode == 0


def test_all_that_belongs_to_no_stage_is_told(tmp_path, monkeypatch):
    now = [0.0]

    def taking(seconds, result=None):
        def work(*args, **options):
            now[0] += seconds
            return result

        return work

    made = small_runs.pipeline(small_runs.TRAIN)
    ready = made.prepare()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("flatcompress.pipeline.Pipeline.prepare", taking(1.0, ready))
    monkeypatch.setattr("flatcompress.session.pictures.sheet", taking(2.0, b""))
    monkeypatch.setattr("flatcompress.session.checkpoint.save_stage", taking(4.0))
    monkeypatch.setattr("flatcompress.session.pictures.draw_examples", taking(8.0))
    monkeypatch.setattr("flatcompress.session.Session.report", REPORT)
    monkeypatch.setattr("flatcompress.report.card.build", taking(16.0))
    monkeypatch.setattr("flatcompress.report.build", taking(32.0))
    folder = made.run(tmp_path / "run").folder
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    told = [event["seconds"] for event in events if event["event"] == "spent" and event["stage"] is None]
    assert sorted(seconds for parts in told for seconds in parts.values()) == [1.0, 2.0, 4.0, 8.0, 48.0]
    assert report.gather(folder).beside == told[0] | told[1]
