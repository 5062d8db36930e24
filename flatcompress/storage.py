"""Files that are either the old version or the new one, never something between.

Every change on disk that a run cares about goes through the few functions here: write to a temporary file in the
same folder, fsync it, rename it over the old one, fsync the folder. After a crash at any point a reader finds the
old bytes or the new bytes. All system calls are made as ``os.*`` of this module, so a test can make each fail in turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatcompress.errors import RunError, UserError

TEMPORARY_PREFIX = ".tmp-"
CACHE_VARIABLE = "FLATCOMPRESS_CACHE"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}  # the machine's trouble, not what the user asked for
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


def write_error(path: Path, error: OSError, kept: str = "") -> RunError:
    """The RunError for a write that failed: what, why, what is kept, how to go on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space and run the same command again."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Make the folder writable and run the same command again."
    else:
        advice = "Run the same command again once the disk is well."
    kept = kept or "The version of the file before this write is kept."
    return RunError(f"{path}: cannot be written ({error.strerror or error}). {kept} {advice}")


def write_bytes_atomic(path: str | Path, data: bytes, kept: str = "") -> None:
    """Replace ``path`` by ``data`` in one step that survives a crash; ``kept`` completes the error message.

    RunError when the disk is full, read-only or failing; the old file is then untouched.
    """
    path = Path(path)
    try:
        _replace(path, data)
    except OSError as error:
        raise write_error(path, error, kept) from error


def write_output(path: str | Path, data: bytes) -> None:
    """Write ``data``, whole or not at all, to a place that the user named; its folder is made.

    UserError when that place cannot be written to, RunError when the disk is full or failing.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        if error.errno in _DISK:
            raise write_error(path, error) from error
        raise UserError(f"{path}: cannot be written ({error}).") from None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        write_bytes(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        _unlink_quietly(temporary)
        raise


def write_text_atomic(path: str | Path, text: str, kept: str = "") -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"), kept)


def write_json_atomic(path: str | Path, value: Any, kept: str = "") -> None:
    """`write_text_atomic` of strict JSON (see `to_json`)."""
    write_text_atomic(path, to_json(value, indent=1) + "\n", kept)


def write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a new file; not atomic by itself. Raises the OSError as it comes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno in _NO_FOLDER_FSYNC:  # Windows cannot open a folder
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:  # some network file systems refuse; nothing better can be done
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a flat folder of plain files so that a crash leaves the whole folder or only temporary litter."""
    if not folder.name.startswith(TEMPORARY_PREFIX):
        litter = folder.with_name(f"{TEMPORARY_PREFIX}removed-{folder.name}-{os.getpid()}")
        if litter.exists():
            remove_folder(litter)
        os.replace(folder, litter)
        folder = litter
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            remove_folder(Path(entry.path))
        else:
            os.unlink(entry.path)
    os.rmdir(folder)


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``. Call it only while holding the run's lock."""
    if not folder.is_dir():
        return
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(TEMPORARY_PREFIX):
            try:
                if entry.is_dir(follow_symlinks=False):
                    remove_folder(Path(entry.path))
                else:
                    os.unlink(entry.path)
            except OSError:  # litter is harmless; a later call gets it
                continue


def read_bytes(path: str | Path, limit: int = 64 << 20) -> bytes:
    """The bytes of a regular file. UserError when it is missing, no plain file, unreadable or over ``limit`` bytes."""
    path = Path(path)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a FIFO would block for ever
            raise UserError(f"{path}: not a plain file.")
        if found.st_size > limit:
            raise UserError(f"{path}: {found.st_size} bytes, more than the {limit} allowed for such a file.")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: not found.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None


def read_json(path: str | Path, limit: int = 64 << 20) -> Any:
    """Strict JSON of a regular file. UserError for anything else (also NaN literals and absurd nesting)."""
    data = read_bytes(path, limit)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path}: not JSON ({error}).") from None


def sha256_file(path: Path, limit: int | None = None) -> str:
    """Hex digest of a file, read in pieces. UserError when it cannot be read or has over ``limit`` bytes."""
    digest = hashlib.sha256()
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a plain file.")
        if limit is not None and found.st_size > limit:
            raise UserError(f"{path}: {found.st_size} bytes, more than the {limit} allowed for such a file.")
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where figures and images that can be computed again are kept: ``FLATCOMPRESS_CACHE``, else the platform's place.

    UserError when the platform has none, as without a home folder.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    import platformdirs  # here: the command line's help does not wait for it

    found = platformdirs.user_cache_path("flatcompress", appauthor=False)
    if not found.is_absolute():
        raise UserError(f"no folder for caches ({found} is not absolute): set {CACHE_VARIABLE} to one.")
    return found


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON of plain data; numpy and tensor scalars become numbers, paths text.

    A number that is not finite becomes the text "NaN", "Infinity" or "-Infinity": JSON has no such numbers, and
    null means "not measured", which a diverged loss is not.

    >>> to_json({"loss": float("inf"), "val": None})
    '{"loss": "Infinity", "val": null}'
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """``value`` as JSON-able data (see `to_json`). TypeError for what has no such form."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unlink_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
