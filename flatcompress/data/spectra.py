"""Log-mel spectrograms and MFCC of sound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatcompress.errors import UserError, unknown

FEATURES = ("logmel", "mfcc")
_LOWEST = 20.0  # Hz
FLOOR = 1e-6  # of the energy in a band, against the logarithm of silence


@dataclass(frozen=True)
class Spectra:
    """How sound becomes features: log energies in mel bands, or their cosine transform.

    rate: samples a second. window, hop: milliseconds. bands: mel bands (HTK's scale) from 20 Hz to half the rate.
    coefficients: of an MFCC, from the mean on. UserError for settings that make no sense.
    """

    rate: int
    features: str = "logmel"
    bands: int = 40
    coefficients: int = 10
    window: float = 40.0
    hop: float = 20.0

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise unknown("features of sound", self.features, FEATURES)
        if not 0 < self.hop <= self.window or self.step < 1 or self.length < 16:
            raise UserError(
                f"sounds: window {self.window:g} and hop {self.hop:g} are milliseconds, hop at most window, at least "
                "16 samples."
            )
        if not 2 <= self.bands <= self.length // 4:
            raise UserError(f"sounds: bands is from 2 to {self.length // 4} for this window, found {self.bands}.")
        if self.features == "mfcc" and not 1 <= self.coefficients <= self.bands:
            raise UserError(f"sounds: coefficients is from 1 to bands ({self.bands}), found {self.coefficients}.")

    @property
    def length(self) -> int:
        """Samples of a window."""
        return round(self.rate * self.window / 1000)

    @property
    def step(self) -> int:
        """Samples from one window to the next."""
        return round(self.rate * self.hop / 1000)

    def __call__(self, sound: NDArray[np.floating]) -> NDArray[np.float32]:
        """[..., N] samples -> [..., frames, bands or coefficients]; only whole windows count."""
        frames = np.lib.stride_tricks.sliding_window_view(sound, self.length, axis=-1)[..., :: self.step, :]
        size = 1 << (self.length - 1).bit_length()
        power = np.abs(np.fft.rfft(frames * np.hanning(self.length + 1)[:-1], size)) ** 2 / size
        logs = np.log(power @ mel_filters(self.rate, size, self.bands).T + FLOOR)
        if self.features == "mfcc":
            logs = logs @ cosines(self.bands, self.coefficients).T
        return logs.astype(np.float32)


def mel_filters(rate: int, size: int, bands: int) -> NDArray[np.float64]:
    """[bands, size // 2 + 1] triangles of height 1, evenly spaced on the scale 2595 log10(1 + f / 700).

    >>> bool((mel_filters(16000, 1024, 40).max(1) > 0.5).all())
    True
    """
    edges = np.linspace(_mel(_LOWEST), _mel(rate / 2), bands + 2)
    at = _mel(np.linspace(0, rate / 2, size // 2 + 1))
    rise = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rise, fall))


def _mel(hertz: float | NDArray[np.float64]) -> NDArray[np.float64]:
    return 2595 * np.log10(1 + np.asarray(hertz, dtype=np.float64) / 700)


def cosines(bands: int, coefficients: int) -> NDArray[np.float64]:
    """[coefficients, bands]: the first rows of the orthonormal DCT-II.

    >>> c = cosines(8, 8)
    >>> bool(np.allclose(c @ c.T, np.eye(8)))
    True
    """
    k, n = np.arange(coefficients)[:, None], np.arange(bands)
    found = np.cos(np.pi * k * (2 * n + 1) / (2 * bands)) * np.sqrt(2 / bands)
    found[0] /= np.sqrt(2)
    return found
