from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch
from faulty_os import FaultyOs, PowerCut, outcome
from hypothesis import given
from hypothesis import strategies as st

from flatcompress import storage
from flatcompress.errors import RunError, UserError


def _calls_of_one_write(tmp_path, monkeypatch) -> int:
    shim = FaultyOs()
    monkeypatch.setattr(storage, "os", shim)
    storage.write_bytes_atomic(tmp_path / "count", b"x" * 100)
    return shim.calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_failing_call_leaves_the_old_or_the_new_file_and_says_what_is_kept(tmp_path, monkeypatch, code):
    calls = _calls_of_one_write(tmp_path, monkeypatch)
    assert calls >= 5  # open, write, fsync, replace, and the folder's open and fsync
    failed = 0
    for at in range(calls):
        path = tmp_path / f"file{at}"
        path.write_bytes(b"old")
        monkeypatch.setattr(storage, "os", FaultyOs(at, code))
        error = outcome(RunError, storage.write_bytes_atomic, path, b"new" * 50)
        if error:
            failed += 1
            assert "kept" in error and os.strerror(code) in error and str(path) in error
        assert path.read_bytes() in (b"old", b"new" * 50)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(storage.TEMPORARY_PREFIX)]
    assert failed >= 4


@pytest.mark.parametrize("after", [False, True])
def test_a_power_cut_at_any_call_leaves_the_old_or_the_new_file(tmp_path, monkeypatch, after):
    for at in range(_calls_of_one_write(tmp_path, monkeypatch)):
        path = tmp_path / f"file{at}"
        path.write_bytes(b"old")
        monkeypatch.setattr(storage, "os", FaultyOs(at, after=after))
        with pytest.raises(PowerCut):
            storage.write_bytes_atomic(path, b"new" * 50)
        assert path.read_bytes() in (b"old", b"new" * 50)
    monkeypatch.setattr(storage, "os", os)
    storage.remove_litter(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(storage.TEMPORARY_PREFIX)]


def test_an_unwritable_folder_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        storage.write_bytes_atomic(tmp_path / "no" / "such" / "file", b"x")


def test_json_is_strict_and_takes_tensors_arrays_and_paths(tmp_path):
    value = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": tmp_path, "d": float("nan"), "e": (True, None), 3: 4}
    found = json.loads(storage.to_json(value), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": 0.5, "b": [1, 2], "c": str(tmp_path), "d": "NaN", "e": [True, None], "3": 4}
    with pytest.raises(TypeError, match="object"):
        storage.to_json(object())


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(data)
    error = outcome(UserError, storage.read_json, path)
    assert error is None or str(path) in error


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "9" * 10_000, "\udcff", "", "{'a': 1}"])
def test_hostile_json_is_a_user_error(tmp_path, text):
    path = tmp_path / "hostile.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError):
        storage.read_json(path)


def test_folders_fifos_and_giants_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "giant").write_bytes(b"x" * 100)
    for name, words in [("fifo", "plain file"), ("giant", "more than"), ("", "plain file"), ("absent", "not found")]:
        with pytest.raises(UserError, match=words):
            storage.read_bytes(tmp_path / name, limit=10)
    with pytest.raises(UserError, match="plain file"):
        storage.sha256_file(tmp_path / "fifo")


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, RunError), (errno.EIO, RunError), (errno.EACCES, UserError)])
def test_an_output_that_cannot_be_written_is_the_users_or_the_disks_fault(tmp_path, monkeypatch, code, kind):
    path = tmp_path / "new" / "folder" / "model.onnx"
    storage.write_output(path, b"old")
    shim = FaultyOs()
    monkeypatch.setattr(storage, "os", shim)
    storage.write_output(path, b"old")
    for at in range(shim.calls):
        monkeypatch.setattr(storage, "os", FaultyOs(at, code))
        outcome(kind, storage.write_output, path, b"new")
        assert path.read_bytes() in (b"old", b"new")
        assert os.listdir(path.parent) == ["model.onnx"]


def test_the_cache_folder_is_the_variables_or_the_platforms(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATCOMPRESS_CACHE", str(tmp_path))
    assert storage.cache_folder() == tmp_path
    monkeypatch.delenv("FLATCOMPRESS_CACHE")
    found = storage.cache_folder()
    assert found.is_absolute() and "flatcompress" in found.parts
