"""What a worker begins with: the finished stages of another run, in a folder that says whose they are."""

from __future__ import annotations

import small_runs
import torch

from flatcompress.plan import Plan
from flatcompress.recipe import parse_recipe
from flatcompress.recipe.resuming import first_changed_stage
from flatcompress.store import checkpoint
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep.worker import adopt


def test_an_adopted_beginning_is_resumed(tmp_path):
    whole = parse_recipe({"stages": [small_runs.TRAIN, small_runs.PRUNE]})
    saved = checkpoint.save_stage(tmp_path / "base" / "checkpoints", "0-train", Plan(), {"weight": torch.ones(2)})
    adopt(tmp_path / "base", tmp_path / "mine", whole)
    mine = RunFolder(tmp_path / "mine")
    assert saved.name == "0-train" and mine.finished_stages() == ["0-train"]
    assert first_changed_stage(mine, whole) is None
    (tmp_path / "mine" / "checkpoints" / "latest").unlink()
    adopt(tmp_path / "nothing", tmp_path / "mine", whole)  # begun already: left as it is
    assert mine.finished_stages() == ["0-train"]
