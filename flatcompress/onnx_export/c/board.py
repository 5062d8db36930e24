"""A C model on an emulated microcontroller: flash, stack and instructions of one inference, and its output bits.

Needs ``arm-none-eabi-gcc`` and ``qemu-system-arm`` (Debian: gcc-arm-none-eabi and qemu-system-arm without recommended
packages), for RISC-V ``riscv64-unknown-elf-gcc`` and ``qemu-system-riscv32`` (gcc-riscv64-unknown-elf and
qemu-system-misc); no C library. QEMU counts instructions, not cycles: flash wait states and multi-cycle loads are not
in them.
"""

from __future__ import annotations

import itertools
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

ARM, ARM_QEMU = "arm-none-eabi-", "qemu-system-arm"
RISCV, RISCV_QEMU = "riscv64-unknown-elf-", "qemu-system-riscv32"


@dataclass(frozen=True)
class Board:
    """A core, how to compile for it, and QEMU's machine. ``instructions``: of one tick with -icount shift=0.

    ``memory``: bytes of each of code and data, as a linker script says it.
    ``tools``: what the names of gcc and its companions begin with.
    """

    name: str
    flags: tuple[str, ...]
    machine: str
    code: int = 0
    data: int = 0x20000000
    instructions: float = 40.0
    memory: str = "4M"
    tools: str = ARM
    qemu: str = ARM_QEMU

    @property
    def compile(self) -> list[str]:
        """gcc with the core's flags."""
        return [f"{self.tools}gcc", *self.flags, *(("-mthumb",) if self.tools == ARM else ())]


