"""A sweep on a Ray cluster of two nodes, a worker of it killed twice, says what the local pool says, bit for bit.

Needs the extra ray and, for a storage that is no folder, pyftpdlib.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time

import pytest

from flatcompress.errors import UserError
from flatcompress.sweep import mirror, on_ray, pool, table
from flatcompress.sweep.executor import LocalPool
from flatcompress.sweep.spec import Resources, parse_sweep

pytestmark = pytest.mark.slow

RECIPE = {
    "device": "cpu",
    "measure": "off",
    "checkpoint_every": 1,
    "data": {"name": "rotated-digits", "domains": ["30"], "size": 8, "test_fraction": 0.6,
             "corruptions": "none", "batch_size": 64},
    "model": {"name": "resnet8", "width": 4},
    "stages": [
        {"train": {"method": "none", "epochs": 2}},
        {"quantize": {"method": "lsq", "epochs": 2, "flatness_map": False}},
    ],
}  # fmt: skip
METHODS = [{"name": "LSQ"}, {"name": "SAM", "set": {"stages.1.quantize.method": "lsq_sam"}}]


def spec(folder, **keys):
    wanted = {"seeds": [0, 1, 2], "held_out": ["0", "75"], **keys}
    return parse_sweep({"recipe": RECIPE, "methods": METHODS, "output_dir": str(folder), **wanted})


@pytest.fixture(scope="module")
def cluster():
    """Two raylets on this machine, one CPU each."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's spelling; workers give way to everything otherwise
    os.environ["RAY_raylet_start_wait_time_s"] = "300"  # noqa: SIM112 - on a busy machine
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    found.shutdown()


def owner(folder):
    """The process that a run in ``folder`` is computed by."""
    try:
        return int(json.loads((folder / ".lock-owner.json").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None


class Killer(threading.Thread):
    """Kills the worker of one run ``times`` times, each time after it has saved something."""

    def __init__(self, root, times):
        super().__init__(daemon=True)
        self.root, self.times, self.killed = root, times, []

    def run(self):
        chosen = None
        while len(self.killed) < self.times:
            time.sleep(0.05)
            for folder in [chosen] if chosen else sorted(self.root.glob("*/")):
                pid = owner(folder)
                saved = any((folder / "checkpoints").glob("*@*"))
                if pid is not None and pid not in self.killed and saved:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append(pid)
                        chosen = folder
                        break


def figures(sweep, finished):
    """What a table says, clocks left out."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "sweep")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return json.dumps(timeless(table.write(sweep, finished)[1]))


def test_twelve_runs_on_two_nodes_with_a_worker_killed_twice_are_the_local_pools(tmp_path, cluster):
    here, there = spec(tmp_path / "local"), spec(tmp_path / "ray")
    said: list[str] = []
    killer = Killer(there.folder, 2)
    killer.start()
    made = lambda: on_ray.executor("ray", there.folder, None, None, Resources(), "cpu", said.append)  # noqa: E731
    on_cluster = pool.run_sweep(there, said.append, made)
    assert len(on_cluster) == 12 and len(killer.killed) == 2
    assert sum("its worker was lost" in line for line in said) == 2
    assert figures(there, on_cluster) == figures(here, pool.run_sweep(here))


def test_runs_are_copied_where_machines_share_no_folder(tmp_path, cluster):
    servers = pytest.importorskip("pyftpdlib.servers")
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler

    (tmp_path / "served").mkdir()
    authorizer = DummyAuthorizer()
    authorizer.add_anonymous(str(tmp_path / "served"), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server = servers.ThreadedFTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        sweep, url = spec(tmp_path / "here", seeds=[0], held_out=["75"]), f"ftp://127.0.0.1:{server.address[1]}/sweeps"
        made = lambda: on_ray.executor("ray", sweep.folder, None, url, Resources(), "cpu", print)  # noqa: E731
        finished = pool.run_sweep(sweep, print, made)
    finally:
        server.close_all()
    assert finished[0].rows[0] == finished[1].rows[0]  # the float stage was trained once, and fetched by the other
    fetched = {
        path.name for path in sweep.folder.glob("*/checkpoints/*/*")
    }  # plans say what a stage made, without weights
    assert fetched == {"plan.json"} and list((tmp_path / "served").rglob("1-quantize"))
    local = spec(tmp_path / "local", seeds=[0], held_out=["75"])
    assert figures(sweep, finished) == figures(local, pool.run_sweep(local))


def test_what_no_machine_has_is_refused(tmp_path, cluster):
    resources = Resources(cpu=1, gpu=3)
    with (
        pytest.raises(UserError, match="3 GPUs"),
        on_ray.executor("ray", tmp_path, None, None, resources, "cpu", print),
    ):
        pass


def test_a_local_process_that_is_killed_costs_no_run(tmp_path):
    keys = {"seeds": [0], "held_out": ["75"]}
    sweep, whole = spec(tmp_path / "killed", **keys), spec(tmp_path / "whole", **keys)
    said: list[str] = []
    killer = Killer(sweep.folder, 1)
    killer.start()
    finished = pool.run_sweep(sweep, said.append, lambda: LocalPool(sweep.folder, 2, said.append))
    assert len(killer.killed) == 1 and any("its process was killed" in line for line in said)
    assert figures(sweep, finished) == figures(whole, pool.run_sweep(whole))


def test_a_storage_on_this_machine_is_worked_in(tmp_path):
    assert mirror.opened(str(tmp_path)).local == tmp_path and mirror.opened(f"file://{tmp_path}").local == tmp_path
