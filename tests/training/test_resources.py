"""Out of memory, a full disk, a read-only folder, a data-loading process that dies: what is said and what is kept."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
import torch
from faulty_os import FaultyOs, PowerCut
from torch import nn

from flatcompress import (
    flat,
    storage,
)
from flatcompress.errors import Interrupted, RunError, UserError
from flatcompress.store import (
    checkpoint,
    runlog,
)
from flatcompress.training import (
    memory,
)
from flatcompress.training.job import Job
from flatcompress.training.loop import fit, make_accelerator

ROOT = Path(__file__).parents[2]
ONE_EPOCH = {"train": {"method": "none", "epochs": 1}}


class Kept:
    """A progress that only knows what to do when memory runs out."""

    on_divergence, max_rollbacks, stop_requested = "stop", 0, False

    def __init__(self, policy):
        self.on_out_of_memory = policy

    def due(self, step):
        return False


def job(policy="stop", most=10**9, method="sam", dataset=None, workers=0, error=None):
    """Training that runs out of memory whenever a pass has more than ``most`` samples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def loss(logits, y):
        if len(y) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return nn.functional.cross_entropy(logits, y)

    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    messages = []
    made = Job(
        model=model,
        optimizer=flat.create(method, model, torch.optim.SGD(model.parameters(), lr=0.5)),
        train=dataset or torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()),
        accelerator=make_accelerator("cpu"),
        loss=loss,
        epochs=2,
        batch_size=25,
        seed=0,
        workers=workers,
        validate=lambda: 0.0,
        progress=Kept(policy),
        emit=lambda event, **fields: messages.append(fields.get("message")),
    )
    return made, messages


@pytest.mark.parametrize("error", [None, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_the_batch_size_that_fits(error):
    trained, _ = job(most=7, error=error)
    with pytest.raises(
        RunError, match=r"with 25 samples in a pass; a batch size of 6 would fit.*on_out_of_memory=halve"
    ):
        fit(trained)


def test_out_of_memory_says_when_nothing_fits():
    trained, _ = job(most=0)
    with pytest.raises(RunError, match="not even one sample fits"):
        fit(trained)


@pytest.mark.parametrize("method", ["none", "sam", "sagm", "gam"])
def test_halved_batches_take_the_steps_of_whole_ones(method):
    whole, _ = job(method=method)
    fit(whole)
    parts, messages = job("halve", most=7, method=method)
    fit(parts)
    assert parts.state.recovery.parts == 4
    assert [m for m in messages if m and "2 parts" in m] and [m for m in messages if m and "4 parts" in m]
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert parts.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_halving_ends_at_single_samples():
    trained, _ = job("halve", most=0)
    with pytest.raises(RunError, match="not even one sample fits"):
        fit(trained)
    assert memory.is_out_of_memory(MemoryError()) and not memory.is_out_of_memory(RuntimeError("shapes differ"))


class Dying(torch.utils.data.Dataset):
    """A data set whose loading process is killed, or that meets a damaged sample."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 50

    def __getitem__(self, i):
        if self.how == "killed":
            os.kill(os.getpid(), 9)
        raise UserError("cat/3.png: truncated image.")


def test_a_killed_loading_process_is_one_message():
    trained, _ = job(dataset=Dying("killed"), workers=1)
    with pytest.raises(
        RunError, match=r"(?s)DataLoader worker.*data\.workers below 1.*The same command resumes the run"
    ):
        fit(trained)


def test_a_bad_sample_in_a_loading_process_is_the_message_alone():
    trained, _ = job(dataset=Dying("bad"), workers=1)
    with pytest.raises(UserError, match=r"^cat/3.png: truncated image\.$"):
        fit(trained)


# ---------------------------------------------------------------------------- the disk, through a whole run


def _shim(monkeypatch, shim):
    for module in (storage, checkpoint, runlog):
        monkeypatch.setattr(module, "os", shim)


def _run(folder):
    return small_runs.pipeline(ONE_EPOCH, ONE_EPOCH, checkpoint_every=3).run(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An undisturbed run and its number of calls that change the disk."""
    shim = FaultyOs()
    with pytest.MonkeyPatch.context() as patch:
        small_runs.only_training(patch)
        _shim(patch, shim)
        return _run(tmp_path_factory.mktemp("reference") / "whole"), shim.calls


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "cut before", "cut after"])
def test_a_fault_at_any_call_of_a_run_leaves_a_run_that_goes_on_to_the_same_bits(
    fault, reference, tmp_path, monkeypatch
):
    """At a few calls; at every one, below Python and with the export: `python -m tests.faults --every-call`."""
    small_runs.only_training(monkeypatch)
    whole, calls = reference
    for at in range(3, calls, calls // 4):
        folder = tmp_path / f"at{at}"
        shim = FaultyOs(at, None if isinstance(fault, str) else fault, after=fault == "cut after")
        _shim(monkeypatch, shim)
        try:
            result = _run(folder)
        except (RunError, UserError) as error:
            assert not isinstance(fault, str)
            assert os.strerror(fault) in str(error)
            result = None
        except PowerCut:
            result = None
        _shim(monkeypatch, os)
        result = result or _run(folder)
        assert small_runs.same(whole, result), f"a fault at call {at} changed the result"


def test_a_read_only_folder_is_refused_before_anything_runs(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    _shim(monkeypatch, FaultyOs(0, errno.EROFS))
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\).*Nothing was run"):
        _run(tmp_path / "run")


def test_a_disk_that_fills_outside_the_checkpoints_is_a_run_error(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)

    def full(*measured):
        raise OSError(errno.ENOSPC, "No space left on device", "model.onnx")

    monkeypatch.setattr("flatcompress.pipeline.measure", full)
    with pytest.raises(RunError, match=r"model.onnx: cannot be written .*Every checkpoint is kept. Free some space"):
        _run(tmp_path / "run")


@pytest.mark.slow
def test_a_file_size_limit_strikes_every_writer_and_the_run_goes_on_without_it(tmp_path):
    """RLIMIT_FSIZE is a full disk that no shim is needed for: it also strikes the ONNX writer and the report."""
    from faults import RECIPE

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    words = [sys.executable, "-m", "flatcompress", "run", str(recipe), "-o", str(tmp_path / "run"), "-q"]
    for limit in (300, 2_000, 6_000, 20_000, 60_000):
        done = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda most=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        )
        assert done.returncode in (2, 3), done.stderr
        assert "Traceback" not in done.stderr and "File too large" in done.stderr
    assert subprocess.run(words, cwd=ROOT).returncode == 0
    assert (tmp_path / "run" / "model.onnx").exists()


def test_an_interruption_is_said_with_the_way_on(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)

    def stop(event):
        if event["event"] == "epoch":
            os.kill(os.getpid(), 15)

    with pytest.raises(Interrupted, match=r"stopped after step 6; everything is saved. The same call resumes the run"):
        small_runs.pipeline(small_runs.TRAIN).run(tmp_path / "run", display=stop)
    result = small_runs.pipeline(small_runs.TRAIN).run(tmp_path / "run")
    assert small_runs.same(small_runs.pipeline(small_runs.TRAIN).run(tmp_path / "whole"), result)
