"""Twenty kinds of damaged image: with ``error`` the file is named, with ``skip`` it is left out, counted and shown."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import small_runs
from PIL import Image
from rich.console import Console
from tiny_net import TinyNet

from flatcompress import Pipeline, data, report
from flatcompress.errors import UserError
from flatcompress.report.terminal import Progress


def picture(kind="PNG", size=(12, 10), **options):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            (folder / name / f"{i}.png").write_bytes(picture())
    return folder


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damaged_checksum() -> bytes:
    content = bytearray(picture())
    content[30] ^= 0xFF  # the sum of the header
    return bytes(content)


def cut(content: bytes, share: float = 0.5) -> bytes:
    return content[: int(len(content) * share)]


def text_bomb() -> bytes:
    return png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))))


def tiff_with_a_fraction_for_a_place() -> bytes:
    content = bytearray(picture("TIFF"))
    table = struct.unpack_from("<I", content, 4)[0]
    for at in range(table + 2, table + 2 + 12 * struct.unpack_from("<H", content, table)[0], 12):
        if struct.unpack_from("<H", content, at)[0] == 273:  # where the pixels lie
            struct.pack_into("<H", content, at + 2, 5)
    return bytes(content)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


# what the file is, and how it is made in place of a sound one
KINDS = {
    "empty": ("png", written(b"")),
    "zeros": ("png", written(bytes(500))),
    "text": ("png", written(b"no picture")),
    "html": ("jpg", written(b"<html>404 not found</html>")),
    "svg": ("png", written(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "zip": ("png", written(b"PK\x03\x04" + bytes(90))),
    "pickle": ("png", written(b"\x80\x04\x95\x10cos\nsystem\n")),
    "signature alone": ("png", written(b"\x89PNG\r\n\x1a\n")),
    "png cut off": ("png", written(cut(picture()))),
    "png with a wrong checksum": ("png", written(damaged_checksum())),
    "png without pixels": ("png", written(png(12, 10))),
    "png of no width": ("png", written(png(0, 10))),
    "png that claims 40,000 x 40,000": ("png", written(png(40_000, 40_000))),
    "png with 80 MB of packed text": ("png", written(text_bomb())),
    "jpeg cut off": ("jpg", written(cut(picture("JPEG", size=(64, 64))))),
    "gif cut off": ("gif", written(cut(picture("GIF"), 0.2))),
    "bmp that claims 2 billion lines": (
        "bmp",
        written(picture("BMP")[:22] + b"\xff\xff\xff\x7f" + picture("BMP")[26:]),
    ),
    "tiff cut off": ("tiff", written(cut(picture("TIFF", size=(64, 64)), 0.9))),
    "tiff with a fraction for a place": ("tiff", written(tiff_with_a_fraction_for_a_place())),
    "webp cut off": ("webp", written(cut(picture("WEBP", size=(64, 64))))),
    "fifo": ("png", lambda path: os.mkfifo(path)),
    "link to itself": ("png", lambda path: path.symlink_to(path)),
    "link outside of the folder": ("png", lambda path: path.symlink_to("/etc/hostname")),
}
REFUSED = {"link to itself", "link outside of the folder"}  # whatever the policy: nobody has such files by accident


def load(root: Path, policy: str):
    return data.load("folder", path=str(root), size=8, channels=1, on_bad_sample=policy, corruptions="none")


def test_there_are_twenty_kinds():
    assert len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_a_clear_error_or_a_skip_that_is_counted(kind, tmp_path):
    suffix, make = KINDS[kind]
    make(fill(tmp_path / "root") / "cat" / f"bad.{suffix}")
    with pytest.raises(UserError, match=rf"bad\.{suffix}: "):
        load(tmp_path / "root", "error")
    if kind in REFUSED:
        with pytest.raises(UserError, match=rf"bad\.{suffix}: a link"):
            load(tmp_path / "root", "skip")
        return
    with pytest.warns(UserWarning, match="1 bad images are left out"):
        bundle = load(tmp_path / "root", "skip")
    assert len(bundle.skipped) == 1 and f"bad.{suffix}" in bundle.skipped[0]
    assert len(bundle.train) + len(bundle.val) + len(bundle.test) == 20


def test_the_count_of_skipped_samples_is_in_the_log_the_terminal_and_the_report(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    root = fill(tmp_path / "root")
    for name in ("one", "two"):
        (root / "cat" / f"{name}.png").write_text("no picture")
    with pytest.warns(UserWarning, match="2 bad images"):
        bundle = load(root, "skip")
    terminal = io.StringIO()
    progress = Progress(Console(file=terminal, width=300))
    stage = {"train": {"method": "none", "epochs": 1}}
    pipeline = Pipeline(model=TinyNet(2), data=bundle, stages=[stage], device="cpu", threads=1, batch_size=8)
    with progress:
        pipeline.run(tmp_path / "run", display=progress.event)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    said = "bad samples left out of the data: 2; the first: "
    assert next(e for e in events if e["event"] == "run")["skipped"] == 2
    assert [e["message"] for e in events if e["event"] == "warning" and said in e["message"]]
    assert said in terminal.getvalue()
    assert said in report.build(tmp_path / "run").read_text()
