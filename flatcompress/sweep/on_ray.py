"""Runs on a Ray cluster: every job is a task that asks for CPUs and GPUs, in a folder that all machines reach.

A worker or a machine that is lost costs no run: its job is submitted again and goes on from the last checkpoint in the
storage. Runs use one thread each as the local pool's do, so a table is the same wherever its runs were computed, as
long as the processors are of one kind.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from flatcompress.errors import RunError, UserError
from flatcompress.sweep.executor import Executor, Job, LocalPool, Outcome, lost
from flatcompress.sweep.mirror import CHECKPOINTS, Copy, SharedFolder, opened
from flatcompress.sweep.spec import Resources
from flatcompress.sweep.worker import execute

ANSWER_SECONDS = 10.0  # that an address may take to answer
SAVE_SECONDS = 120.0  # that stopped runs may take to save
Show = Callable[[str], None]
PENDING = 256  # jobs given to Ray at a time: what does not fit waits there


class RayCluster:
    """Jobs as Ray tasks. ``on``: ``ray`` (RAY_ADDRESS, else a Ray of this process's own) or ``ray://HOST:PORT``.

    ``root``: where finished runs are on this machine. ``storage_path``: a folder or URL that every machine of the
    cluster reaches (None: ``root``, which is enough on one machine). ``resources``: of a run; ``device``: the
    recipe's. ``jobs``: CPUs of a Ray that is started here (None: all). ``ahead``: jobs taken beyond what fits now, so
    that a cluster that grows sees what waits. UserError: ray is not installed, nothing
    answers, the storage cannot be written, or no machine has such resources.
    """

    def __init__(
        self,
        root: Path,
        on: str = "ray",
        storage_path: str | None = None,
        resources: Resources | None = None,
        jobs: int | None = None,
        device: str = "auto",
        show: Show = lambda line: None,
        ahead: int = PENDING,
    ) -> None:
        self.root, self.on, self.show, self.jobs = root, on, show, jobs
        self.resources, self.device = resources or Resources(), device
        self.storage_path, self.ahead = storage_path, ahead
        self.slots = 1 + ahead
        self._running: dict[Any, Job] = {}
        self._losses: Counter[str] = Counter()
        self._ours = False

    def __enter__(self) -> Self:
        self.ray = imported()
        self.storage = opened(str(self.root.resolve()) if self.storage_path is None else self.storage_path)
        if not self.ray.is_initialized():
            connect(self.ray, self.on, self.jobs)
            self._ours = True
        try:
            self._fitting()
        except UserError:
            self.__exit__()
            raise
        self._task = self.ray.remote(run_job).options(num_cpus=self.resources.cpu, num_gpus=self.gpus, max_retries=0)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ours:
            self.ray.shutdown()

    def _fitting(self) -> None:
        """UserError where the cluster cannot do what is asked."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        wanted, there = self.resources.gpu, any(node["Resources"].get("GPU", 0) for node in nodes)
        if wanted is None:  # a task that asks for no GPU sees none: device auto would be the CPU without a word
            wanted = float(self.device.startswith("cuda") or (self.device == "auto" and there))
        self.gpus = wanted
        cpu, gpu = self.resources.cpu, self.gpus
        if not any(n["Resources"].get("CPU", 0) >= cpu and n["Resources"].get("GPU", 0) >= gpu for n in nodes):
            most = max((n["Resources"].get("GPU", 0), n["Resources"].get("CPU", 0)) for n in nodes) if nodes else (0, 0)
            raise UserError(
                f"no machine of the Ray cluster has the {cpu:g} CPUs and {gpu:g} GPUs that a run asks for (resources); "
                f"the largest has {most[1]:g} CPUs and {most[0]:g} GPUs."
            )
        per = [("CPU", cpu), *([("GPU", gpu)] if gpu else [])]
        self.slots = self.ahead + sum(int(min(n["Resources"].get(k, 0) / need for k, need in per)) for n in nodes)
        names = {node["NodeManagerHostname"] for node in nodes}
        if self.storage_path is None and names != {socket.gethostname()}:
            raise UserError(
                f"the Ray cluster has other machines than this one ({', '.join(sorted(names))}): give storage_path, a "
                "folder or URL that all of them reach (--storage-path s3://bucket/sweeps)."
            )

    def submit(self, job: Job) -> None:
        """Hand ``job`` to Ray; what this machine has of it, and the storage has not, goes to the storage first."""
        for name in (job.name, job.base):
            here = None if name is None else self.root / name
            if here is not None and not self._in_storage() and here.is_dir() and not self.storage.has(name):
                self.storage.push(here, name)
        self._running[self._task.remote(job.recipe, self.storage.url, job.name, job.base)] = job

    def _in_storage(self) -> bool:
        return self.storage.local is not None and self.storage.local.resolve() == self.root.resolve()

    def finished(self, timeout: float | None = None) -> list[Outcome]:
        """See `Executor`."""
        while self._running:
            ready, _ = self.ray.wait(list(self._running), num_returns=1, timeout=timeout)
            outcomes = [o for reference in ready if (o := self._outcome(reference)) is not None]
            if outcomes or not ready:
                return outcomes
        return []

    def _outcome(self, reference: Any) -> Outcome | None:
        """What has become of a job; None where it was submitted again."""
        job, errors = self._running.pop(reference), self.ray.exceptions
        try:
            problem = self.ray.get(reference)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.RaySystemError) as e:
            given_up = lost(job, self._losses)
            if given_up is not None:
                return job.key, given_up
            self.show(f"{job.name}: its worker was lost ({type(e).__name__}); it goes on from its last checkpoint")
            self.submit(job)
            return None
        except errors.TaskCancelledError:
            return job.key, "stopped"
        except errors.RayError as error:
            return job.key, str(error).strip().splitlines()[-1]
        if problem is None and not self._in_storage():
            self.storage.pull(job.name, self.root / job.name, without=None if job.whole else CHECKPOINTS)
        return job.key, problem

    def stop(self, told: bool) -> None:
        """See `Executor`: a cancelled task saves and ends as one that was interrupted."""
        for reference in self._running:
            self.ray.cancel(reference, force=False)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=SAVE_SECONDS)


