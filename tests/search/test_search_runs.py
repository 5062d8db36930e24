"""Whole searches: the same seed the same front, a kill loses nothing, several machines share one study."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from searches import RECIPE, SPACE, search

from flatcompress.cli import app as cli
from flatcompress.search.driver import run_search
from flatcompress.search.front import Front
from flatcompress.search.space import expand
from flatcompress.search.study import Study
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep.executor import LocalPool

pytestmark = pytest.mark.slow
SMALL = {"space": {k: SPACE[k] for k in ("stages.1.prune.ratios", "stages.2.quantize.bits")}}


def file(folder: Path, name: str, **keys) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "search.yaml"
    usual = {"objectives": {"robust": "maximize", "bytes": "minimize"}, "warm_start": 4}
    raw = {"name": name, "recipe": RECIPE, "output_dir": str(folder), **usual, **SMALL, **keys}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))  # the first objective orders the front
    return path


def started(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "flatcompress", "search", str(path), *options]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )


def figures(front: Front):
    """What a front says, clocks left out."""
    return [(p.number, p.values, {k: v for k, v in p.measures.items() if k != "seconds"}) for p in front.points]


def test_a_killed_search_ends_in_the_front_of_one_that_was_not(tmp_path, capsys):
    whole = search(tmp_path / "whole", **SMALL)
    first = run_search(whole, print, lambda: LocalPool(whole.folder, 1, print))
    path = file(tmp_path / "killed", "search", n_trials=whole.n_trials, warm_start=whole.warm_start)
    process = started(path)
    folder = tmp_path / "killed" / "search"
    end = time.monotonic() + 400
    while len(list(folder.glob("0*-*/ledger.json"))) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    capsys.readouterr()
    assert cli._guarded(["search", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [p["trial"] for p in data["front"]] == [p.number for p in first.points]
    for ours, theirs in zip(data["front"], figures(first), strict=True):
        assert {k: v for k, v in ours["measures"].items() if k != "seconds"} == theirs[2]
        assert ours["values"] == theirs[1]
    again = yaml.safe_load((folder / data["front"][0]["recipe"]).read_text())
    again["output_dir"] = str(tmp_path)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert cli._guarded(["run", str(tmp_path / "again.yaml"), "--json", "--quiet"]) == 0
    row = json.loads(capsys.readouterr().out)["ledger"][-1]
    assert row["bytes"] == data["front"][0]["measures"]["bytes"]
    assert row["accuracy"]["held_out"] == data["front"][0]["measures"]["held_out"]


def test_points_with_other_starts_train_each_of_them_once(tmp_path):
    said: list[str] = []
    varied = {**SMALL["space"], "stages.0.train.epochs": {"choice": [1, 2]}}
    wanted = search(tmp_path, space=varied, full_stages=1, fidelities=["post_training", "full"], n_trials=5, seed=3)
    front = run_search(wanted, said.append, lambda: LocalPool(wanted.folder, 2, said.append))
    starts = sorted(wanted.folder.glob("start-*"))
    assert len(starts) == 2 == sum("trained in full" in line for line in said) and front.points
    rows = [RunFolder(folder).read_ledger()[0] for folder in starts]
    for folder in wanted.folder.glob("0*-*"):
        mine = RunFolder(folder).read_ledger()[0]
        assert any(mine["accuracy"] == row["accuracy"] and mine["passes"] == row["passes"] for row in rows)


def test_own_points_are_trained_in_full_and_first(tmp_path):
    mine = [{"stages.1.prune.ratios": 0.0, "stages.2.quantize.bits": bits} for bits in (8, 4)]
    wanted = search(tmp_path, **SMALL, starts=mine, fidelities=["post_training", "full"], n_trials=4, warm_start=2)
    run_search(wanted, print, lambda: LocalPool(wanted.folder, 1, print))
    space, _ = expand(wanted)
    records = Study(wanted, space).records()
    assert [set(r.results) for r in records[:2]] == [{1}, {1}] and all(0 in r.results for r in records[2:])
    assert [set(r.values.values()) for r in records[:2]] == [{"0.0", "8"}, {"0.0", "4"}]


@pytest.fixture
def postgresql():
    """A PostgreSQL server of this test's own; its URL."""
    pytest.importorskip("pg8000", reason="needs the extra postgresql")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")) or [Path(shutil.which("pg_ctl") or "")]
    if not found[-1].name:
        pytest.skip("needs a PostgreSQL server (pg_ctl)")
    # not below pytest's own folder, which every new run of pytest closes to other users
    tools, folder = found[-1].parent, Path(tempfile.mkdtemp(prefix="postgresql-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")

    def call(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=300)

    call(str(tools / "initdb"), "-D", str(folder / "data"), "-U", "tester", "-A", "trust")
    with contextlib.closing(__import__("socket").socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    call(str(tools / "pg_ctl"), "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    finally:
        call(str(tools / "pg_ctl"), "-D", str(folder / "data"), "-m", "fast", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_forty_trials_of_two_workers_on_postgresql_one_killed_lose_nothing(tmp_path, postgresql):
    keys = {"storage": postgresql, "n_trials": 40, "fidelities": ["post_training", "full"], "reduction_factor": 4}
    paths = [file(tmp_path / name, "shared", **keys) for name in ("one", "two")]
    workers = [started(path) for path in paths]
    mine = search(tmp_path / "one", name="shared", warm_start=4, **SMALL, **keys)
    space, _ = expand(mine)
    end = time.monotonic() + 3000
    study = Study(mine, space)
    while sum(0 in r.results for r in study.records()) < 8:
        assert time.monotonic() < end and all(w.poll() is None for w in workers)
        time.sleep(1)
    os.killpg(workers[0].pid, signal.SIGKILL)
    workers[0].communicate()
    error = workers[1].communicate(timeout=end - time.monotonic())[1]
    assert workers[1].returncode == 0, error
    records = [r for r in study.records() if r.number < 40]  # two that begin the last one at once: one more, left out
    assert len(records) == 40 and not any(r.failed or r.open for r in records)
    assert all(0 in r.results for r in records), "every point has its estimate, those of the killed worker too"
    assert sum(1 in r.results for r in records) >= 10
    data = json.loads((tmp_path / "two" / "shared" / "front.json").read_text())
    assert [p["trial"] for p in data["front"]] == [p.number for p in Front.of(mine, space, records).points]
