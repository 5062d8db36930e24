"""Decoding: the same pixels with and without the faster decoder, sizes as Pillow's, and every damage said as before."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress.data.images import decoding, reading
from flatcompress.data.images.reading import FilePixels, Reader
from flatcompress.errors import UserError


def picture(width: int = 90, height: int = 61, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8))


def jpeg(path, orientation: int = 1, mode: str = "RGB", **options) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().convert(mode).save(path, "JPEG", exif=exif, **options)


KINDS = {
    "plain": {},
    "progressive": {"progressive": True, "quality": 40},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "turned": {"orientation": 6},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_faster_decoder_gives_the_very_pixels_that_pillow_gives(tmp_path, monkeypatch, kind, channels):
    pytest.importorskip("simplejpeg")
    jpeg(tmp_path / "a.jpg", **KINDS[kind])
    found = decoding.decode(tmp_path / "a.jpg", (channels, 32, 40))
    in_memory = decoding.decode_bytes((tmp_path / "a.jpg").read_bytes(), "a", (channels, 32, 40))
    monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    assert torch.equal(found, decoding.decode(tmp_path / "a.jpg", (channels, 32, 40)))
    assert torch.equal(found, in_memory) and found.is_contiguous()


def test_a_damaged_jpeg_is_what_pillow_says_of_it(tmp_path, monkeypatch):
    pytest.importorskip("simplejpeg")
    whole = io.BytesIO()
    picture().save(whole, "JPEG")
    rng = np.random.default_rng(3)

    def outcome(path):
        try:
            return decoding.decode(path, (3, 16, 16))
        except UserError as error:
            return str(error)

    for i in range(30):
        damaged = bytearray(whole.getvalue())
        if i % 2:
            damaged = damaged[: int(rng.integers(1, len(damaged)))]
        else:
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(bytes(damaged))
        with_it = outcome(path)
        with monkeypatch.context() as without:
            without.setattr(decoding, "_simplejpeg", lambda: None)
            alone = outcome(path)
        assert torch.equal(with_it, alone) if isinstance(alone, torch.Tensor) else with_it == alone


@pytest.mark.parametrize("size", [(16, 24), (61, 90), (128, 100), (61, 200)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sizes_are_within_one_level_of_pillow_s(tmp_path, size, mode):
    picture().convert(mode).save(tmp_path / "a.png")
    found = decoding.decode(tmp_path / "a.png", (1 if mode == "L" else 3, *size))
    theirs = np.asarray(picture().convert(mode).resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, -1)
    assert int(np.abs(found.permute(1, 2, 0).numpy().astype(int) - theirs).max()) <= 1


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_decoder_is_said_once_where_there_are_many_jpegs(tmp_path, monkeypatch, installed):
    for i in range(3):
        jpeg(tmp_path / f"{i}.jpg")
    monkeypatch.setattr(reading, "_MANY", 3)
    monkeypatch.setattr(reading, "decodes_jpeg", lambda: installed)
    reader = Reader((3, 8, 8))
    reader.look(sorted(tmp_path.iterdir()))
    assert [note for note in reader.notes if "flatcompress[jpeg]" in note] == reader.notes[: 0 if installed else 1]
    few = Reader((3, 8, 8))
    few.look(sorted(tmp_path.iterdir())[:2])
    assert not few.notes
    assert FilePixels(sorted(tmp_path.iterdir()), (3, 8, 8)).gather(torch.tensor([2, 0])).shape == (2, 3, 8, 8)
