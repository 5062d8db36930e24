"""What a worker does: one run in one folder, begun with the finished stages of another where there are some."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from flatcompress.errors import Interrupted, RunError, UserError
from flatcompress.pipeline import Pipeline
from flatcompress.recipe import Recipe, parse_recipe
from flatcompress.session import stage_id
from flatcompress.store import checkpoint
from flatcompress.store.runfolder import RunFolder


def worker_start() -> None:
    """A worker has one thread, and leaves an interrupt of the terminal to the run it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _outlive_no_parent() -> None:
    """End this worker when the sweep was killed: at once if idle, after saving the present step if in a run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def execute(recipe: dict[str, Any], folder: str, base: str | None) -> str | None:
    """Do one run in this process; returns what went wrong, or None."""
    try:
        checked = parse_recipe(recipe, folder)
        if base is not None:
            adopt(Path(base), Path(folder), checked)
        Pipeline.from_recipe(checked).run(folder)
    except (UserError, RunError, Interrupted) as error:
        return str(error)
    except Exception as error:  # one broken run must not end the others; the text goes into the sweep's report
        return f"{type(error).__name__}: {error}"
    finally:
        if _orphaned():
            os._exit(1)
    return None


def adopt(base: Path, folder: Path, recipe: Recipe) -> None:
    """Begin ``folder`` with the finished stages of the run in ``base``, unless it has begun already."""
    source, target = RunFolder(base), RunFolder(folder)
    if target.checkpoints.is_dir() and any(target.checkpoints.iterdir()):
        return
    finished = source.finished_stages()
    target.create().write_recipe(recipe.to_yaml())  # checkpoints without a recipe are nobody's, and not resumed
    for index in range(len(recipe.stages) - 1):
        stage = stage_id(recipe, index)
        if stage not in finished:
            return
        found = source.load(stage)
        checkpoint.save_stage(target.checkpoints, found.stage, found.plan, found.state_dict, extra=found.extra)
