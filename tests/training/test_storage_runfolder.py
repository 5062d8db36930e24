from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatcompress import storage
from flatcompress.errors import UserError
from flatcompress.store import runfolder
from flatcompress.store.runfolder import RunFolder, read_ledger

ROWS = [{"stage": "train", "accuracy": {"test": 0.9, "held_out": None}, "bytes": 10**12}, {"stage": "export"}]

HOLDER = (
    "import sys, os, time\nfrom flatcompress.store.runfolder import RunFolder\n"
    "with RunFolder(sys.argv[1]).create().locked():\n"
    "    child = os.fork() if len(sys.argv) > 2 else 1\n"
    "    if child == 0:\n        time.sleep(1)\n        os._exit(0)\n"
    "    print('held', flush=True)\n    time.sleep(60)\n"
)


def hold(folder, *more: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_ledger_and_the_recipe_come_back(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b").create()
    assert folder.read_ledger() == [] and folder.read_recipe() is None
    folder.write_ledger(ROWS)
    folder.write_recipe("name: größe\n")
    assert folder.read_ledger() == ROWS and folder.read_recipe() == "name: größe\n"
    assert json.loads(folder.ledger.read_text())["schema"] == 1


def test_an_unmeasured_metric_is_null_and_a_diverged_one_says_so(tmp_path):
    folder = RunFolder(tmp_path).create()
    folder.write_ledger([{"stage": "train", "sharpness": None, "loss": float("inf")}])
    assert folder.read_ledger() == [{"stage": "train", "sharpness": None, "loss": "Infinity"}]


@pytest.mark.parametrize("path", ["file/run", "\0", "x" * 300])
def test_a_folder_that_cannot_be_written_is_a_user_error_before_anything_runs(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder"):
        RunFolder(tmp_path / path).create()


def test_a_read_only_file_system_is_a_user_error(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"Read-only.*Nothing was run"):
        RunFolder(tmp_path / "run").create()


def test_a_second_process_is_refused_and_told_the_pid(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=f"process {holder.pid}"), RunFolder(tmp_path).locked():
            pytest.fail("two owners")
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("more", [(), ("with a forked child that lives on",)])
def test_the_lock_dies_with_its_owner(tmp_path, more):
    holder = hold(tmp_path, *more)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / f"{storage.TEMPORARY_PREFIX}ledger.json-1-2").write_text("half")
    with RunFolder(tmp_path).locked() as folder:
        assert folder.path == tmp_path
        assert not [name for name in os.listdir(tmp_path) if name.startswith(storage.TEMPORARY_PREFIX)]
    holder.communicate()


def test_the_lock_is_free_again_after_use_and_after_an_error(tmp_path):
    folder = RunFolder(tmp_path).create()
    with pytest.raises(KeyError), folder.locked():
        raise KeyError
    with folder.locked(), pytest.raises(UserError, match=f"process {os.getpid()}"), RunFolder(tmp_path).locked():
        pytest.fail("two owners")
    with folder.locked():
        pass


def test_an_owner_on_another_machine_counts_as_alive():
    assert runfolder._alive({"pid": 1, "host": "elsewhere.example"})
    assert not runfolder._alive({"pid": 2**22 + 5, "host": runfolder.socket.gethostname()})
    assert not runfolder._alive(None)


@given(
    st.binary(max_size=60) | st.sampled_from([b'{"schema":1,"rows":[{}]}', b'{"schema":2,"rows":[]}', b'{"schema":1}'])
)
def test_a_damaged_ledger_is_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "ledger.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"ledger\.json"):
        read_ledger(path)
