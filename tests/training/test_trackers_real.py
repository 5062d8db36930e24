"""The trackers themselves, where they are installed: what they keep is what the log says."""

from __future__ import annotations

import pytest

from flatcompress.store.runlog import RunLog, read_events
from flatcompress.store.trackers import open_tracker, scalars

EPOCHS = [{"epoch": 1, "loss": 0.5, "gap": None}, {"epoch": 2, "loss": 0.25, "gap": 0.125}]


def logged(folder, name):
    """Two epochs and a warning in a log that the tracker reads; the numbers of the log, by tag."""
    with RunLog(folder / "log.jsonl", [open_tracker(name, folder, "mine")]) as log:
        for epoch in EPOCHS:
            log.event("epoch", stage="0-train", **epoch)
        log.event("warning", stage="0-train", message="careful")
        assert log.trackers, "the tracker failed and was dropped"
    numbers = {}
    for event in read_events(folder / "log.jsonl"):
        clock, found = scalars(event)
        for tag, number in found.items():
            numbers.setdefault(tag, []).append((clock, number))
    assert numbers == {"0-train/loss": [(1, 0.5), (2, 0.25)], "0-train/gap": [(2, 0.125)]}
    return numbers


def test_tensorboard_keeps_the_numbers_of_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    numbers = logged(tmp_path, "tensorboard")
    kept = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    kept.Reload()
    assert {tag: [(row.step, row.value) for row in kept.Scalars(tag)] for tag in kept.Tags()["scalars"]} == numbers
    assert any(tag.startswith("warnings") for tag in kept.Tags()["tensors"])


def test_mlflow_keeps_the_numbers_of_the_log(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    numbers = logged(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    assert {tag: [(row.step, row.value) for row in rows] for tag, rows in history.items()} == numbers


def test_wandb_keeps_the_numbers_of_the_log(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    numbers = logged(tmp_path, "wandb")
    wandb.teardown()  # what is not sent is on the disk once its own process has ended
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert all(tag.encode() in content for tag in numbers)
