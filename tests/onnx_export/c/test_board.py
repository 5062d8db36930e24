from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import torch
from c_nets import NETS, made, samples

from flatcompress.onnx_export.c import board, build
from flatcompress.onnx_export.c.model import bit_equal
from flatcompress.onnx_export.proof.parity import reference_outputs

pytestmark = pytest.mark.slow
needs_board = pytest.mark.skipif(board.missing() is not None, reason=f"{board.missing()}")
CORES = [
    pytest.param(core, marks=pytest.mark.skipif(board.missing(core) is not None, reason=f"{board.missing(core)}"))
    for core in board.BOARDS
]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "packed"])
@pytest.mark.parametrize(("name", "sparsity"), [("deep", 0.0), ("residual", 0.0), ("residual", 0.85), ("line", 0.0)])
def test_every_output_bit_is_right_on_an_emulated_core(core, name, sparsity, packed, tmp_path):
    kind, shape = NETS[name]
    torch.manual_seed(0)
    exported = made(kind(), shape, 4, 4, tmp_path / "m.onnx", sparsity=sparsity, pack_activations=packed)
    x = samples(shape, 6)[[0, 1, 4, 5]]  # without infinities and NaN, which torch's reference does not know
    flags = ("-O3",) if core == "m55-helium" else ("-O2",)
    found = board.measure(exported.c.folder, "m", x, exported.c.outputs, core, flags)
    assert bit_equal(found.outputs, reference_outputs(exported.reference, [torch.from_numpy(x)])).all()
    assert found.flash > 0 and 0 < found.stack < 2000
    spread = 0.05 if core in ("m0", "m3", "m4", "m7") else 0.2  # vectors and floats in software follow the data
    divisions = 130 * x[0].size if core in ("m0", "m3") else 0  # what one of an input, in software, varies by
    assert max(found.instructions) - min(found.instructions) < spread * max(found.instructions) + divisions
    libraries = [name for name in found.linked if not name.endswith(".o")]
    assert {"model.o", "main.o"} <= set(found.linked)
    assert all(name.startswith("libgcc.a(") for name in libraries)
    assert not libraries or core in ("m0", "m3", "rv32")  # what these have no instructions for


@needs_board
def test_two_models_run_in_one_image_over_one_arena(tmp_path):
    x, made_models, expected = samples(NETS["line"][1], 6)[[0, 1, 4, 5]], {}, []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        made_models[name] = made(NETS["line"][0](), NETS["line"][1], 4, 4, tmp_path / name / f"{name}.onnx")
        expected.append(reference_outputs(made_models[name].reference, [torch.from_numpy(x)]))
    arena = max(exported.c.figures["ram_bytes"] for exported in made_models.values())
    (tmp_path / "both.h").write_text(
        f"#define BOTH_ARENA_BYTES {arena}u\n#define BOTH_OUTPUT_COUNT 6u\n"
        "int both_run(const float *in, float *out, void *arena);\n"
    )
    (tmp_path / "both.c").write_text(
        '#include "both.h"\n#include "first.h"\n#include "second.h"\n'
        "int both_run(const float *in, float *out, void *arena)\n"
        "{\n    return first_run(in, out, arena) + second_run(in, &out[3], arena);\n}\n"
    )
    sources = tuple(exported.c.folder / f"{name}.c" for name, exported in made_models.items())
    found = board.measure(tmp_path, "both", x, 6, beside=sources)
    assert found.linked == ["first.o", "main.o", "model.o", "second.o"]
    assert bit_equal(found.outputs, np.concatenate(expected, 1)).all()


@pytest.mark.skipif(build.compiler() is None or shutil.which("nm") is None, reason="no C compiler on this machine")
def test_two_models_share_a_program_and_name_nothing_but_themselves(tmp_path):
    objects = []
    for name in ("first", "second"):
        exported = made(NETS["line"][0](), NETS["line"][1], 4, 4, tmp_path / name / f"{name}.onnx")
        objects.append(tmp_path / f"{name}.o")
        line = [build.compiler(), "-std=c99", "-c", str(exported.c.folder / f"{name}.c"), "-o", str(objects[-1])]
        subprocess.run(line, check=True)
        listed = subprocess.run(["nm", "-g", str(objects[-1])], capture_output=True, text=True, check=True)
        seen = listed.stdout.splitlines()
        assert [row.split()[-1] for row in seen if " T " in row or " D " in row or " B " in row] == [f"{name}_run"]
        assert not [row for row in seen if " U " in row]  # no library
    joined = tmp_path / "both.o"
    subprocess.run([build.compiler(), "-r", "-nostdlib", *map(str, objects), "-o", str(joined)], check=True)
    assert joined.is_file()
