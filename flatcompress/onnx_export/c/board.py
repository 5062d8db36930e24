"""A C model on an emulated microcontroller: flash, stack and instructions of one inference, and its output bits.

Needs ``arm-none-eabi-gcc`` and ``qemu-system-arm`` (Debian: gcc-arm-none-eabi and qemu-system-arm without recommended
packages); no C library. QEMU counts instructions, not cycles: flash wait states and multi-cycle loads are not in them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import RunError, UserError

GCC, QEMU = "arm-none-eabi-gcc", "qemu-system-arm"


@dataclass(frozen=True)
class Board:
    """A core, how to compile for it, and QEMU's machine. ``instructions``: of one SysTick tick with -icount shift=0."""

    name: str
    flags: tuple[str, ...]
    machine: str
    code: int = 0
    data: int = 0x20000000
    instructions: float = 40.0


BOARDS = {
    board.name: board
    for board in (
        Board("m0", ("-mcpu=cortex-m0", "-mfloat-abi=soft"), "mps2-an385"),  # v6-M code, which an M3 runs
        Board("m3", ("-mcpu=cortex-m3", "-mfloat-abi=soft"), "mps2-an385"),
        Board("m4", ("-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "mps2-an386"),
        Board("m7", ("-mcpu=cortex-m7", "-mfloat-abi=hard", "-mfpu=fpv5-d16"), "mps2-an500"),
        Board("m33", ("-mcpu=cortex-m33", "-mfloat-abi=hard"), "mps2-an505", 0x10000000, 0x38000000, 50.0),
        Board("m55", ("-mcpu=cortex-m55+nomve", "-mfloat-abi=hard"), "mps3-an547", 0, 0x20000000, 31.25),
    )
}


@dataclass
class Measured:
    """flash: bytes that the model adds to an image. stack: bytes. instructions: of each sample. outputs: [N, count]."""

    flash: int
    stack: int
    instructions: list[int]
    outputs: NDArray[np.float32]


def missing() -> str | None:
    """What of the toolchain is not here, or None."""
    lacking = [name for name in (GCC, QEMU) if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else None


def measure(
    folder: Path,
    name: str,
    samples: NDArray[np.float32],
    count: int,
    board: str = "m4",
    flags: tuple[str, ...] = ("-O2",),
) -> Measured:
    """Compile the model ``name`` in ``folder`` for a board and run it on samples [N, ...]; count: outputs of one.

    UserError without the toolchain; RunError when it does not compile, stops, or prints something else.
    """
    if (lacking := missing()) is not None:
        raise UserError(f"{lacking}: needed to run C on an emulated {board}.")
    chosen = BOARDS[board]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        rows = ",\n".join("{" + ",".join(_float(v) for v in row.reshape(-1)) + "}" for row in samples)
        size = int(np.prod(samples.shape[1:]))
        text = f"#define SAMPLES {len(samples)}u\nstatic const float samples[SAMPLES][{size}] = {{{rows}}};\n"
        (work / "samples.h").write_text(text, encoding="utf-8")
        model, empty = (_image(folder, name, work, chosen, flags, stub) for stub in (False, True))
        text_out = _emulate(model, chosen)
        return _parse(text_out, chosen, len(samples), count, _bytes(model) - _bytes(empty))


def _float(value: np.floating) -> str:
    number = float(value)
    if np.isnan(number) or np.isinf(number):
        return '__builtin_nanf("")' if np.isnan(number) else f"{'-' if number < 0 else ''}__builtin_inff()"
    return number.hex() + "f"


def _image(folder: Path, name: str, work: Path, board: Board, flags: tuple[str, ...], stub: bool) -> Path:
    """An ELF with the model, or with a run that does nothing, for what the harness takes itself."""
    upper, target = name.upper(), work / ("empty.elf" if stub else "model.elf")
    source = folder / f"{name}.c"
    if stub:
        source = work / "empty.c"
        source.write_text(
            f'#include "{name}.h"\nint {name}_run(const float *in, float *out, void *arena)'
            "{ (void)in; (void)out; (void)arena; return 0; }\n",
            encoding="utf-8",
        )
    defines = {
        "HOST_HEADER": f'"{name}.h"',
        "HOST_RUN": f"{name}_run",
        **{f"HOST_{part}": f"{upper}_{part}" for part in ("ARENA_BYTES", "OUTPUT_COUNT")},
    }
    harness = resources.files(__package__) / "harness"
    script = (harness / "board.ld").read_text(encoding="utf-8")
    script = script.replace("CODE_AT", hex(board.code)).replace("DATA_AT", hex(board.data))
    (work / "board.ld").write_text(script, encoding="utf-8")
    with resources.as_file(harness / "board.c") as main:
        common = [GCC, "-std=c99", *board.flags, "-mthumb", "-ffreestanding", "-ffunction-sections", *flags]
        common += [*(f"-D{key}={value}" for key, value in defines.items()), f"-I{folder}", f"-I{work}"]
        _run([*common, "-c", str(source), "-o", str(work / "model.o")])
        _run([*common, "-std=gnu99", "-O1", "-c", str(main), "-o", str(work / "main.o")])
    objects = [str(work / "model.o"), str(work / "main.o")]
    link = [GCC, *board.flags, "-mthumb", "-nostdlib", "-Wl,--gc-sections", "-T", str(work / "board.ld"), *objects]
    _run([*link, "-lgcc", "-o", str(target)])
    return target


def _run(line: list[str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{line[0]} stopped with {done.returncode}:\n{done.stderr[:4000]}")
    return done.stdout + done.stderr


def _bytes(image: Path) -> int:
    """Of code and constants."""
    return int(_run(["arm-none-eabi-size", str(image)]).splitlines()[1].split()[0])


def _emulate(image: Path, board: Board) -> str:
    line = [
        QEMU,
        "-machine",
        board.machine,
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "none",
        "-icount",
        "shift=0",
    ]
    line += ["-semihosting-config", "enable=on,target=native", "-kernel", str(image)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=900, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RunError(f"{image.name}: no end after 900 s on {board.machine}.") from None
    return done.stdout + done.stderr


def _parse(text: str, board: Board, samples: int, count: int, flash: int) -> Measured:
    found = {key: [int(v, 16) for v in re.findall(rf"^{key} (\w+)$", text, re.M)] for key in ("ticks", "stack", "out")}
    if (len(found["ticks"]), len(found["out"])) != (samples, samples * count):
        raise RunError(f"the emulated {board.name} printed something else:\n{text[:1000]}")
    outputs = np.array(found["out"], np.uint32).view(np.float32).reshape(samples, count)
    return Measured(flash, max(found["stack"]), [round(t * board.instructions) for t in found["ticks"]], outputs)
