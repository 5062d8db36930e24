"""A disk that is really full, a folder that is really read-only, memory that really runs out: no stand-ins."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import small_runs
import torch
from test_resources import Kept
from torch import nn

from flatcompress import flat
from flatcompress.errors import RunError, UserError
from flatcompress.training.job import Job
from flatcompress.training.loop import fit, make_accelerator

NEW_USER, NEW_MOUNTS, READ_ONLY, REMOUNT = 0x10000000, 0x00020000, 1, 32
EPOCH = {"train": {"method": "none", "epochs": 1}}


def in_a_child(function, *args):
    """What ``function`` returns, as plain data, in a process that may lock itself in; skips where it may not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function(*args)
        except PermissionError as error:
            answer = {"skip": str(error)}
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(child, 0)
    if "skip" in answer:
        pytest.skip(f"this machine does not let a test mount a disk of its own ({answer['skip']})")
    assert "crash" not in answer, answer["crash"]
    return answer


def libc(name, *args):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*args) != 0:
        raise PermissionError(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(folder: Path, kilobytes: int, flags: int = 0):
    """A disk of its own at ``folder``, for this process alone."""
    if not flags:
        folder.mkdir()
        user = os.geteuid()
        libc("unshare", NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER)
        if user != 0:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        libc("mount", None, b"/", None, 0x4000 | 0x40000, None)  # private: nobody else sees what is mounted here
    libc("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={kilobytes}k".encode())


def run(folder):
    return small_runs.pipeline(EPOCH, EPOCH, checkpoint_every=2).run(folder)


def said_by(folder):
    """The error of a run, by kind and text."""
    try:
        run(folder)
    except (RunError, UserError) as error:
        return [type(error).__name__, str(error)]
    return ["no error", ""]


def fill(folder: Path, leave: int):
    """A file that leaves so many kilobytes of the disk."""
    space = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(space.f_bavail * space.f_bsize - leave * 1024))


def full_disk(disk: Path, leave: int):
    mount(disk, 2000)
    fill(disk, leave)
    error = said_by(disk / "run")
    (disk / "filler").unlink()
    ended = run(disk / "run")
    return {"error": error, "same": small_runs.same(ended, run(disk / "whole"))}


@pytest.fixture(autouse=True)
def _only_training(monkeypatch):
    small_runs.only_training(monkeypatch)
    small_runs.bundle()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@needs_linux
@pytest.mark.parametrize("leave", [60, 120])  # kilobytes: in the first stage, in a later save
def test_a_full_disk_is_said_and_with_space_again_the_run_goes_on_to_the_same_bits(leave, tmp_path):
    found = in_a_child(full_disk, tmp_path / "disk", leave)
    kind, text = found["error"]
    assert kind == "RunError" and "No space left on device" in text and "Free some space" in text
    assert found["same"]


def read_only(disk: Path):
    mount(disk, 2000)
    mount(disk, 2000, READ_ONLY | REMOUNT)
    return {"error": said_by(disk / "run")}


@needs_linux
def test_a_read_only_disk_is_refused_before_anything_runs(tmp_path):
    kind, text = in_a_child(read_only, tmp_path / "disk")["error"]
    assert kind == "UserError" and "Read-only file system" in text and "Nothing was run" in text


def without_the_right(folder: Path):
    folder.mkdir()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        for parent in folder.parents[:4]:
            parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    return {"error": said_by(folder / "run")}


def test_a_folder_without_the_right_to_write_is_refused_before_anything_runs(tmp_path):
    kind, text = in_a_child(without_the_right, tmp_path / "closed")["error"]
    assert kind == "UserError" and "Permission denied" in text and "Nothing was run" in text


# ---------------------------------------------------------------------------- memory


def hungry(policy):
    """Training whose pass over the whole batch needs about 260 MB, in a process that may take 150 MB more."""
    torch.set_num_threads(1)  # another thread would reserve address space of its own, 64 MB or none
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
    )
    x = torch.randn(32, 1, 256, 256)
    optimizer = flat.create("sam", model, torch.optim.SGD(model.parameters(), lr=0.01))
    made = Job(
        model=model, optimizer=optimizer, train=torch.utils.data.TensorDataset(x, torch.arange(32) % 2),
        accelerator=make_accelerator("cpu"), loss=nn.functional.cross_entropy, epochs=1, batch_size=32, seed=0,
        validate=lambda: 0.0, progress=Kept(policy),
    )  # fmt: skip
    model(x[:1]).sum().backward()  # what is set up once
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + (150 << 20),) * 2)
    try:
        fit(made)
    except RunError as error:
        return {"error": str(error), "parts": made.state.recovery.parts}
    return {"error": "", "parts": made.state.recovery.parts}


def in_a_fresh_process(function, *args):
    """What ``function`` returns in an interpreter of its own: a fork has memory that earlier tests gave back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@needs_linux
def test_memory_that_runs_out_is_said_with_the_batch_size_that_fits():
    found = in_a_fresh_process(hungry, "stop")
    assert "out of memory at step 1 with 32 samples in a pass" in found["error"]
    assert any(f"a batch size of {n} would fit" in found["error"] for n in (16, 8, 4, 2, 1))


@needs_linux
def test_memory_that_runs_out_is_got_along_with_in_parts():
    found = in_a_fresh_process(hungry, "halve")
    assert found["error"] == "" and found["parts"] in (2, 4, 8, 16, 32)
