"""Where a figure was measured and with what: the machine, its processor, the versions of packages."""

from __future__ import annotations

import gc
import os
import platform
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flatcompress


def command() -> str:
    """What to type for this program: its name, or the path that it was called by where the name alone is not found."""
    called = sys.argv[0] if sys.argv else ""
    named = Path(called).stem == "flatcompress" and Path(called).is_file()
    return shlex.quote(called) if named and shutil.which("flatcompress") is None else "flatcompress"


def processor() -> str:
    """The processor's name as the system gives it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Operating system, processor and number of its cores."""
    return {"platform": platform.platform(terse=True), "processor": processor(), "cores": os.cpu_count()}


def process_is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number, whoever's it is; a number that none can have counts as one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed ``packages`` by name; one that has none is left out with a warning.

    >>> list(versions("flatcompress", "torch"))
    ['flatcompress', 'torch']
    """
    found = {name: _version(name) for name in packages}
    for name in [name for name, version in found.items() if version is None]:
        warnings.warn(f"package {name} has no metadata; its version is not recorded", stacklevel=2)
    return {name: version for name, version in found.items() if version is not None}


def of_run(device: str, processes: int) -> dict[str, Any]:
    """Versions and machine of a training run, for its log and certificate."""
    import torch  # not at the top: `flatcompress --help` answers without it

    packages = ("flatcompress", "torch", "torch-pruning", "brevitas", "onnx", "onnxruntime", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "packages": versions(*packages),
    }


def _version(name: str) -> str | None:
    if name == "flatcompress":
        return flatcompress.__version__
    from importlib import metadata  # not at the top, nor ctypes below: `flatcompress --help` needs neither

    loaded = vars(sys.modules.get(name.replace("-", "_"), object)).get("__version__")
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:  # the same module comes in packages of other names, as onnxruntime-gpu
        return loaded
    # torch's own has the build, +cu124, which the package's leaves out
    return loaded if isinstance(loaded, str) and loaded.partition("+")[0] == installed else installed


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next tensors, where the C library is glibc; whether it does.

    glibc gives every large block back to the system, so each activation is faulted in page by page: on EfficientNet at
    224 pixels that took two thirds of the processor time of a forward pass.
    """
    settings = _glibc("mallopt")
    if settings is None:
        return False
    most, trim, pad = -3, -1, -2  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all(settings(name, value) for name, value in ((most, 1 << 30), (trim, (1 << 31) - 1), (pad, 64 << 20)))


def give_back_memory() -> bool:
    """Give the system what this process has freed, where the C library is glibc; whether it can.

    For between two kinds of work: what one has left in pieces the other would not fit into, and take more beside it.
    """
    trim = _glibc("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def _glibc(name: str) -> Any:
    """The C library's function, None where that is not glibc."""
    import ctypes

    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


@contextmanager
def settled() -> Iterator[None]:
    """Inside, the garbage collector passes over what was there before: half a million objects of modules, mostly."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
