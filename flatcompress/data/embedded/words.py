"""Spoken words, synthesised: six short words of vowels and consonants in several voices, as MFCC.

A stand-in for keyword spotting, made where it is used: harmonics of a pitch, weighted by three formants that glide from
sound to sound (Klatt's scheme at its simplest, J. Acoust. Soc. Am. 67, 1980), with noise for consonants. A voice is a
pitch and the length of a vocal tract; the unseen domain is a child's, higher and shorter than every voice of training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flatcompress.data.bundle import DataBundle
from flatcompress.data.embedded.drawing import checked
from flatcompress.data.sounds import Listing, featured
from flatcompress.data.spectra import Spectra
from flatcompress.errors import UserError
from flatcompress.randomness import derive
from flatcompress.tasks import build

RATE, SECONDS = 8000, 0.5
_FRAMES = 50  # of the formants' course: one every 10 ms
# Formants in Hz of a grown voice, and how loud the voice and the noise are.
SOUNDS = {
    "a": ((730, 1090, 2440), 1.0, 0.0),
    "e": ((530, 1840, 2480), 1.0, 0.0),
    "i": ((270, 2290, 3010), 1.0, 0.0),
    "o": ((570, 840, 2410), 1.0, 0.0),
    "u": ((300, 870, 2240), 0.9, 0.0),
    "m": ((250, 1100, 2200), 0.4, 0.0),
    "s": ((400, 1800, 3400), 0.0, 0.5),
    "t": ((400, 1700, 2600), 0.0, 0.15),
}
WORDS = ("mata", "mato", "meta", "sima", "simo", "sita")
_WIDTHS = (80.0, 120.0, 180.0)  # Hz, of the formants
VOICES = {"low": (105.0, 0.92), "middle": (135.0, 1.0), "high": (195.0, 1.1), "child": (290.0, 1.28)}
_UNSEEN = "child"


def drawn_words(
    seed: int,
    *,
    train_count: int = 420,
    val_count: int = 72,
    test_count: int = 144,
    features: str = "mfcc",
    coefficients: int = 10,
    bands: int = 32,
    task: Any = None,
) -> DataBundle:
    """Words of half a second at 8 kHz as [1, 24, coefficients]; ``features``: mfcc or logmel. Counts are words."""
    counts = checked("drawn-words", train_count, val_count, test_count)
    made = Spectra(RATE, features, bands, coefficients)
    waves, labels, rows, at = [], [], {}, 0
    for name, count in counts.items():
        rng = np.random.default_rng(derive(seed, "words", name))
        kind = np.arange(count) % len(WORDS)
        waves.append(spoken(kind, [_UNSEEN] if name == "held_out" else [v for v in VOICES if v != _UNSEEN], rng))
        labels.append(torch.from_numpy(kind))
        rows[name], at = torch.arange(at, at + count), at + count
    found = Listing([], torch.cat(labels), WORDS)
    learned = build(task)
    if learned.name != "classification":
        raise UserError(f"drawn-words has targets for task 'classification', not {learned.name!r}.")
    return featured("drawn-words", found, np.concatenate(waves), rows, made, learned, (), 500, seed)


def spoken(kinds: NDArray[Any], voices: list[str], rng: np.random.Generator) -> NDArray[np.float32]:
    """float32 [N, RATE * SECONDS] of the words ``kinds``, the voices in turn, each said a little differently."""
    n, steps = len(kinds), round(RATE * SECONDS)
    chosen = np.array([VOICES[voices[i % len(voices)]] for i in rng.permutation(n)])
    pitch = chosen[:, :1] * (1 + 0.06 * rng.standard_normal((n, 1)))
    tract = chosen[:, 1:] * (1 + 0.05 * rng.standard_normal((n, 1)))
    course = np.stack([_course(WORDS[kind], rng) for kind in kinds])  # [N, frames, formants and two loudnesses]
    formants = course[..., :3] * tract[..., None]
    time = np.linspace(0, 1, _FRAMES)
    fall = pitch * (1.08 - 0.16 * time)  # the pitch falls through a word
    fine = np.linspace(0, _FRAMES - 1, steps)
    below = np.floor(fine).astype(int).clip(max=_FRAMES - 2)
    share = (fine - below).astype(np.float32)

    def along(frames: NDArray[Any]) -> NDArray[np.float32]:
        return (frames[:, below] * (1 - share) + frames[:, below + 1] * share).astype(np.float32)

    phase = np.cumsum(along(fall) * (2 * np.pi / RATE), axis=1, dtype=np.float64)
    voice = np.zeros((n, steps), np.float32)
    turn, last, now = (2 * np.cos(phase)).astype(np.float32), np.zeros_like(voice), np.sin(phase).astype(np.float32)
    for k in range(1, int(RATE / 2 / pitch.min()) + 1):
        hertz = k * fall
        loud = _resonance(hertz[..., None], formants) / k * (hertz < RATE / 2 - 100)
        voice += along(loud * course[..., 3]) * now
        last, now = now, turn * now - last  # sin((k + 1) p) = 2 cos p sin(k p) - sin((k - 1) p)
    hiss = rng.standard_normal((n, steps)).astype(np.float32)
    hiss[:, 1:] -= 0.9 * hiss[:, :-1].copy()  # brighter, as breath through teeth is
    sound = voice + 0.3 * along(course[..., 4]) * hiss + 0.01 * rng.standard_normal((n, steps))
    return (0.5 * sound / np.abs(sound).max(1, keepdims=True)).astype(np.float32)


def _resonance(hertz: NDArray[Any], formants: NDArray[Any]) -> NDArray[Any]:
    """How much of a frequency [N, frames, 1] three formants [N, frames, 3] let through."""
    return (1 / (1 + ((hertz - formants) / np.array(_WIDTHS)) ** 2)).sum(-1)


def _course(word: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """[frames, 5]: three formants, loudness of voice and of noise, gliding from sound to sound, silence around."""
    long = np.array([1.0 if letter in "aeiou" else 0.6 for letter in word]) * (
        1 + 0.15 * rng.standard_normal(len(word))
    )
    ends = np.cumsum(long.clip(0.3)) / long.clip(0.3).sum()
    begin, length = 3 + 4 * rng.random(), 34 + 6 * rng.random()
    at = (np.arange(_FRAMES) - begin) / length
    which = np.searchsorted(ends, at.clip(0, 0.999), side="right")
    rows = np.array([(*SOUNDS[letter][0], *SOUNDS[letter][1:]) for letter in word])[which]
    rows[(at < 0) | (at >= 1), 3:] = 0.0
    smooth = np.ones(5) / 5
    padded = np.pad(rows, ((2, 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, smooth, mode="valid") for column in padded.T], 1)
