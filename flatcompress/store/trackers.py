"""TensorBoard, MLflow and Weights & Biases as readers of the log's events.

None of the three is a dependency; each is imported when it is asked for, and a missing one is a UserError that names
the extra. `RunLog` drops a tracker that fails, so a lost network never costs a run.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.registry import Registry
from flatcompress.store.runlog import Tracker

TRACKERS = Registry("tracker")
_CLOCKS = ("epoch", "step")
_NOT_SCALARS = {"event", "time", "stage", "epochs", *_CLOCKS}


def open_tracker(name: str, folder: str | Path, run_name: str = "flatcompress") -> Tracker:
    """The tracker ``name`` writing beside the run in ``folder``. UserError: unknown name, or the extra is missing."""
    return TRACKERS[name](Path(folder), run_name)


def scalars(event: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """``(clock, {tag: number})`` of an event: its epoch or step, and every finite number in it, nested ones too.

    >>> scalars({"event": "epoch", "stage": "0-train", "epoch": 3, "epochs": 9, "loss": 0.5, "gap": None})
    (3, {'0-train/loss': 0.5})
    """
    clock = next((int(event[c]) for c in _CLOCKS if isinstance(event.get(c), (int, float))), 0)
    prefix = str(event.get("stage") or event.get("event"))
    numbers = _numbers({k: v for k, v in event.items() if k not in _NOT_SCALARS}, prefix)
    return clock, dict(numbers)


def _numbers(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _numbers(item, f"{prefix}/{key}")
        elif isinstance(item, (int, float)) and math.isfinite(item):
            yield f"{prefix}/{key}", float(item)


class TensorBoard:
    """Event files under ``<run folder>/tensorboard``."""

    def __init__(self, folder: Path, run_name: str) -> None:
        _need("tensorboard", "tensorboard")
        module = _need("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))

    def event(self, event: dict[str, Any]) -> None:
        """Write an event's numbers as scalars over its epoch or step, and a warning as text."""
        clock, numbers = scalars(event)
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, clock)
        if event["event"] == "warning":
            self._writer.add_text("warnings", str(event.get("message", "")), clock)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class MLflow:
    """A run in the tracking store that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, run_name: str) -> None:
        self._mlflow = _need("mlflow", "mlflow")
        self._mlflow.start_run(run_name=run_name)

    def event(self, event: dict[str, Any]) -> None:
        """Log an event's numbers as metrics over its epoch or step."""
        clock, numbers = scalars(event)
        if numbers:
            self._mlflow.log_metrics(numbers, step=clock)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A W&B run whose files lie in the run folder (WANDB_MODE=offline keeps them there)."""

    def __init__(self, folder: Path, run_name: str) -> None:
        self._run = _need("wandb", "wandb").init(dir=str(folder), name=run_name)

    def event(self, event: dict[str, Any]) -> None:
        """Log an event's numbers with its clock beside them (W&B's own step can only grow)."""
        clock, numbers = scalars(event)
        if numbers:
            self._run.log({**numbers, f"{event.get('stage') or event['event']}/clock": clock})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _need(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"tracker {extra!r} needs a package that is not installed ({error}). "
            f"Install it with: pip install 'flatcompress[{extra}]'."
        ) from None


TRACKERS.add("tensorboard", TensorBoard, "event files in the run folder")
TRACKERS.add("mlflow", MLflow, "metrics in an MLflow tracking store")
TRACKERS.add("wandb", WeightsAndBiases, "metrics in a Weights & Biases run")