# A RISC-V core without a unit for floats, as in the smallest boards; its instructions are counted one by one.
_RV32 = ("-march=rv32imac", "-mabi=ilp32", "-mcmodel=medany", "-msmall-data-limit=0", "-mno-relax")
BOARDS = {
    board.name: board
    for board in (
        Board("m0", ("-mcpu=cortex-m0", "-mfloat-abi=soft"), "mps2-an385"),  # v6-M code, which an M3 runs
        Board("m3", ("-mcpu=cortex-m3", "-mfloat-abi=soft"), "mps2-an385"),
        Board("m4", ("-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "mps2-an386"),
        Board("m7", ("-mcpu=cortex-m7", "-mfloat-abi=hard", "-mfpu=fpv5-d16"), "mps2-an500"),
        Board("m33", ("-mcpu=cortex-m33", "-mfloat-abi=hard"), "mps2-an505", 0x10000000, 0x38000000, 50.0),
        Board("m55", ("-mcpu=cortex-m55+nomve", "-mfloat-abi=hard"), "mps3-an547", 0, 0x20000000, 31.25, "512K"),
        # With Helium: gcc makes vectors of loops at -O3.
        Board("m55-helium", ("-mcpu=cortex-m55", "-mfloat-abi=hard"), "mps3-an547", 0, 0x20000000, 31.25, "512K"),
        Board("rv32", _RV32, "virt", 0x80000000, 0x80400000, 1.0, "4M", RISCV, RISCV_QEMU),
    )
}


@dataclass
class Measured:
    """flash: bytes that the model adds to an image. stack: bytes. instructions: of each sample. outputs: [N, count].

    linked: what the linker's map names: object files, and members of libraries as ``library(member)``.
    steps: instructions of each step of the first sample, where they were asked for.
    """

    flash: int
    stack: int
    instructions: list[int]
    outputs: NDArray[np.float32]
    linked: list[str]
    steps: list[int]


def missing(board: str | Board = "m4") -> str | None:
    """What of a board's toolchain is not here, or None."""
    chosen = board if isinstance(board, Board) else BOARDS[board]
    lacking = [name for name in (chosen.compile[0], chosen.qemu) if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else None


def measure(
    folder: Path,
    name: str,
    samples: NDArray[np.float32],
    count: int,
    board: str | Board = "m4",
    flags: tuple[str, ...] = ("-O2",),
    beside: tuple[Path, ...] = (),
    steps: bool = False,
) -> Measured:
    """Compile the model ``name`` in ``folder`` for a board and run it on samples [N, ...]; count: outputs of one.

    beside: further C files of the image, whose folders' headers are found. steps: count every step's instructions too,
    to within what a tick holds. UserError without the toolchain; RunError when it does not compile, stops, or prints
    something else.
    """
    chosen = board if isinstance(board, Board) else BOARDS[board]
    if (lacking := missing(chosen)) is not None:
        raise UserError(f"{lacking}: needed to run C on an emulated {chosen.name}.")
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        rows = ",\n".join("{" + ",".join(_float(v) for v in row.reshape(-1)) + "}" for row in samples)
        size = int(np.prod(samples.shape[1:]))
        text = f"#define SAMPLES {len(samples)}u\nstatic const float samples[SAMPLES][{size}] = {{{rows}}};\n"
        (work / "samples.h").write_text(text, encoding="utf-8")
        includes = tuple(dict.fromkeys(f"-I{file.parent}" for file in beside))
        if steps:
            includes += ("-include", str(resources.files(__package__) / "harness" / "marks.h"))
        empty = _image(folder, name, work, chosen, (*flags, *includes), None)
        model = _image(folder, name, work, chosen, (*flags, *includes), beside)
        flash = _bytes(model, chosen) - _bytes(empty, chosen)
        return _parse(_emulate(model, chosen), chosen, (len(samples), count), flash, _linked(work))


def _float(value: np.floating) -> str:
    number = float(value)
    if np.isnan(number) or np.isinf(number):
        return '__builtin_nanf("")' if np.isnan(number) else f"{'-' if number < 0 else ''}__builtin_inff()"
    return number.hex() + "f"


def _image(
    folder: Path, name: str, work: Path, board: Board, flags: tuple[str, ...], beside: tuple[Path, ...] | None
) -> Path:
    """An ELF with the model; ``beside`` is None: with a run that does nothing, for what the harness takes itself."""
    upper, target = name.upper(), work / ("empty.elf" if beside is None else "model.elf")
    source = folder / f"{name}.c"
    if beside is None:
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
    for word, value in {"CODE_AT": hex(board.code), "DATA_AT": hex(board.data), "BYTES": board.memory}.items():
        script = script.replace(word, value)
    (work / "board.ld").write_text(script, encoding="utf-8")
    with resources.as_file(harness / "board.c") as main:
        common = [*board.compile, "-std=c99", "-ffreestanding", "-ffunction-sections", *flags]
        common += [*(f"-D{key}={value}" for key, value in defines.items()), f"-I{folder}", f"-I{work}"]
        sources = {source: "model.o", **{file: f"{file.stem}.o" for file in beside or ()}}
        for file, made in sources.items():
            _run([*common, "-c", str(file), "-o", str(work / made)])
        _run([*common, "-std=gnu99", "-O1", "-c", str(main), "-o", str(work / "main.o")])
    objects = [str(work / made) for made in (*sources.values(), "main.o")]
    link = [*board.compile, "-nostdlib", "-Wl,--gc-sections", f"-Wl,-Map={work / 'map'}", "-T", str(work / "board.ld")]
    _run([*link, *objects, "-lgcc", "-o", str(target)])
    return target


def _linked(work: Path) -> list[str]:
    """The files that the map places bytes of: those of ``work``, and what came from libraries."""
    text = (work / "map").read_text(encoding="utf-8").split("Linker script and memory map", 1)[1]
    placed = re.findall(r"^ (?:\.\S+)?\s+0x[0-9a-f]+\s+0x(?!0\s)[0-9a-f]+ (\S+)$", text, re.M)
    return sorted({Path(file).name for file in placed if "/" in file})


def _run(line: list[str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{line[0]} stopped with {done.returncode}:\n{done.stderr[:4000]}")
    return done.stdout + done.stderr


def _bytes(image: Path, board: Board) -> int:
    """Of code and constants."""
    return int(_run([f"{board.tools}size", str(image)]).splitlines()[1].split()[0])


def _emulate(image: Path, board: Board) -> str:
    line = [board.qemu, "-machine", board.machine, *(("-bios", "none") if board.tools == RISCV else ())]
    line += ["-display", "none", "-monitor", "none", "-serial", "none", "-icount", "shift=0"]
    line += ["-semihosting-config", "enable=on,target=native", "-kernel", str(image)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=900, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RunError(f"{image.name}: no end after 900 s on {board.machine}.") from None
    return done.stdout + done.stderr


def _parse(text: str, board: Board, shape: tuple[int, int], flash: int, linked: list[str]) -> Measured:
    found = {key: [int(v, 16) for v in re.findall(rf"^{key} (\w+)$", text, re.M)] for key in ("ticks", "stack", "out")}
    if (len(found["ticks"]), len(found["out"])) != (shape[0], shape[0] * shape[1]):
        raise RunError(f"the emulated {board.name} printed something else:\n{text[:1000]}")
    outputs = np.array(found["out"], np.uint32).view(np.float32).reshape(shape)
    instructions = [round(ticks * board.instructions) for ticks in found["ticks"]]
    marks = [int(v, 16) for v in re.findall(r"^mark (\w+)$", text, re.M)]
    steps = [round((after - before) * board.instructions) for before, after in itertools.pairwise([0, *marks])]
    return Measured(flash, max(found["stack"]), instructions, outputs, linked, steps)
