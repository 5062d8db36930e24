"""Two processes: `accelerate launch` trains the same recipe, one of them writes, and both agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny import recipe, write


@pytest.mark.slow
def test_two_processes_run_a_recipe(tmp_path):
    raw = recipe()
    raw["data"] |= {"batch_size": 64}
    path = write(tmp_path, raw)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    done = subprocess.run(
        [*command, "-m", "flatcompress", "run", str(path), "--quiet", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)  # one JSON document: only one process speaks
    assert result["certificate"]["holds"] is True
    log = (tmp_path / "runs" / "tiny" / "log.jsonl").read_text().splitlines()
    run = next(json.loads(line) for line in log if '"run"' in line)
    assert run["environment"]["processes"] == 2


@pytest.mark.slow
def test_accelerate_launch_runs_a_recipe(tmp_path):
    path = write(tmp_path, recipe(stages=recipe()["stages"][:1]))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "flatcompress", "run", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["stage"] for row in json.loads(done.stdout)["ledger"]] == ["train"]
