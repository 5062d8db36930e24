"""The run folder: where everything of one run lies, who may write there, and the ledger.

recipe.yaml  ledger.json  log.jsonl  report.html  model.onnx  certificate.json  preview.png  examples.json
checkpoints/<stage>/{plan.json,model.safetensors,state.json,...}  checkpoints/latest
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flatcompress import storage
from flatcompress.environment import process_is_alive
from flatcompress.errors import UserError, nearest
from flatcompress.store import checkpoint
from flatcompress.store.checkpoint import Checkpoint

LEDGER_SCHEMA = 1
_LOCK, _OWNER = ".lock", ".lock-owner.json"


class RunFolder:
    """One run's folder. Making the object touches nothing; `create` and `locked` do.

    >>> import tempfile
    >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "mine").create()
    >>> with folder.locked():
    ...     folder.write_ledger([{"stage": "train", "seconds": 1.5}])
    >>> folder.read_ledger()
    [{'stage': 'train', 'seconds': 1.5}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.ledger = self.path / "ledger.json"
        self.log = self.path / "log.jsonl"
        self.report = self.path / "report.html"
        self.onnx = self.path / "model.onnx"
        self.certificate = self.path / "certificate.json"
        self.preview = self.path / "preview.png"
        self.examples = self.path / "examples.json"
        self.checkpoints = self.path / "checkpoints"

    def create(self) -> RunFolder:
        """Make the folder and prove that it can be written. UserError before anything has run when it cannot."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"{storage.TEMPORARY_PREFIX}probe-{os.getpid()}"
            storage.write_bytes(probe, b"writable")
            os.unlink(probe)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written ({error.strerror or error}). "
                "Choose another one with 'output_dir' or make this one writable. Nothing was run."
            ) from None
        except ValueError as error:  # a NUL byte in the name
            raise UserError(f"{str(self.path)!r} is no folder name ({error}).") from None
        return self

    @contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the folder's lock, so that no second process writes here. The lock dies with its process.

        UserError that names the owner's process id when somebody else holds it. What a killed process left
        half-written is cleared away first.
        """
        lock = FileLock(str(self.path / _LOCK))
        self._acquire(lock)
        try:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            storage.write_json_atomic(self.path / _OWNER, owner)
            storage.remove_litter(self.path)
            checkpoint.recover(self.checkpoints)
            yield self
        finally:
            lock.release()

    def read_ledger(self) -> list[dict[str, Any]]:
        """The ledger's rows, one a finished stage; empty when there is none yet. UserError when it is damaged."""
        return read_ledger(self.ledger) if self.ledger.exists() else []

    def finished_stages(self) -> list[str]:
        """The ids of the finished stages that have a checkpoint here, like '1-prune', in order."""
        return checkpoint.finished_stages(self.checkpoints)

    def load(self, stage: str | None = None) -> Checkpoint:
        """The checkpoint of a finished stage, the last one when none is named. UserError names what there is."""
        names = self.finished_stages()
        if not names:
            raise UserError(f"{self.path}: no stage is finished yet.")
        if stage is not None and stage not in names:
            guess = nearest(stage, names)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise UserError(f"{self.path}: no finished stage {stage!r}.{hint} There are: {', '.join(names)}.")
        return checkpoint.load(self.checkpoints / (stage or names[-1]))

    def write_ledger(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the ledger by ``rows``, atomically. RunError when the disk refuses; the old ledger is then kept."""
        storage.write_json_atomic(
            self.ledger, {"schema": LEDGER_SCHEMA, "rows": list(rows)}, "The ledger before this stage is kept."
        )

    def write_recipe(self, text: str) -> None:
        """Replace recipe.yaml, atomically."""
        storage.write_text_atomic(self.recipe, text)

    def read_recipe(self) -> str | None:
        """The text of recipe.yaml, or None when there is none. UserError when it is no UTF-8 text."""
        if not self.recipe.exists():
            return None
        try:
            return storage.read_bytes(self.recipe, 4 << 20).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.recipe}: not UTF-8 text ({error}).") from None

    def _acquire(self, lock: FileLock) -> None:
        # An orphaned data-loader worker of a killed run holds the lock until it notices, at most a few seconds.
        deadline = time.monotonic() + 10
        while True:
            try:
                lock.acquire(timeout=0)
                return
            except Timeout:
                owner = self._owner()
                if _alive(owner) or time.monotonic() > deadline:
                    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                    raise UserError(
                        f"the run folder {self.path} is in use by {who}. Wait until it has ended, stop it, "
                        "or choose another run name or 'output_dir'."
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise UserError(f"the run folder {self.path} cannot be locked ({error}).") from None

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = storage.read_json(self.path / _OWNER, 1 << 12)
            return {"pid": int(owner["pid"]), "host": str(owner["host"])}
        except (UserError, TypeError, KeyError, ValueError, OverflowError):
            return None


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ledger.json. UserError when it is missing, damaged or of another schema."""
    raw = storage.read_json(path, 16 << 20)
    if not isinstance(raw, dict) or raw.get("schema") != LEDGER_SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path}: not a ledger of schema {LEDGER_SCHEMA} (found {json.dumps(found)[:80]}).")
    rows = raw.get("rows")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("stage"), str) for r in rows):
        raise UserError(f"{path}: 'rows' must be a list of objects that each name a 'stage'.")
    return rows


def _alive(owner: dict[str, Any] | None) -> bool:
    if owner is None or owner["host"] != socket.gethostname():
        return owner is not None
    return process_is_alive(owner["pid"])
