"""Corruptions of sound [N, T] in -1..1: what goes wrong between a voice and a network. Severities 1, 3 and 5."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flatcompress.randomness import derive

Sounds = NDArray[np.floating]
Change = Callable[[Sounds, int, int, np.random.Generator], Sounds]
SEVERITIES = (1, 3, 5)


def noise(x: Sounds, rate: int, severity: int, rng: np.random.Generator) -> Sounds:
    """White noise, 20 dB below the sound at severity 1 and as loud as it at 5."""
    loud = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    return x + loud * 10 ** ((severity - 5) / 4) * rng.standard_normal(x.shape)


def gain(x: Sounds, rate: int, severity: int, rng: np.random.Generator) -> Sounds:
    """Every sound softer by 2 to 4 dB a severity, as from further away."""
    return x * 10 ** (-severity * (2 + 2 * rng.random((len(x), 1))) / 20)


def clipping(x: Sounds, rate: int, severity: int, rng: np.random.Generator) -> Sounds:
    """Nothing above a share of the largest sample, which falls with the severity."""
    limit = np.abs(x).max(1, keepdims=True) * (0.75 - 0.13 * severity)
    return np.clip(x, -limit, limit)


def reverberation(x: Sounds, rate: int, severity: int, rng: np.random.Generator) -> Sounds:
    """A room: its echo takes 0.15 s a severity to fall by 60 dB, and is a fifth as loud as the voice a severity."""
    time = 0.15 * severity
    steps = np.arange(round(time * rate))
    tail = rng.standard_normal(len(steps)) * 10 ** (-3 * steps / len(steps))
    tail[0], size = 0.0, 1 << (x.shape[1] + len(steps)).bit_length()
    tail /= np.sqrt((tail**2).sum())
    echo = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(tail, size), size)[:, : x.shape[1]]
    return x + 0.2 * severity * echo


def missing(x: Sounds, rate: int, severity: int, rng: np.random.Generator) -> Sounds:
    """A stretch of 6 % a severity is silent."""
    length = max(1, round(0.06 * severity * x.shape[1]))
    start = rng.integers(0, x.shape[1] - length + 1, (len(x), 1))
    at = np.arange(x.shape[1]) - start
    return np.where((at >= 0) & (at < length), 0.0, x)


CHANGES: dict[str, Change] = {
    "noise": noise, "gain": gain, "clipping": clipping, "reverberation": reverberation, "missing": missing,
}  # fmt: skip


def changed(x: Sounds, rate: int, seed: int) -> dict[str, Sounds]:
    """Every change of ``x`` [N, T] at every severity, by "kind/severity"."""
    return {
        f"{kind}/{severity}": change(x, rate, severity, np.random.default_rng(derive(seed, kind, severity))).astype(
            np.float32
        )
        for kind, change in CHANGES.items()
        for severity in SEVERITIES
    }
