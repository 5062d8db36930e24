"""The file that takes sound: its operators give numpy's features, and the model behind them says the same."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from flatcompress import Pipeline
from flatcompress.data.spectra import Spectra
from flatcompress.errors import UserError
from flatcompress.onnx_export.runtime import sessions
from flatcompress.stages import features_inside

ROOT = Path(__file__).parent.parent.parent
SETTINGS = [
    Spectra(8000, "mfcc", 40, 10),
    Spectra(16000, "logmel", 64, window=25.0, hop=10.0),
    Spectra(16000, "mfcc", 32, 32, window=32.0, hop=32.0),  # a window of the transform's own size
    Spectra(11025, "logmel", 20, window=30.3, hop=7.7),
]


@pytest.mark.parametrize("spectra", SETTINGS, ids=lambda s: f"{s.features}-{s.rate}")
@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_operators_give_the_features_of_numpy(spectra: Spectra, opset: int) -> None:
    frames, mean, std = 7, -2.5, 3.0
    proto = features_inside.front(spectra, frames, mean, std, opset, 9)
    onnx.checker.check_model(proto, full_check=True)
    waves = features_inside.drawn_sounds(spectra, features_inside.samples_of(spectra, frames))
    found = sessions.run(sessions.session(proto.SerializeToString()), [waves])
    expected = (spectra(waves)[:, None] - mean) / std
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3


def test_drawn_sounds_have_silence_and_loudness_within_range() -> None:
    waves = features_inside.drawn_sounds(SETTINGS[0], 4000)
    assert not waves[0].any() and np.abs(waves).max() <= 1.0 and np.abs(waves).max() > 0.5


def test_a_feature_that_is_off_is_a_failure() -> None:
    assert not features_inside.failures({"name": "x.onnx", "largest_feature_error": 0.0099})
    assert "numpy" in features_inside.failures({"name": "x.onnx", "largest_feature_error": 0.02})[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on few words, with both files."""
    pipeline = Pipeline(
        {"name": "ds_cnn", "width": 8, "depth": 1},
        {"name": "drawn-words", "train_count": 96, "test_count": 24, "corruptions": "none", "batch_size": 32},
        [
            {"train": {"epochs": 1}},
            {"quantize": {"epochs": 0, "weight_bits": 8, "activation_bits": 8}},
            {"export": {"features": "inside", "latency": False}},
        ],
        measure="off",
    )
    folder = tmp_path_factory.mktemp("words") / "run"
    assert pipeline.run(folder).certificate["holds"]
    return folder


def test_the_certificate_says_how_far_its_features_are_and_the_answers_are_the_same(run: Path) -> None:
    section = json.loads((run / "certificate.json").read_text())["features"]
    assert section["largest_feature_error"] < 1e-3
    assert section["equal_class"] >= 0.95
    assert (run / section["name"]).stat().st_size == section["bytes"]


def test_the_device_runner_gives_the_file_samples(run: Path) -> None:
    spec = importlib.util.spec_from_file_location("runner_of_sound", ROOT / "export" / "runner.py")
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    plain, inside = (runner.Model(run / name) for name in ("model.onnx", features_inside.NAME))
    sound = np.sin(2 * np.pi * 440 * np.arange(3000) / 8000) * 0.3  # shorter than what the model hears
    assert inside.preprocess(sound).shape == tuple(inside.session.get_inputs()[0].shape[1:])
    a, b = (model.logits(model.preprocess(sound)[None]) for model in (plain, inside))
    assert a.argmax() == b.argmax() and np.abs(a - b).max() <= 0.1 * np.abs(a).max()
    assert inside.bench(runs=1)["median_ms"] > 0


def test_inputs_that_are_no_sound_are_refused_before_training(tmp_path: Path) -> None:
    stages = [{"train": {"epochs": 1}}, {"export": {"features": "inside", "profile": "float32"}}]
    pipeline = Pipeline({"name": "resnet8"}, {"name": "rotated-digits", "held_out": "75"}, stages)
    with pytest.raises(UserError, match=r"stages\.1\.export: features: inside is for data sets of sound"):
        pipeline.run(tmp_path / "run")


def test_an_opset_without_stft_is_refused() -> None:
    with pytest.raises(UserError, match="opset 17"):
        Pipeline(
            {"name": "ds_cnn"},
            {"name": "drawn-words"},
            [{"train": {}}, {"export": {"features": "inside", "opset": 14}}],
        )


def test_settings_are_the_ones_that_the_data_set_tells() -> None:
    assert features_inside.spectra_of(dataclasses.asdict(SETTINGS[1])) == SETTINGS[1]
