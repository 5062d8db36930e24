"""WAV files as spectrograms: what is read is what was written, and the features are those of their definition."""

from __future__ import annotations

import importlib.util
import struct
import wave
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from flatcompress import data
from flatcompress.data.corruptions.audio import CHANGES, changed
from flatcompress.data.spectra import Spectra, mel_filters
from flatcompress.data.wav import read_wav

RATE = 4000


def tone(hertz: float, seconds: float = 0.3, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, samples: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.repeat(samples, channels)
        if width == 1:
            file.writeframes((np.round(whole * 127) + 128).astype(np.uint8).tobytes())
        else:
            scaled = np.round(whole * (2 ** (8 * width - 1) - 1)).astype("<i4")
            file.writeframes(b"".join(int(v).to_bytes(width, "little", signed=True) for v in scaled))


@pytest.fixture
def words(tmp_path):
    for name, hertz in (("low", 300), ("high", 1200)):
        for i in range(8):
            write(tmp_path / name / f"{i}.wav", tone(hertz + 20 * i))
    return tmp_path


def load(folder, **options):
    given = {"rate": RATE, "seconds": 0.25, "bands": 16, "corruptions": "none", **options}
    return data.load("sounds", path=str(folder), **given)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_read_at_every_width(width, channels, tmp_path):
    samples = tone(440)
    write(tmp_path / "a.wav", samples, channels=channels, width=width)
    found = read_wav(tmp_path / "a.wav")
    assert (found.rate, found.channels, len(found.samples)) == (RATE, channels, len(samples))
    np.testing.assert_allclose(found.samples, samples, atol=2.0 / 2 ** (8 * width - 1))


def test_floats_are_read_too(tmp_path):
    samples = tone(440).astype("<f4")
    body = samples.tobytes()
    head = struct.pack("<HHIIHH", 3, 1, RATE, 4 * RATE, 4, 32)
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", len(head)) + head
    chunks += b"data" + struct.pack("<I", len(body)) + body
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    assert np.array_equal(read_wav(tmp_path / "a.wav").samples, samples)


def test_a_tone_is_loudest_in_its_own_mel_band():
    made = Spectra(RATE, bands=16)
    at = np.linspace(0, RATE / 2, 129)
    for hertz in (200, 500, 1000, 1500):
        frames = made(tone(hertz))
        assert frames.shape == (1 + (1200 - made.length) // made.step, 16)
        band = mel_filters(RATE, 256, 16)[:, np.abs(at - hertz).argmin()].argmax()
        assert set(frames.argmax(1).tolist()) <= {band - 1, band, band + 1}


def test_mfcc_are_the_cosine_transform_of_the_log_bands():
    sound = tone(700) + 0.1 * np.random.default_rng(0).standard_normal(1200)
    logs = Spectra(RATE, bands=16)(sound)
    found = Spectra(RATE, "mfcc", bands=16, coefficients=16)(sound)
    np.testing.assert_allclose((found**2).sum(1), (logs**2).sum(1), rtol=1e-4)  # orthonormal
    np.testing.assert_allclose(found[:, 0], logs.sum(1) / 4, rtol=1e-4)


def test_folders_are_classes_and_a_domain_is_held_out(words, tmp_path_factory):
    found = load(words)
    assert found.classes == ("high", "low") and found.input_shape == (1, 11, 16)
    assert (len(found.train), len(found.val), len(found.test)) == (10, 2, 4)
    assert abs(float(found.train.images[found.train.rows].mean())) < 1e-4
    assert found.features["rate"] == RATE and found.notes == (
        "16 of 16 sounds are longer than a sample; their end is cut off",
    )
    root = tmp_path_factory.mktemp("speakers")
    for speaker, shift in (("anna", 0), ("ben", 40), ("_background_noise_", 0)):
        for name, hertz in (("low", 300), ("high", 1200)):
            for i in range(5):
                write(root / speaker / name / f"{i}.wav", tone(hertz + shift + 10 * i))
    found = load(root, held_out="ben")
    assert found.classes == ("high", "low") and len(found.held_out) == 10
    assert len(found.train) + len(found.val) + len(found.test) == 10


def test_lists_beside_the_folders_are_the_split(words):
    (words / "validation_list.txt").write_text("low/0.wav\nhigh/0.wav\n")
    (words / "testing_list.txt").write_text("low/1.wav\nhigh/1.wav\nlow/2.wav\n")
    found = load(words)
    assert (len(found.train), len(found.val), len(found.test)) == (11, 2, 3)


def test_a_table_says_what_is_learned(words):
    pitches = {"low": 300, "high": 1200}
    lines = [f"{n}/{i}.wav,{h + 20 * i},{'x' if i < 6 else 'y'}" for n, h in pitches.items() for i in range(8)]
    (words / "pitch.csv").write_text("\n".join(["file,hertz,room", *lines]))
    options = {"table": "pitch.csv", "target": "hertz", "task": "regression", "domain": "room", "held_out": "y"}
    found = load(words, **options)
    assert found.classes == ("hertz",) and len(found.held_out) == 4 and found.task.name == "regression"
    loudest = found.held_out.images.mean(2)[:, 0].argmax(1)
    assert (loudest[found.held_out.targets[:, 0] > 1000] > loudest[found.held_out.targets[:, 0] < 1000].max()).all()


def test_anomalies_are_in_the_test_part_alone(tmp_path):
    for name, hertz in (("normal", 300), ("anomaly", 1200)):
        for i in range(10):
            write(tmp_path / name / f"{i}.wav", tone(hertz + 20 * i))
    found = load(tmp_path, task="reconstruction")
    assert not bool(found.train.targets.any()) and not bool(found.val.targets.any())
    assert int(found.test.targets.sum()) == 10 and len(found.test) == 12


def test_corruptions_are_seeded_and_harder_ones_change_more(words):
    x = np.stack([tone(300 + 20 * i) for i in range(16)]).astype(np.float32)
    first, again = changed(x, RATE, 3), changed(x, RATE, 3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for kind in CHANGES:
        by = [float(np.abs(first[f"{kind}/{severity}"] - x).mean()) for severity in (1, 3, 5)]
        assert 0 < by[0] < by[1] < by[2], kind
    found = load(words, corruptions="default", corrupted_count=2)
    assert set(found.corrupted) == set(first) and len(found.corrupted["noise/1"]) == 2
    assert not torch.equal(found.corrupted["noise/5"].images, found.corrupted["noise/1"].images)


def test_a_table_may_name_a_file_in_another_unicode_form(tmp_path):
    for name in ("cafe\u0301.wav", "tea.wav", "milk.wav", "juice.wav", "rum.wav", "gin.wav"):  # decomposed on disk
        write(tmp_path / name, tone(300))
    rows = ["file,price", "caf\u00e9.wav,3", "tea.wav,2", "milk.wav,1", "juice.wav,4", "rum.wav,5", "gin.wav,6"]
    (tmp_path / "prices.csv").write_text("\n".join(rows), encoding="utf-8")
    options = {"table": "prices.csv", "target": "price", "task": "regression", "corruptions": "none"}
    found = load(tmp_path, val_fraction=0.2, test_fraction=0.2, **options)
    assert len(found.train) + len(found.val) + len(found.test) == 6


@pytest.mark.parametrize("features", ["logmel", "mfcc"])
@pytest.mark.parametrize(("window", "hop", "bands"), [(40.0, 20.0, 32), (25.0, 10.0, 20)])
def test_the_device_runner_hears_the_features_that_were_trained_on(features, window, hop, bands):
    spec = importlib.util.spec_from_file_location("device_runner", Path(__file__).parents[2] / "export" / "runner.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    made = Spectra(8000, features, bands, 12, window, hop)
    sound = np.random.default_rng(0).standard_normal(4000)
    np.testing.assert_allclose(runner.spectra(sound, asdict(made)), made(sound), atol=2e-5)
    model = runner.Model.__new__(runner.Model)
    model.features, model.size, model.mean, model.std = (
        asdict(made),
        [1, *made(sound).shape],
        np.float32(2),
        np.float32(3),
    )
    np.testing.assert_allclose(model.preprocess(sound), (made(sound)[None] - 2) / 3, atol=2e-5)
    whole = np.clip(sound * 5000, -32768, 32767).astype(np.int16)
    np.testing.assert_allclose(model.preprocess(whole)[0], (made(whole / 32768.0) - 2) / 3, atol=2e-4)
    with pytest.raises(SystemExit, match="samples"):
        model.preprocess(np.zeros((20, 20), np.uint8))
