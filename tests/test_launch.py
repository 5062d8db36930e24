"""Two processes: `accelerate launch` trains the same recipe, one of them writes, and both agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny import recipe, write


def printed(command):
    """The one JSON document that a launcher's processes print together: only one of them speaks."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_processes_run_a_recipe(tmp_path):
    raw = recipe()
    raw["data"] |= {"batch_size": 64}
    path = write(tmp_path, raw)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    result = printed([*command, "-m", "flatcompress", "run", str(path), "--quiet", "--json"])
    assert result["certificate"]["holds"] is True
    log = (tmp_path / "runs" / "tiny" / "log.jsonl").read_text().splitlines()
    run = next(json.loads(line) for line in log if '"run"' in line)
    assert run["environment"]["processes"] == 2


@pytest.mark.slow
def test_accelerate_launch_runs_a_recipe(tmp_path):
    path = write(tmp_path, recipe(stages=recipe()["stages"][:1]))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    result = printed([*command, "-m", "flatcompress", "run", str(path), "--json"])
    assert [row["stage"] for row in result["ledger"]] == ["train"]
