from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from c_nets import NETS, STRICT, Deep, Line, made, samples, wrong
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.c import build, weights

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits"),
    [
        ("residual", 4, 4),
        ("deep", 3, 4),
        ("line", 2, 8),
        *(
            pytest.param(name, w, a, marks=pytest.mark.slow)
            for name in NETS
            for w, a in [(8, 8), (6, 5), (5, 3), (2, 2), (4, 8), (7, 4)]
        ),
    ],
)
def test_every_output_bit_equals_onnxruntimes(name, weight_bits, activation_bits, tmp_path):
    kind, shape = NETS[name]
    exported = made(kind(), shape, weight_bits, activation_bits, tmp_path / "m.onnx")
    assert wrong(exported, samples(shape), STRICT) == []


@needs_compiler
def test_the_certificate_has_a_section_c_that_decides(tmp_path):
    torch.manual_seed(0)
    exported = made(Deep(), (3, 9, 8), 4, 4, tmp_path / "my-net.onnx")
    x = torch.randn(30, 3, 9, 8, generator=torch.Generator().manual_seed(3))
    found = certify(exported, [x[:20], x[20:]], latency_runs=0)
    assert found["c"]["equality"]["wrong"] == 0 and found["c"]["equality"]["samples"] == 30
    assert found["c"]["name"] == "my_net" and found["c"]["proof"]["sums"] > 1000
    # One wrong weight, and the certificate says so.
    text = exported.c.folder / "my_net_weights.h"
    lines = text.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("static const float scale_"))
    lines[row + 1] = lines[row + 1].replace("0x1.", "0x1.f", 1)
    text.write_text("\n".join(lines) + "\n")
    spoilt = certify(exported, [x], latency_runs=0, write=False)
    assert spoilt["holds"] is False and "the C model's output bits" in " ".join(spoilt["failures"])


