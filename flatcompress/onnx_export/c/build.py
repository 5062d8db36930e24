"""Compile a C folder with the machine's own compiler and run it on samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import RunError

WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def compiler() -> str | None:
    """$CC, gcc, clang or cc, whichever is there first."""
    names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def version(command: str) -> str:
    """The first line of ``--version``."""
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0] if done.returncode == 0 else command


def host_program(folder: Path, name: str, target: Path, command: str, flags: tuple[str, ...] = ("-O2",)) -> None:
    """An executable that reads samples and writes outputs. RunError with the compiler's words where it fails."""
    upper = name.upper()
    harness = resources.files(__package__) / "harness" / "host.c"
    with resources.as_file(harness) as source:
        defines = {
            "HOST_HEADER": f'"{name}.h"',
            "HOST_RUN": f"{name}_run",
            **{f"HOST_{part}": f"{upper}_{part}" for part in ("ARENA_BYTES", "INPUT_COUNT", "OUTPUT_COUNT")},
        }
        line = [command, "-std=c99", *flags, *(f"-D{key}={value}" for key, value in defines.items())]
        line += [f"-I{folder}", str(folder / f"{name}.c"), str(source), "-o", str(target)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{folder / name}.c does not compile with {command}:\n{done.stderr[:4000]}")


def traced() -> tuple[str, ...]:
    """Flags with which a model writes every step's result before its outputs, where it was written to be traced."""
    return ("-include", str(resources.files(__package__) / "harness" / "trace.h"))


def outputs(program: Path, samples: NDArray[np.float32], count: int, kind: type = np.float32) -> NDArray[Any]:
    """The program's outputs [N, count] for float32 samples [N, ...], as numbers of ``kind``."""
    data = np.ascontiguousarray(samples, np.float32).tobytes()
    done = subprocess.run([str(program)], input=data, capture_output=True, check=False)
    if done.returncode:
        raise RunError(f"the C model stopped with {done.returncode}: {done.stderr[-2000:].decode(errors='replace')}")
    return np.frombuffer(done.stdout, kind).reshape(len(samples), count)


def run_here(
    folder: Path, name: str, samples: NDArray[np.float32], count: int, flags: tuple[str, ...] = ("-O2",)
) -> tuple[NDArray[np.float32], str] | None:
    """Compile and run; (outputs, compiler). None where this machine has no C compiler."""
    command = compiler()
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "model"
        host_program(folder, name, program, command, flags)
        return outputs(program, samples, count), version(command)
