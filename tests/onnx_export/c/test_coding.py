from __future__ import annotations

import numpy as np
import pytest
import torch
from c_nets import STRICT, block, made, samples, wrong
from torch import nn

from flatcompress.onnx_export.c import build, coding, weights

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


def digits(generator: np.random.Generator, rows: int, taps: int, shares: list[float]) -> weights.Digits:
    values = generator.choice(4, (rows, taps), p=shares)
    return weights.Digits(values, -2, 2, np.ones(rows, np.int64))


def decoded(stream: np.ndarray, pairs: list[int], count: int) -> list[int]:
    """Words, as the kernel makes them."""
    words, buffer, held, at = [], 0, 0, 0
    for _ in range(count):
        word = 0
        for _ in range(8):
            if held < 6:
                buffer |= (int(stream[at]) | int(stream[at + 1]) << 8) << held
                at, held = at + 2, held + 16
            pair = pairs[buffer & 63]
            word = word >> 2 | (pair & 3) << 14 | (pair & 12) << 28
            buffer, held = buffer >> (pair >> 4), held - (pair >> 4)
        words.append(word)
    assert at <= len(stream)
    return words


@pytest.mark.parametrize("shares", [[0.01, 0.2, 0.58, 0.21], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]])
@pytest.mark.parametrize("taps", [16, 37])
def test_coded_rows_become_the_words_that_they_were(shares, taps):
    found = digits(np.random.default_rng(taps), 7, taps, shares)
    order = coding.ranks([found])
    stream, rows = coding.stream(found, order), weights.rows(found, fill=int(order[0])).reshape(-1)
    assert decoded(stream, coding.pairs(order), len(rows)) == rows.tolist()
    rank = np.argsort(order)[found.values]
    bits = np.array([1, 2, 3, 3])[rank].sum() + 7 * (-taps % 16)
    assert len(stream) == -(-bits // 8) + 2


class Square(nn.Module):
    """Layers whose rows are coded where they are of two bits: a strided one, one with an addition, a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(nn.Conv2d(3, 10, 3, padding=1), nn.ReLU())
        self.body = block(nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10))
        self.down = block(nn.Conv2d(10, 13, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(13, 6, 1), nn.ReLU())
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6 * 6 * 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.relu(self.body(x) + x)
        return self.fc(torch.flatten(self.down(x), 1))


def coded(path, monkeypatch, channels: int = 64, **options):
    """The network with every layer coded that can be, at most ``channels`` at a time."""
    monkeypatch.setattr(coding, "LEAST", -1000)
    monkeypatch.setattr(coding, "PIXELS", 1)
    monkeypatch.setattr(coding, "CHANNELS", 2)
    fits = coding._block
    monkeypatch.setattr(coding, "_block", lambda *given: min(fits(*given), channels))
    torch.manual_seed(0)
    return made(Square(), (3, 12, 10), 2, 4, path, **options)


@needs_compiler
@pytest.mark.parametrize("channels", [64, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_every_output_bit_is_the_same_with_coded_rows(channels, packed, tmp_path, monkeypatch):
    exported = coded(tmp_path / "m.onnx", monkeypatch, channels, pack_activations=packed)
    blocks = [layer.block for layer in exported.c.decided.layers.values()]
    assert 0 < max(blocks) <= channels
    assert wrong(exported, samples((3, 12, 10)), STRICT) == []


def test_coded_rows_take_fewer_bytes_and_no_more_ram(tmp_path, monkeypatch):
    torch.manual_seed(0)
    plain = made(Square(), (3, 12, 10), 2, 4, tmp_path / "plain" / "m.onnx").c
    short = coded(tmp_path / "short" / "m.onnx", monkeypatch).c
    assert "#define FC_CODED 0" in (plain.folder / "m.c").read_text()  # too little to be worth the decoder
    assert "#define FC_CODED 1" in (short.folder / "m.c").read_text()
    assert short.figures["weight_bytes"] < plain.figures["weight_bytes"]
    assert short.figures["ram_bytes"] <= plain.figures["ram_bytes"]
