"""Where runs are computed: addresses and storage are refused in time, folders copied, what is lost begun again."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter

import pytest

from flatcompress.cli import app as cli
from flatcompress.errors import UserError
from flatcompress.sweep import mirror, on_ray
from flatcompress.sweep.executor import MOST_LOSSES, Job, LocalPool, lost
from flatcompress.sweep.mirror import Copy, SharedFolder
from flatcompress.sweep.spec import Resources

SWEEP = """
recipe: {device: cpu, data: {name: rotated-digits}, stages: [train]}
methods: [{name: a}]
seeds: [0]
output_dir: OUT
"""


def cluster(on="ray", **keys):
    return on_ray.executor(on, keys.pop("root"), None, keys.get("storage_path"), Resources(), "cpu", print)


@pytest.mark.parametrize(
    "on", ["rey", "ray://", "ray://here", "ray://here:port", "ray://:1", "ray://here:99999", "local:1"]
)
def test_an_address_of_another_form_is_refused(tmp_path, on):
    with pytest.raises(UserError, match=r"ray://HOST:PORT"):
        cluster(on, root=tmp_path)


def test_missing_ray_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("OUT", str(tmp_path)))
    assert cli._guarded(["sweep", str(path), "--on", "ray"]) == 2
    assert "pip install 'flatcompress[ray]'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("ledger.json"))


def test_an_address_that_does_not_answer_is_refused_in_bounded_time(monkeypatch):
    monkeypatch.setattr(on_ray, "ANSWER_SECONDS", 0.2)
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(UserError, match="nothing answers at ray://127"):
            on_ray.connect(None, f"ray://127.0.0.1:{taken.getsockname()[1]}", None)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UserError, match="nothing answers at 127"):
            on_ray.connect(None, "ray", None)
    assert time.monotonic() - began < 30


def test_a_storage_path_is_for_ray_alone(tmp_path):
    with pytest.raises(UserError, match="--on ray"):
        cluster("local", root=tmp_path, storage_path="s3://bucket")


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_written_is_refused(url):
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"storage_path .*(opened|written)"):
        mirror.opened(url)


def test_a_run_folder_goes_to_the_storage_and_back(tmp_path):
    pytest.importorskip("fsspec")
    storage, here = SharedFolder("memory://sweeps/copying"), tmp_path / "run"
    first, second = here / "checkpoints" / "0-train@000000001", here / "checkpoints" / "0-train@000000002"
    first.mkdir(parents=True)
    (first / "state.json").write_text("1")
    (here / ".lock").write_text("mine alone")
    with Copy(storage, here, "run") as copy:
        (here / "ledger.json").write_text("[]")
        copy.push()
        first.rename(second)
        (here / "checkpoints" / "latest").write_text(second.name)
    storage.pull("run", tmp_path / "there")
    found = {str(p.relative_to(tmp_path / "there")) for p in (tmp_path / "there").rglob("*") if p.is_file()}
    assert found == {"ledger.json", "checkpoints/latest", f"checkpoints/{second.name}/state.json"}
    storage.pull("run", tmp_path / "without", without="checkpoints")
    assert [p.name for p in (tmp_path / "without").iterdir()] == ["ledger.json"]
    storage.pull("run", tmp_path / "part", part="checkpoints")
    assert not (tmp_path / "part" / "ledger.json").exists()
    storage.pull("no such run", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_job_is_given_up_only_after_several_lost_workers():
    losses: Counter[str] = Counter()
    job = Job("a", "a", {})
    assert [lost(job, losses) is None for _ in range(MOST_LOSSES)] == [True] * (MOST_LOSSES - 1) + [False]
    assert lost(Job("b", "b", {}), losses) is None


def test_nothing_is_finished_where_nothing_was_submitted(tmp_path):
    with LocalPool(tmp_path, 1) as pool:
        assert pool.finished() == []
