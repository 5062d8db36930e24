"""WAV files as samples in -1..1: PCM of 8 to 32 bits, and floats."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import UserError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Sound:
    """float32 [N] in -1..1, the mean of ``channels``, at ``rate`` samples a second."""

    samples: NDArray[np.float32]
    rate: int
    channels: int


def read_wav(path: Path) -> Sound:
    """Read a RIFF WAVE file. UserError names the file: no WAV, cut off, empty, compressed, not finite."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MOST_BYTES else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if size > _MOST_BYTES:
        raise UserError(f"{path}: {size} bytes; at most {_MOST_BYTES} are read.")
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UserError(f"{path}: no WAV file ({'empty' if not data else 'it does not begin like one'}).")
    head, body = _chunks(path, data)
    code, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", head)
    if code == _EXTENSIBLE and len(head) >= 26:
        code = struct.unpack_from("<H", head, 24)[0]
    if not channels or not rate or not bits or block != channels * (bits // 8):
        raise UserError(f"{path}: a damaged header ({channels} channels, {rate} Hz, {bits} bits).")
    values = _values(path, body, code, bits)
    if len(values) < channels:
        raise UserError(f"{path}: no sample in it.")
    whole = values[: len(values) // channels * channels].reshape(-1, channels)
    if not np.isfinite(whole).all():
        raise UserError(f"{path}: holds NaN or infinity.")
    return Sound(whole.mean(1, dtype=np.float64).astype(np.float32), rate, channels)


def _chunks(path: Path, data: bytes) -> tuple[bytes, bytes]:
    """The format chunk and the samples."""
    at, head, body = 12, b"", None
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : at + 8 + length]
        if name == b"fmt ":
            head = content
        elif name == b"data":
            if len(content) < length and length not in (0, 0xFFFFFFFF):  # what a writer to a pipe leaves there
                raise UserError(f"{path}: cut off ({len(content)} of {length} bytes of sound).")
            body = data[at + 8 :] if length in (0, 0xFFFFFFFF) else content
            break
        at += 8 + length + length % 2
    if len(head) < 16 or body is None:
        raise UserError(f"{path}: a WAV file without {'a format' if len(head) < 16 else 'samples'}.")
    return head, body


def _values(path: Path, body: bytes, code: int, bits: int) -> NDArray[np.float64]:
    """Every sample of every channel in -1..1."""
    body = body[: len(body) // (bits // 8) * (bits // 8)]
    if code == _FLOAT and bits in (32, 64):
        return np.frombuffer(body, f"<f{bits // 8}").astype(np.float64)
    if code != _PCM or bits not in (8, 16, 24, 32):
        raise UserError(f"{path}: encoding {code} of {bits} bits; PCM of 8, 16, 24, 32 bits or floats are read.")
    if bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) / 128
    if bits == 24:
        three = np.frombuffer(body, np.uint8).reshape(-1, 3).astype(np.int32)
        signed = (three[:, 0] << 8 | three[:, 1] << 16 | three[:, 2] << 24) >> 8
        return signed.astype(np.float64) / 2**23
    return np.frombuffer(body, f"<i{bits // 8}").astype(np.float64) / 2.0 ** (bits - 1)
