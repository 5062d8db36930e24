from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from c_nets import STRICT, block, made
from torch import nn
from torch.nn import functional as F

from flatcompress import models, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.c import board, build, checking, emit, folder, layout
from flatcompress.onnx_export.c.model import bit_equal
from flatcompress.onnx_export.proof.parity import reference_outputs

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
needs_board = pytest.mark.skipif(board.missing() is not None, reason=f"{board.missing()}")


OTHERS = ("gelu", "tanh", "tokens")


class Tokens(nn.Module):
    """Tokens through attention of two heads, a feed-forward part, and what comes after as ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * 0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        function = {"silu": F.silu, "tanh": torch.tanh}.get(self.kind, F.gelu)
        x = x + self.second(function(self.first(x)))
        if self.kind == "tokens":
            return self.head(x)
        return self.head(x[:, 0] if self.kind == "silu" else x.mean(1))


class Gated(nn.Module):
    """Squeeze and excite, functions of codes, a transposed convolution, a shuffle of channels, a slice and a flip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze = block(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.up = block(nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), nn.ReLU())
        self.mix = block(nn.ChannelShuffle(2), nn.Conv2d(6, 5, 1, bias=False), nn.ReLU())
        self.fc = nn.Linear(5 * 11 * 12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.mix(self.up(x * self.squeeze(x)))
        return self.fc(x[:, :, 1:].flip(3).flatten(1))


def pictures(count: int = 24, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


@needs_compiler
@pytest.mark.parametrize("bits", [(4, 8), pytest.param((8, 4), marks=pytest.mark.slow)])
def test_gates_tables_and_moves_give_every_bit(bits, tmp_path):
    torch.manual_seed(0)
    exported = made(Gated(), (3, 6, 6), *bits, tmp_path / "m.onnx")
    assert {"Gate", "Move", "Table"} <= {type(step).__name__ for step in exported.c.decided.program.steps}
    assert exported.c.figures["proof"]["float_steps"] == []
    x = pictures(30, 6)
    found, _ = exported.c.run(x.numpy(), STRICT)
    assert bit_equal(found, reference_outputs(exported.reference, [x])).all()


@needs_compiler
@pytest.mark.parametrize(
    "kind", ["silu", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gelu", "tanh", "tokens"))]
)
@pytest.mark.parametrize("bits", [(4, 4), pytest.param((8, 8), marks=pytest.mark.slow)])
def test_attention_is_within_what_rounding_explains_and_says_where_it_is_no_bit(kind, bits, tmp_path):
    torch.manual_seed(0)
    exported = made(Tokens(kind), (3, 16, 16), *bits, tmp_path / "m.onnx")
    x = pictures()
    found, _ = exported.c.run(x.numpy(), STRICT)
    reference = reference_outputs(exported.reference, [x]).reshape(len(x), -1)
    equal = bit_equal(found, reference)
    assert equal.mean() > 0.5  # a sum at the edge of two codes may fall to either; most do not
    step = np.ptp(reference) / 255
    assert np.median(np.abs(found - reference)) <= step
    checked = checking.check(exported.c.folder, "m", exported.c.decided.program, x.numpy())
    assert checked["wrong"] == [] and checked["steps"] >= 6 and checked["other"] <= 0.001 * checked["values"]
    text = exported.c.folder / "m_weights.h"
    before, gain, after = text.read_text().partition("float gain_")  # one weight of a norm, a sixteenth larger
    first = after.index("0x1.")
    text.write_text(before + gain + after[: first + 4] + "1" + after[first + 5 :])
    spoilt = checking.check(exported.c.folder, "m", exported.c.decided.program, x.numpy())
    assert [row["module"] for row in spoilt["wrong"]] == ["norm"]
    computed = [name for row in exported.c.figures["proof"]["float_steps"] for name in row["computes"]]
    assert {"norm", "softmax"} <= set(computed)
    assert ": scale, softmax" in (exported.c.folder / "README.md").read_text()


@needs_compiler
@pytest.mark.slow
def test_a_transformers_certificate_judges_its_c(tmp_path):
    model = models.build("vit_tiny", num_classes=4, input_shape=(3, 16, 16), seed=0, depth=1)
    x = pictures(16)
    quant.quantize(model, weight_bits=4, activation_bits=8, example_input=x[:2])
    quant.calibrate(model, [x])
    exported = export(model.eval(), x[:2], tmp_path / "m.onnx", "c")
    found = certify(exported, [x], latency_runs=0)
    equality = found["c"]["equality"]
    assert found["holds"], found["failures"]
    assert "wrong" not in equality and equality["beyond"] == [] and equality["largest_error_steps"] <= 1.0
    text = exported.c.folder / "m_weights.h"
    assert equality["steps"]["steps"] >= 8 and equality["steps"]["other"] < 0.01 * equality["steps"]["values"]
    before, gain, after = text.read_text().rpartition("float gain_")  # the last norm, its weights negated
    values, end, rest = after.partition("};")
    text.write_text(before + gain + values.replace(" 0x1.", " -0x1.") + end + rest)
    spoilt = certify(exported, [x], latency_runs=0, write=False)
    assert not spoilt["holds"] and any(sentence.startswith("the C model: ") for sentence in spoilt["failures"])


@needs_board
@pytest.mark.slow
@pytest.mark.parametrize("core", ["m0", "m4", "m55-helium", "rv32"])
def test_every_core_gives_the_same_bits(core, tmp_path):
    if board.missing(core) is not None:
        pytest.skip(board.missing(core))
    for kind in ("gelu", "silu", "tanh"):
        torch.manual_seed(0)
        exported = made(Tokens(kind), (3, 16, 16), 4, 4, tmp_path / kind / "m.onnx")
        x = pictures(3).numpy()
        here, _ = exported.c.run(x, ("-O2",))
        flags = ("-O3",) if core == "m55-helium" else ("-O2",)
        assert bit_equal(board.measure(exported.c.folder, "m", x, exported.c.outputs, core, flags).outputs, here).all()


ROUTINES = """
#include <stdio.h>
{features}
#include "fc_kernels.h"
int main(void)
{{
    float row[2];
    while (fread(row, sizeof row[0], 1u, stdin) == 1u) {{
        const float x = row[0];
        float out[4] = {{fc_exp(x), x, x, x}};
        fc_row_gelu(&out[1], 1u);
        fc_row_sigmoid(&out[2], 1u, 0u);
        fc_row_tanh(&out[3], 1u, 0u);
        (void)fwrite(out, sizeof out[0], 4u, stdout);
    }}
    return 0;
}}
"""


@needs_compiler
def test_functions_are_as_near_as_their_comments_say(tmp_path):
    used = {"ROWS", "ROW_SOFTMAX", "ROW_GELU", "ROW_SIGMOID", "ROW_TANH"}
    features = "\n".join(f"#define FC_{part} {int(part in used)}" for part in folder.FEATURES)
    (tmp_path / "fc_kernels.h").write_text(emit.kernels())
    (tmp_path / "routines.c").write_text(ROUTINES.format(features=features))
    line = [build.compiler(), "-std=c99", "-O1", "-Wno-unused-function", str(tmp_path / "routines.c")]
    subprocess.run([*line, "-o", str(tmp_path / "routines")], check=True)
    x = np.concatenate([np.linspace(-86.9, 87.9, 200_001), np.linspace(-8, 8, 100_001)]).astype(np.float32)
    done = subprocess.run([str(tmp_path / "routines")], input=x.tobytes(), capture_output=True, check=True)
    exp, gelu, sigmoid, tanh = np.frombuffer(done.stdout, np.float32).reshape(-1, 4).T.astype(np.float64)
    real = x.astype(np.float64)
    assert (np.abs(exp / np.exp(real) - 1) < 2.5e-7).all()  # about two units of the last place
    assert (np.abs(sigmoid - 1 / (1 + np.exp(-real))) < 4e-7).all()
    assert (np.abs(tanh - np.tanh(real)) < 6e-7).all()
    wanted = F.gelu(torch.from_numpy(real)).numpy()
    assert (np.abs(gelu - wanted) < 5e-7 * np.maximum(1, np.abs(real))).all()


@pytest.mark.parametrize("seed", range(20))
def test_loops_visit_what_moves_name(seed):
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(1, 5, 4))
    index = torch.arange(int(np.prod(shape))).reshape(shape).permute(*generator.permutation(4).tolist())
    if index.shape[0] > 1:
        index = index[1:]
    if seed % 3 == 0:
        index = index.flip(2)
    places = index.flatten().numpy()
    found = layout.loops(places)
    assert found is not None
    first, nested = found
    visited = [first]
    for size, stride in nested:
        visited = [place + step * stride for place in visited for step in range(size)]
    assert visited == places.tolist()


def test_places_without_a_pattern_have_no_loops():
    assert layout.loops(np.random.default_rng(0).permutation(64)) is None


class Odd(nn.Module):
    """A softmax over the tokens, which are no row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.over = nn.Softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.over(self.first(x)))


def test_real_values_in_an_order_without_rows_are_refused_by_their_module(tmp_path):
    with pytest.raises(UserError, match=r"'over'.*no C form"):
        made(Odd(), (5, 6), 4, 4, tmp_path / "m.onnx")


def test_a_function_without_a_routine_is_refused_by_its_module(tmp_path):
    net = block(nn.Linear(9, 12), nn.Hardswish(), nn.Linear(12, 8), nn.Mish(), nn.Linear(8, 3))
    with pytest.raises(UserError, match=r"'3'.*mish.*no C form"):
        made(net, (9,), 4, 4, tmp_path / "m.onnx")