def test_the_same_model_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        torch.manual_seed(0)
        made(Line(), (2, 20), 4, 4, tmp_path / folder / "net.onnx")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f / "c").iterdir()} for f in ("a", "b"))
    assert first == second
    assert sorted(first) == [
        *("CMakeLists.txt", "Makefile", "README.md", "fc_kernels.h", "main.c", "net.c", "net.h", "net_weights.h")
    ]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_rows_of_words_hold_every_digit(bits):
    generator = np.random.default_rng(bits)
    values = generator.integers(0, 1 << bits, (3, 21))
    found = weights.rows(weights.Digits(values, 0, bits, np.ones(3, np.int64)))
    unit = weights.unit(bits)
    patch = generator.integers(0, 256, 21)
    filled = np.zeros(-(-21 // unit) * unit, np.int64)
    filled[:21] = patch
    halves = filled.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1, 2)  # pairs of 16-bit numbers, as the kernel has them
    for row in range(3):
        words, total, place, at = found[row], 0, 0, 0
        for plane in weights.PLANES[bits]:
            length = len(filled) * plane // 32
            for index, word in enumerate(words[at : at + length]):
                for step in range(16 // plane):
                    both_digits = (int(word) >> (step * plane)) & (((1 << plane) - 1) * 0x10001)
                    pair = halves[index * (16 // plane) + step]
                    total += ((both_digits & 0xFFFF) * int(pair[0]) + (both_digits >> 16) * int(pair[1])) << place
            at, place = at + length, place + plane
        assert total == int(values[row] @ patch)


class Real(nn.Module):
    """A convolution, and then something that needs real values."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.after = after
        self.fc = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.after(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    ("after", "named"),
    [(nn.Softmax(1), "after"), (nn.LayerNorm(8), "after"), (nn.GroupNorm(2, 4), "after")],
)
def test_what_has_no_c_form_is_refused_by_its_module(after, named, tmp_path):
    model, x = Real(after), torch.randn(4, 3, 8, 8)
    quant.quantize(model, weight_bits=4, activation_bits=4, example_input=x)
    quant.calibrate(model, [x])
    with pytest.raises(UserError, match=f"{named}.*no C form"):
        export(model.eval(), x, tmp_path / "m.onnx", "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["9lives", "fc_net", "main", "-"])
def test_a_name_that_c_does_not_take_is_refused(stem, tmp_path):
    with pytest.raises(UserError, match="cannot name a C model"):
        made(Line(), (2, 20), 4, 4, tmp_path / f"{stem}.onnx")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits"),
    [
        ("residual", 4, 4),
        ("vectors", 4, 4),
        ("vectors", 2, 4),
        *(
            pytest.param(name, w, a, marks=pytest.mark.slow)
            for name, w, a in [("residual", 4, 8), ("residual", 2, 4), ("residual", 8, 8), ("vectors", 8, 8)]
        ),
    ],
)
def test_sparse_weights_are_skipped_and_every_bit_is_equal(name, weight_bits, activation_bits, tmp_path):
    kind, shape = NETS[name]
    torch.manual_seed(0)
    exported = made(kind(), shape, weight_bits, activation_bits, tmp_path / "m.onnx", sparsity=0.85)
    part = "FC_SPARSE_LINE" if name == "vectors" else "FC_SPARSE"
    assert f"#define {part} 1" in (exported.c.folder / "m.c").read_text()
    assert wrong(exported, samples(shape), STRICT) == []


class Ends(nn.Module):
    """Layers of few taps beside many channels, which are gathered whole, and planes that are handed over at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(),
            nn.Conv2d(12, 12, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(12, 9, 1), nn.ReLU(),
            nn.Conv2d(9, 9, 3, stride=2, groups=9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weight_bits", [2, 4])
def test_rows_of_one_column_small_planes_and_even_ends_are_right_in_every_bit(weight_bits, packed, tmp_path):
    torch.manual_seed(0)
    shape = (3, 13, 14)
    exported = made(Ends(), shape, weight_bits, 4, tmp_path / "m.onnx", sparsity=0.8, pack_activations=packed)
    layers = list(exported.c.decided.layers.values())
    assert layers[0].whole and layers[0].entries.form == weights.WIDE
    assert layers[2].whole and layers[2].entries.form == layers[3].entries.form == weights.ENDED
    assert [layer.together for layer in layers[1:5:3]] == [True, True]
    assert [layer.even is not None for layer in layers] == [*[True] * 5, False]
    assert wrong(exported, samples(shape), STRICT) == []


class Tall(nn.Module):
    """An image of few columns, whose first layer, of 8 bits, goes down them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, (5, 3), stride=(2, 1), padding=(2, 1)), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(4 * 11 * 5, 3),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_a_sparse_layer_goes_down_the_columns_where_these_are_longer(packed, tmp_path):
    torch.manual_seed(0)
    exported = made(Tall(), (2, 21, 5), 4, 4, tmp_path / "m.onnx", sparsity=0.85, pack_activations=packed)
    turned = [layer.turned for layer in exported.c.decided.layers.values()]
    assert turned == [True, False, False] and exported.c.decided.layers[1].step.pixels == 1
    assert wrong(exported, samples((2, 21, 5)), STRICT) == []


@needs_compiler
@pytest.mark.parametrize(("zeroed", "sparse"), [((4,), 0), ((2, 4), 1)])
def test_a_lone_small_layer_of_zeros_does_not_bring_the_sparse_kernel(zeroed, sparse, tmp_path):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip
    for i in zeroed:
        body[i].weight.data *= torch.rand(body[i].weight.shape) >= 0.85
    exported = made(body, (2, 8, 8), 4, 4, tmp_path / "m.onnx")
    assert f"#define FC_SPARSE {sparse}\n" in (exported.c.folder / "m.c").read_text()
    assert wrong(exported, samples((2, 8, 8)), STRICT) == []


@pytest.mark.parametrize(("bits", "most"), [(4, 15), (4, 255), (2, 3), (8, 255), (3, 7)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3])
def test_a_sparse_stream_holds_every_weight(bits, most, density):
    generator = np.random.default_rng(bits)
    low = -(1 << (bits - 1))
    values = generator.integers(low, -low, (5, 40)) * (generator.random((5, 40)) < density)
    shape = (5, 2, 4, 5)  # [out, kh, kw, in]: the stream goes through the taps column by column
    conv = SimpleNamespace(weight=values.reshape(shape), outputs=5)
    found = weights.entries(conv, weights.Digits(values - low, low, bits, np.ones(5, np.int64)), most)
    distance, weight = decoded(found)
    places = np.cumsum(distance) - 1
    back = np.zeros(int(places[-1]) + 1, np.int64)
    back[places] = weight
    assert places[-1] >= 200 and not weight[places >= 200].any()
    assert np.array_equal(back[:200].reshape(5, 4, 2, 5).transpose(0, 2, 1, 3), values.reshape(shape))
    if found.form != weights.WIDE:  # every sum that the kernel adds in 16 bits fits them, whatever the inputs are
        apart = back[:200].reshape(5, 4 * found.parts or 1, -1)
        assert max(np.maximum(sign * apart, 0).sum(2).max() for sign in (1, -1)) * most < 1 << 15


def test_sums_that_fit_a_column_alone_are_not_added_through_the_row():
    conv = SimpleNamespace(weight=np.full((1, 1, 3, 16), 5), outputs=1)  # 3 times 20,400
    assert weights.entries(conv, weights.Digits(np.full((1, 48), 13), -8, 4, np.ones(1, np.int64)), 255).parts == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_rows_with_ends_hold_every_weight_and_no_entry_is_taken_for_a_used_up_word(bits, density):
    generator = np.random.default_rng(bits)
    low = -(1 << (bits - 1))
    values = generator.integers(low, -low, (7, 60)) * (generator.random((7, 60)) < density)
    values[3] = 0
    conv = SimpleNamespace(weight=values.reshape(7, 1, 1, 60), outputs=7)
    found = weights.entries(conv, weights.Digits(values - low, low, bits, np.ones(7, np.int64)), 7, ended=True)
    distance, weight = decoded(found)
    width = found.gap + found.bits
    fields = (found.stream.astype(np.int64)[:, None] >> (np.arange(32 // width) * width)) & ((1 << width) - 1)
    assert found.form == weights.ENDED and found.parts == 0 and fields.all()
    ends = np.flatnonzero(distance == 0)[:7]
    assert found.count == ends[-1] - 6
    back = np.zeros((7, 60), np.int64)
    for row, (begin, end) in enumerate(zip([0, *(ends[:-1] + 1)], ends)):
        np.add.at(back[row], np.cumsum(distance[begin:end]) - 1, weight[begin:end])
    assert np.array_equal(back, values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.4])
def test_no_group_of_entries_belongs_to_two_rows_of_one_vector(bits, density):
    generator = np.random.default_rng(bits)
    low, taps = -(1 << (bits - 1)), 50
    values = generator.integers(low, -low, (6, taps)) * (generator.random((6, taps)) < density)
    conv = SimpleNamespace(weight=values.reshape(6, 1, 1, taps), outputs=6)
    found = weights.row_entries(conv, weights.Digits(values - low, low, bits, np.ones(6, np.int64)))
    each = 4 if found.form == weights.WIDE else weights.row_group(found.bits)
    distance, weight = decoded(found, 4) if found.form == weights.WIDE else row_decoded(found)
    places = (np.cumsum(distance) - 1)[: len(distance) // each * each].reshape(-1, each)
    assert (places // taps == places[:, :1] // taps)[places[:, 0] < values.size].all()
    back = np.zeros(values.size + 300, np.int64)
    np.add.at(back, np.cumsum(distance) - 1, weight)
    assert np.array_equal(back[: values.size].reshape(values.shape), values) and not back[values.size :].any()


def row_decoded(found: weights.Entries) -> tuple[np.ndarray, np.ndarray]:
    """Distances and weights of words whose distances lie below their weights."""
    each, words = weights.row_group(found.bits), found.stream.astype(np.int64)[:, None]
    half = 1 << (found.bits - 1)
    distance = words >> (4 * np.arange(each)) & 15
    weight = words >> (4 * each + found.bits * np.arange(each)) & (2 * half - 1)
    return distance.ravel(), ((weight ^ half) - half).ravel()


def decoded(found: weights.Entries, group: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Distances and weights of a stream, as the kernels read them."""
    stream = found.stream.astype(np.int64)
    if found.form == weights.BYTES:
        return stream >> 4, ((stream & 15) ^ 8) - 8
    if found.form == weights.WIDE:
        rows = stream.reshape(-1, group + group // 2)
        gaps, digits = rows[:, : group // 2], rows[:, group // 2 :]
        return np.stack([gaps & 15, gaps >> 4], 2).ravel(), ((digits ^ 128) - 128).ravel()
    width, half = found.gap + found.bits, 1 << (found.bits - 1)
    entry = (stream[:, None] >> (np.arange(32 // width) * width) & ((1 << width) - 1)).ravel()
    return entry & ((1 << found.gap) - 1), ((entry >> found.gap) ^ half) - half