def run_job(recipe: dict[str, Any], url: str, name: str, base: str | None) -> str | None:
    """What a task does: one run in the storage, or beside it and copied. What went wrong, or None."""
    import torch

    torch.set_num_threads(1)
    storage = SharedFolder(url)
    if storage.local is not None:
        return execute(recipe, str(storage.local / name), None if base is None else str(storage.local / base))
    try:
        with tempfile.TemporaryDirectory(prefix="flatcompress-") as scratch:
            folder, before = Path(scratch) / name, None if base is None else Path(scratch) / base
            storage.pull(name, folder)
            if base is not None and before is not None:
                storage.pull(base, before, part=CHECKPOINTS)
            folder.mkdir(exist_ok=True)
            with Copy(storage, folder, name):
                return execute(recipe, str(folder), None if before is None else str(before))
    except RunError as error:
        return str(error)


def executor(
    on: str,
    root: Path,
    jobs: int | None,
    storage_path: str | None,
    resources: Resources,
    device: str,
    show: Show,
    ahead: int = PENDING,
) -> Executor:
    """The executor that ``on`` names: local, ray or ray://HOST:PORT. UserError for anything else."""
    if on == "local":
        if storage_path is not None:
            raise UserError("storage_path is for --on ray: the local pool's runs are in the sweep's own folder.")
        return LocalPool(root, jobs or 1, show)
    return RayCluster(root, checked(on), storage_path, resources, jobs, device, show, ahead)


def imported() -> Any:
    """The package ray. UserError where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--on ray needs Ray: pip install 'flatcompress[ray]'.") from None
    return ray


def checked(on: str) -> str:
    """``on`` as it was given. UserError unless it is ray or ray://HOST:PORT."""
    if on != "ray":
        _host_and_port(on)
    return on


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not address.startswith("ray://") or not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--on {address}: expected local, ray, or ray://HOST:PORT (Ray's client port is 10001).")
    return host.strip("[]"), int(port)


def connect(ray: Any, on: str, jobs: int | None) -> None:
    """Open the connection, or start a Ray of this process's own. UserError, in bounded time, where none answers."""
    address = on if on != "ray" else os.environ.get("RAY_ADDRESS")
    if address is not None and ":" in address:
        _require_answer(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if on == "ray" and address is None:
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # of gRPC, of versions that differ, of a port where something else listens
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--on {on}: no Ray cluster could be used at {address or 'this machine'}: {reason[:300]}"
        ) from None


def _require_answer(address: str) -> None:
    host, port = _host_and_port(address if address.startswith("ray://") else f"ray://{address}")
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address} ({error.strerror or error}). Is Ray started there (ray start --head), and "
            "is the port Ray's client port, 10001 unless it was changed?"
        ) from None
