"""Run folders in a storage that machines share: a path, or any URL that fsspec opens (s3://, gs://, abfs://, ftp://).

Where the storage is a folder that everybody sees, runs are computed in it. Elsewhere a run is computed in a folder of
its machine and copied: what is there before it begins, what is new every few seconds while it runs, the rest after.
A checkpoint is a folder that never changes once it is complete and carries checksums, so a copy that was cut short is
passed over for the one before it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from flatcompress.errors import RunError, UserError
from flatcompress.storage import TEMPORARY_PREFIX
from flatcompress.store.checkpoint import PLAN

EVERY = 10.0  # seconds between two looks for something new to copy
CHECKPOINTS = "checkpoints"
_LAST = ("latest",)  # it says which checkpoints count: copied after them


class SharedFolder:
    """The folder ``url`` of a storage. UserError when it cannot be opened or written."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import fsspec
        except ModuleNotFoundError:
            raise UserError("a storage path needs fsspec: pip install 'flatcompress[ray]'.") from None
        try:
            self.files, found = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"storage_path {url!r} cannot be opened: {error}.") from None
        except Exception as error:  # every protocol has errors of its own
            raise UserError(f"storage_path {url!r} cannot be opened ({type(error).__name__}: {error}).") from None
        self.root = PurePosixPath(found)
        is_file = "file" in ([self.files.protocol] if isinstance(self.files.protocol, str) else self.files.protocol)
        self.local = Path(found) if is_file else None

    def probe(self) -> None:
        """Write and remove a file. UserError when that fails."""
        path = str(self.root / f"{TEMPORARY_PREFIX}probe")
        try:
            self.files.makedirs(str(self.root), exist_ok=True)
            self.files.pipe_file(path, b"writable")
            self.files.rm_file(path)
        except Exception as error:
            raise UserError(f"storage_path {self.url!r} cannot be written ({type(error).__name__}: {error}).") from None

    def has(self, name: str) -> bool:
        """Is there a folder ``name``?"""
        return bool(self.files.exists(str(self.root / name)))

    def pull(self, name: str, folder: Path, *, part: str = "", without: str | None = None) -> None:
        """Copy the folder ``name`` (or its ``part``) from the storage into ``folder``; nothing where there is none.

        ``without``: a folder in it that is left out, its plans excepted.
        """
        self.files.invalidate_cache()
        top = self.root / name
        if not self.files.exists(str(top / part)):
            return
        for found in self.files.find(str(top / part)):
            inside = PurePosixPath(self.files._strip_protocol(found)).relative_to(top)
            if without is None or inside.parts[0] != without or inside.name == PLAN:
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(found, str(target))

    def push(self, folder: Path, name: str) -> None:
        """Copy everything in ``folder`` to the folder ``name`` of the storage."""
        Copy(self, folder, name).push()


class Copy:
    """``folder`` kept equal to the storage's folder ``name`` while this is open, by a thread that looks regularly.

    RunError at the end where what is new could not be copied; until then a failed copy is a warning and tried again.
    """

    def __init__(self, storage: SharedFolder, folder: Path, name: str) -> None:
        self.storage, self.folder, self.top = storage, folder, storage.root / name
        self._known: dict[str, tuple[int, int]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Copy:
        self._known = dict(self._present())  # as it was pulled
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        try:
            self.push()
        except Exception as error:
            raise RunError(
                f"{self.folder.name}: could not be copied to {self.storage.url} ({type(error).__name__}: {error})."
            ) from error

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            try:
                self.push()
            except FileNotFoundError:  # an older checkpoint was removed while it was copied
                continue
            except Exception as error:
                warnings.warn(f"{self.folder.name}: not copied to {self.storage.url} yet ({error}).", stacklevel=2)

    def push(self) -> None:
        """Copy what is new or changed, then remove the checkpoints that are here no longer."""
        present = dict(self._present())
        for inside in sorted(present, key=lambda p: PurePosixPath(p).name in _LAST):
            if self._known.get(inside) != present[inside]:
                target = self.top / inside
                self.storage.files.makedirs(str(target.parent), exist_ok=True)
                self.storage.files.put_file(str(self.folder / inside), str(target))
                self._known[inside] = present[inside]
        gone = {PurePosixPath(*PurePosixPath(p).parts[:2]) for p in self._known if p not in present}
        for checkpoint in gone:
            if checkpoint.parts[0] == CHECKPOINTS and not (self.folder / checkpoint).exists():
                self._remove(str(self.top / checkpoint))
        self._known = {p: seen for p, seen in self._known.items() if p in present}

    def _remove(self, path: str) -> None:
        if self.storage.files.exists(path):
            self.storage.files.rm(path, recursive=True)

    def _present(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in self.folder.rglob("*"):
            inside = path.relative_to(self.folder)
            if not path.is_file() or any(part.startswith((TEMPORARY_PREFIX, ".")) for part in inside.parts):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            yield inside.as_posix(), (found.st_size, found.st_mtime_ns)


def opened(url: str) -> Any:
    """The `SharedFolder` at ``url``, which can be written."""
    folder = SharedFolder(url)
    folder.probe()
    return folder
