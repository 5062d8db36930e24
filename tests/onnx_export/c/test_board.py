from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from c_nets import NETS, made, samples

from flatcompress.onnx_export.c import board, build
from flatcompress.onnx_export.c.model import bit_equal
from flatcompress.onnx_export.proof.parity import reference_outputs

pytestmark = pytest.mark.slow
needs_board = pytest.mark.skipif(board.missing() is not None, reason=f"{board.missing()}")


@needs_board
@pytest.mark.parametrize("core", ["m0", "m3", "m4", "m7"])
@pytest.mark.parametrize(("name", "sparsity"), [("deep", 0.0), ("residual", 0.0), ("residual", 0.85), ("line", 0.0)])
def test_every_output_bit_is_right_on_an_emulated_core(core, name, sparsity, tmp_path):
    kind, shape = NETS[name]
    torch.manual_seed(0)
    exported = made(kind(), shape, 4, 4, tmp_path / "m.onnx", sparsity=sparsity)
    x = samples(shape, 6)[[0, 1, 4, 5]]  # without infinities and NaN, which torch's reference does not know
    found = board.measure(exported.c.folder, "m", x, exported.c.outputs, core)
    assert bit_equal(found.outputs, reference_outputs(exported.reference, [torch.from_numpy(x)])).all()
    assert found.flash > 0 and 0 < found.stack < 2000
    assert max(found.instructions) - min(found.instructions) < 0.05 * max(found.instructions)


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
