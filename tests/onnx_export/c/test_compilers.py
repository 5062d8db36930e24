from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from c_nets import NETS, made, wrong

from flatcompress.onnx_export.c import build

WARNINGS = ("-std=c99", "-pedantic", *build.WARNINGS)
ARM = ("arm-none-eabi-gcc", "-mthumb")
CLANG_ARM = ("clang", "--target=arm-none-eabi")
TARGETS = {
    "gcc x86-64": ("gcc",),
    "gcc -O3": ("gcc", "-O3"),
    "clang x86-64": ("clang",),
    "gcc M0": (*ARM, "-mcpu=cortex-m0"),
    "gcc M3": (*ARM, "-mcpu=cortex-m3"),
    "gcc M4": (*ARM, "-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    "gcc M33": (*ARM, "-mcpu=cortex-m33"),
    "gcc M55": (*ARM, "-mcpu=cortex-m55", "-mfloat-abi=hard", "-O3"),
    "clang M0": (*CLANG_ARM, "-mcpu=cortex-m0"),
    "clang M4": (*CLANG_ARM, "-mcpu=cortex-m4", "-mfloat-abi=hard"),
    "clang M55": (*CLANG_ARM, "-mcpu=cortex-m55", "-mfloat-abi=hard"),
    "gcc RV32": ("riscv64-unknown-elf-gcc", "-march=rv32imac", "-mabi=ilp32"),
    "clang RV32": ("clang", "--target=riscv32-unknown-elf", "-march=rv32imac"),
}


def here(compiler: str) -> bool:
    return shutil.which(compiler) is not None


def listed(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """C that between them uses every kernel, each where it is written for its own name."""
    found = {}
    for name, (kind, shape) in NETS.items():
        for bits, sparsity in ((4, 0.0), (3, 0.85)):
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp("c") / f"{name}.onnx"
            found[name, bits] = made(kind(), shape, bits, 4 if bits == 4 else 8, path, sparsity=sparsity)
        for bits, sparsity in ((4, 0.0), (4, 0.85)):
            path = tmp_path_factory.mktemp("c") / f"{name}.onnx"
            key = name, f"packed {sparsity}"
            found[key] = made(kind(), shape, bits, 4, path, sparsity=sparsity, pack_activations=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_compiler_is_without_a_warning(target, folders, tmp_path):
    compiler, *flags = TARGETS[target]
    if not here(compiler):
        pytest.skip(f"{compiler} not installed")
    for (name, bits), exported in folders.items():
        out = tmp_path / f"{name}_{bits}.o"
        line = [compiler, "-O2", *flags, *WARNINGS, "-ffreestanding", "-fno-pic"]
        done = subprocess.run(
            [*line, "-c", str(exported.c.folder / f"{name}.c"), "-o", str(out)], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gcc x86-64", "gcc M4", "gcc RV32"])
def test_a_model_is_constant_and_takes_no_memory_of_its_own(target, folders, tmp_path):
    compiler, *flags = TARGETS[target]
    tools = compiler.removesuffix("gcc")
    if not here(compiler) or not here(f"{tools}objdump"):
        pytest.skip(f"{compiler} not installed")
    for (name, bits), exported in folders.items():
        out = tmp_path / f"{name}_{bits}.o"
        line = [compiler, "-O2", *flags, "-std=c99", "-ffreestanding", "-fno-pic", "-c"]
        subprocess.run([*line, str(exported.c.folder / f"{name}.c"), "-o", str(out)], check=True)
        rows = [row.split() for row in listed(f"{tools}objdump", "-h", str(out)).splitlines()]
        sizes = {row[1]: int(row[2], 16) for row in rows if len(row) > 2 and row[0].isdigit()}
        written = {section: size for section, size in sizes.items() if section.startswith((".data", ".bss", ".sdata"))}
        assert sum(written.values()) == 0
        assert sum(size for section, size in sizes.items() if section.startswith(".rodata")) > 0
        defined = [row.split() for row in listed(f"{tools}nm", "-g", "--defined-only", str(out)).splitlines()]
        assert [row[-1] for row in defined] == [f"{name}_run"]


@pytest.mark.slow
@pytest.mark.skipif(not here("make") or not here("gcc"), reason="no make or gcc on this machine")
def test_the_makefile_builds_library_and_example(folders):
    exported = folders["line", 4]
    listed("make", "-C", str(exported.c.folder), "CFLAGS=-O1 -Wall -Wextra -Wconversion -Werror")
    rows = listed(str(exported.c.folder / "example")).splitlines()
    assert len(rows) == exported.c.outputs


def sanitizes(compiler: str, folder: Path) -> bool:
    """Whether the compiler's sanitizers are installed: clang's are a package of their own."""
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    line = [compiler, *build.SANITIZERS, str(folder / "empty.c"), "-o", str(folder / "empty")]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def any_float(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Random bits as floats: NaN of every kind, infinities, subnormal numbers; the second half of usual size."""
    generator = np.random.default_rng(7)
    x = generator.integers(0, 1 << 32, (count, *shape), dtype=np.uint64).astype(np.uint32).view(np.float32).copy()
    half = count // 2
    exponents = generator.uniform(-6, 6, (count - half, *shape))
    x[half:] = np.sign(generator.normal(size=exponents.shape)) * 2.0**exponents
    ties = generator.random(exponents.shape) < 0.2  # a whole number and a half, where rounding decides
    x[half:][ties] = np.round(x[half:][ties]) + 0.5
    return x


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", [("-O3",), ("-O1", *build.SANITIZERS)], ids=["O3", "sanitizers"])
def test_any_float_gives_onnxruntimes_bits(compiler, flags, folders, tmp_path, monkeypatch):
    if not here(compiler):
        pytest.skip(f"{compiler} not installed")
    if "-g" in flags and not sanitizes(compiler, tmp_path):
        pytest.skip(f"{compiler} has no sanitizers here")
    monkeypatch.setenv("CC", compiler)
    for (name, _), exported in folders.items():
        assert wrong(exported, any_float(NETS[name][1], 600), flags) == []
