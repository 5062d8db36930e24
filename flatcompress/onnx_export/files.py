"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from flatcompress.errors import RunError, UserError

_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # not what the user asked for


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it there, so that a reader never sees half. RunError when the disk
    is full or failing, UserError when the place is not writable."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or the name may outlive a power cut that the bytes do not
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in _MACHINE:
            raise RunError(f"{path}: cannot be written ({error}). Mend that and run it again.") from None
        raise UserError(f"{path}: cannot be written ({error}).") from None
