#!/usr/bin/env python3
"""Run an exported model on a device: one file, needs numpy and onnxruntime, and nothing else.

    python runner.py model.onnx predict photo.png images/ frame.npy
    python runner.py model.onnx bench --threads 1 --runs 50
    python runner.py model.onnx check            # accuracy on the evidence that lies beside the model

The file itself says how its input is made (size, mean, std) and what its classes are called. PNG and JPEG need
Pillow; .npy, .pgm and .ppm are read without it. Trained on sound it takes .wav, on text .txt. In a program:

    model = Model("model.onnx")
    model.predict(frame)                         # one camera frame, uint8 [H, W, 3] or [H, W]
    model.logits(batch)                          # float32 [N, C, H, W], already normalised
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import unicodedata
import wave
from pathlib import Path

import numpy as np
import onnxruntime as ort

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".npy")


class Model:
    """An exported file: its session, its preprocessing and its class names."""

    inside = False  # whether the file computes its features from samples

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.path = Path(path)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        self.kind = np.int64 if self.input.type == "tensor(int64)" else np.float32
        meta = self.session.get_modelmeta().custom_metadata_map
        made = json.loads(meta.get("preprocessing", "{}"))
        self.size: list[int] = list(made.get("size") or self.input.shape[1:])
        self.mean = np.asarray(made.get("mean", [0.0] * self.size[0]), np.float32)
        self.std = np.asarray(made.get("std", [1.0] * self.size[0]), np.float32)
        self.classes: list[str] = json.loads(meta.get("classes", "[]"))
        self.intensity: list[float] | None = made.get("intensity")
        self.features: dict[str, object] | None = made.get("features")
        self.inside = meta.get("features") == "inside"
        self.task: dict[str, object] = json.loads(meta.get("task", '{"name": "classification", "output": "argmax"}'))
        self.metadata = dict(meta)

    def preprocess(self, image: np.ndarray | str, bgr: bool = False) -> np.ndarray:
        """An image [H, W] or [H, W, 1 | 3 | 4], uint8 or float in 0..1 -> float32 [C, H, W], normalised.

        Of a file that was trained on deeper images, 16 bits and floats are taken on the training's range of intensity.
        Inputs that are no images (series [C, T], features [F]) are taken as they are, already normalised. Of a file
        that was trained on sound, samples [N] in -1..1 become log-mel or MFCC; of text, a string becomes its tokens.
        """
        if isinstance(image, str):
            return self.tokens(image)
        if self.features is not None and "text" not in self.features:
            return self.heard(np.asarray(image))
        return self.seen(np.asarray(image), bgr)

    def seen(self, pixels: np.ndarray, bgr: bool) -> np.ndarray:
        """See `preprocess`: images, and inputs that are taken as they are."""
        if len(self.size) != 3:
            if list(pixels.shape) != self.size:
                raise SystemExit(f"the model takes inputs {self.size}, found {list(pixels.shape)}.")
            return pixels.astype(self.kind)
        low, high = self.intensity or (0.0, 1.0)
        if pixels.dtype == np.uint8:
            low, high = 0.0, 255.0
        elif pixels.dtype.kind in "iu" and self.intensity is None:
            raise SystemExit(f"{pixels.dtype} pixels, and the file does not say their range: give uint8, or 0..1.")
        if pixels.ndim not in (2, 3):
            raise SystemExit(f"an image is [H, W] or [H, W, C], found {list(pixels.shape)}.")
        deep = self.intensity is not None and pixels.dtype != np.uint8
        pixels = (pixels.astype(np.float32) - low) / (high - low)
        pixels = pixels.clip(0, 1) if deep else pixels
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        pixels = pixels[:, :, :3]
        if bgr and pixels.shape[2] == 3:
            pixels = pixels[:, :, ::-1]
        channels, height, width = self.size
        if pixels.shape[2] != channels:
            pixels = luma(pixels) if channels == 1 else np.repeat(pixels[:, :, :1], channels, axis=2)
        planes = resize(pixels, height, width).transpose(2, 0, 1)
        return (planes - self.mean[:, None, None]) / self.std[:, None, None]

    def tokens(self, text: str) -> np.ndarray:
        """A text -> int64 [length] token numbers: words and marks in small letters, 0 behind the end, 1 for unknown."""
        made: dict[str, object] = self.features or {}
        if "text" not in made:
            raise SystemExit("the model was not trained on text.")
        if made["text"] != "words":
            raise SystemExit(
                f"tokens are made by transformers' tokenizer {made.get('tokenizer')!r}: give int64 numbers."
            )
        numbers = {word: i for i, word in enumerate(made["vocabulary"], 2)}  # type: ignore[arg-type]
        words = re.findall(str(made["pattern"]), unicodedata.normalize("NFC", text).lower())
        found = [numbers.get(word, 1) for word in words][: self.size[0]]
        return np.array(found + [0] * (self.size[0] - len(found)), np.int64)

    def heard(self, sound: np.ndarray) -> np.ndarray:
        """Samples [N] (whole numbers of 16 bits, or floats in -1..1) -> float32 [1, frames, bands], normalised.

        A file that computes its features itself gets the samples. What is longer than the model hears is cut, what is
        shorter gets silence behind it.
        """
        if sound.ndim != 1 or not len(sound):
            raise SystemExit(f"the model takes sound, samples [N] of one channel, found {list(sound.shape)}.")
        if sound.dtype.kind in "iu" and sound.dtype != np.int16:
            raise SystemExit(f"{sound.dtype} samples: give int16, or floats in -1..1.")
        given = sound.astype(np.float64) / (32768.0 if sound.dtype == np.int16 else 1.0)
        made: dict[str, float] = self.features  # type: ignore[assignment]
        length, hop = (round(made["rate"] * made[key] / 1000) for key in ("window", "hop"))
        samples = (self.size[1] - 1) * hop + length
        heard = np.pad(given, (0, max(0, samples - len(given))))[:samples]
        if self.inside:
            return heard.astype(np.float32)
        found = spectra(heard, made)
        return ((found[None] - self.mean) / self.std).astype(np.float32)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """float32 [N, C, H, W], normalised -> float32 [N, classes]."""
        return self.session.run(None, {self.input.name: np.ascontiguousarray(batch, self.kind)})[0]

    def predict(self, image: np.ndarray, bgr: bool = False, top: int = 3) -> list[tuple[str, float]]:
        """The ``top`` classes of one image or camera frame and their probabilities; of other tasks see `read`."""
        if self.task["name"] != "classification":
            raise SystemExit(f"this is a file of task {self.task['name']}: use read().")
        found = softmax(self.logits(self.preprocess(image, bgr)[None])[0])
        best = np.argsort(-found)[:top]
        return [(self.classes[i] if i < len(self.classes) else str(i), float(found[i])) for i in best]

    def read(self, image: np.ndarray, bgr: bool = False) -> dict[str, object]:
        """What the file says of one input, by its task.

        classification: probabilities by class. multilabel: the labels that are there, probabilities by label. Maps and
        sequences: the class of every position, and the share of each. reconstruction: the anomaly score.
        detection: boxes. Else: numbers.
        """
        x = self.preprocess(image, bgr)
        out = self.logits(x[None])[0]
        kind = self.task.get("output")
        if self.task["name"] == "reconstruction":
            return {"anomaly_score": float(np.mean((out.reshape(-1).astype(np.float64) - x.reshape(-1)) ** 2))}
        if "boxes" in self.task:
            height, width = np.asarray(image).shape[:2]
            return {"boxes": self.boxes(out, width, height)}
        if kind == "threshold":
            shares = 1 / (1 + np.exp(-out.astype(np.float64)))
            found = {self.name(i): float(share) for i, share in enumerate(shares)}
            return {"labels": [name for name, share in found.items() if share > 0.5], "probabilities": found}
        if kind == "argmax" and out.ndim == 1:
            return {"probabilities": {self.name(i): float(share) for i, share in enumerate(softmax(out))}}
        if kind in ("argmax", "argmax_channels"):
            classes = out.argmax(0 if kind == "argmax_channels" else -1)
            shares = {self.name(int(i)): float((classes == i).mean()) for i in np.unique(classes)}
            return {"shares": shares, "classes": classes.tolist()}
        return {"values": {self.name(i): float(v) for i, v in enumerate(out.reshape(-1)[:64])}}

    def boxes(self, out: np.ndarray, width: int = 1, height: int = 1) -> list[dict[str, object]]:
        """The objects in an output [classes + 5, h, w]: class, score, and x0, y0, x1, y1 in pixels of the image."""
        keys: dict[str, float] = self.task["boxes"]  # type: ignore[assignment]
        if keys.get("format") != "fcos":
            raise SystemExit(f"boxes in the form {keys.get('format')!r} are not decoded here: use logits().")
        found = decode(out, keys["score_threshold"], keys["nms"], int(keys["most"]))
        sides = np.array([width, height, width, height])
        return [
            {"class": self.name(int(row[0])), "score": float(row[5]), "box": [float(v) for v in row[1:5] * sides]}
            for row in found
        ]

    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it reads."""
        return IMAGES if self.features is None else (".txt",) if "text" in self.features else (".wav",)

    def load(self, path: Path) -> np.ndarray | str:
        """What a file holds: an image, samples of sound, or a text."""
        if self.features is None or path.suffix == ".npy":
            return read_image(path)
        if "text" in self.features:
            return path.read_text(encoding="utf-8")
        return read_wav(path, float(self.features["rate"]))  # type: ignore[arg-type]

    def name(self, index: int) -> str:
        """What output ``index`` stands for."""
        return self.classes[index] if index < len(self.classes) else str(index)

    def bench(self, runs: int = 50) -> dict[str, float]:
        """Milliseconds for one sample: median, 10th and 90th percentile of ``runs`` timings of 2 ms and more."""
        size = self.input.shape[1:] if self.inside else self.size
        x = np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32)
        x = np.zeros((1, *size), self.kind) if self.kind == np.int64 else x
        start = time.perf_counter()
        for _ in range(3):
            self.logits(x)
        calls = max(1, min(200, round(2e-3 / max(1e-6, (time.perf_counter() - start) / 3))))
        timings = []
        for _ in range(runs):
            start = time.perf_counter()
            for _ in range(calls):
                self.logits(x)
            timings.append(1e3 * (time.perf_counter() - start) / calls)
        low, high = np.percentile(timings, [10, 90])
        return {"median_ms": statistics.median(timings), "p10_ms": float(low), "p90_ms": float(high)}


def decode(out: np.ndarray, score_threshold: float, nms: float, most: int) -> np.ndarray:
    """[D, 6] of an output [classes + 5, h, w]: class, x0, y0, x1, y1 as shares of the sides, score; the best first.

    Channels: class logits, logarithms of the distances (in cells) from a cell's centre to the left, upper, right and
    lower side, the logit of centre-ness (FCOS, arXiv 1904.01355). Overlapping boxes of a class give way to the best.
    """
    out = out.astype(np.float64)
    height, width = out.shape[1:]
    scores = (1 / (1 + np.exp(-out[:-5]))) * (1 / (1 + np.exp(-out[-1])))
    order = np.argsort(-scores.reshape(-1), kind="stable")[:most]
    order = order[scores.reshape(-1)[order] > score_threshold]
    label, row, column = np.unravel_index(order, scores.shape)
    left, up, right, down = np.exp(np.minimum(out[-5:-1], 7.0))[:, row, column]
    x, y = column + 0.5, row + 0.5
    boxes = np.stack([(x - left) / width, (y - up) / height, (x + right) / width, (y + down) / height], 1).clip(0, 1)
    kept: list[int] = []
    for i in range(len(order)):
        if all(label[i] != label[j] or overlap(boxes[i], boxes[j]) <= nms for j in kept):
            kept.append(i)
    return np.concatenate([label[kept, None], boxes[kept], scores.reshape(-1)[order[kept], None]], 1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / max(1e-12, np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def spectra(sound: np.ndarray, made: dict[str, float]) -> np.ndarray:
    """Samples [N] -> [frames, bands or coefficients]: log energies in mel bands, or their cosine transform.

    Windows of ``window`` ms every ``hop`` ms (Hann), triangles evenly spaced on the scale 2595 log10(1 + f / 700) from
    20 Hz to half the ``rate``, natural logarithm of energy + 1e-6; mfcc: the first rows of the orthonormal DCT-II.
    """
    rate, bands = made["rate"], int(made["bands"])
    length, hop = round(rate * made["window"] / 1000), round(rate * made["hop"] / 1000)
    size = 1 << (length - 1).bit_length()
    frames = np.lib.stride_tricks.sliding_window_view(sound, length)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(length + 1)[:-1], size)) ** 2 / size
    low, high = (2595 * np.log10(1 + f / 700) for f in (20.0, rate / 2))
    edges = np.linspace(low, high, bands + 2)
    at = 2595 * np.log10(1 + np.linspace(0, rate / 2, size // 2 + 1) / 700)
    rise = (at - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - at) / (edges[2:] - edges[1:-1])[:, None]
    logs = np.log(power @ np.maximum(0, np.minimum(rise, fall)).T + 1e-6)
    if made["features"] != "mfcc":
        return logs
    k, n = np.arange(int(made["coefficients"]))[:, None], np.arange(bands)
    cosines = np.cos(np.pi * k * (2 * n + 1) / (2 * bands)) * np.sqrt(2 / bands)
    cosines[0] /= np.sqrt(2)
    return logs @ cosines.T


def read_wav(path: Path, rate: float) -> np.ndarray:
    """The samples of a WAV file of 16 bits, in -1..1, the mean of its channels; it must have the model's rate."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        sys.exit(f"{path}: no WAV file of whole numbers ({error}).")
    if width != 2 or found != rate:
        sys.exit(f"{path}: {8 * width} bits, {found} samples a second; the model takes 16 bits and {rate:g}: resample.")
    return np.frombuffer(data, "<i2").reshape(-1, channels).mean(1) / 32768.0


def luma(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W, 1] (ITU-R BT.601, as Pillow does)."""
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres at half, edges repeated. Shrinking averages the pixels in reach, as Pillow does."""
    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("ih,hwc,jw->ijc", rows, pixels, columns, optimize=True).astype(np.float32)


def weights(old: int, new: int) -> np.ndarray:
    """[new, old]: how much each old pixel gives to each new one."""
    if old == new:
        return np.eye(new, dtype=np.float32)
    reach = max(1.0, old / new)
    centres = (np.arange(new) + 0.5) * old / new
    triangle = 1.0 - np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None]) / reach
    triangle = np.clip(triangle, 0.0, None)
    return (triangle / triangle.sum(axis=1, keepdims=True)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    """Probabilities from logits."""
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H, W] or [H, W, 3], or whatever a .npy holds."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix in (".pgm", ".ppm"):
        return read_netpbm(path.read_bytes())
    try:
        from PIL import Image
    except ImportError:
        sys.exit(f"{path}: reading {path.suffix} needs Pillow (pip install pillow); .npy, .pgm and .ppm do not.")
    with Image.open(path) as image:
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def read_netpbm(data: bytes) -> np.ndarray:
    """A binary .pgm (P5) or .ppm (P6) of 8 bits."""
    fields: list[bytes] = []
    position = 0
    while len(fields) < 4:
        while data[position : position + 1].isspace():
            position += 1
        if data[position : position + 1] == b"#":
            position = data.index(b"\n", position)
            continue
        start = position
        while position < len(data) and not data[position : position + 1].isspace():
            position += 1
        if start == position:
            sys.exit("not a binary .pgm or .ppm file.")
        fields.append(data[start:position])
    kind, width, height, top = fields[0], *map(int, fields[1:])
    if kind not in (b"P5", b"P6") or top != 255:
        sys.exit(f"only binary 8-bit .pgm and .ppm are read, found {kind!r} with maximum {top}.")
    shape = (height, width) if kind == b"P5" else (height, width, 3)
    return np.frombuffer(data, np.uint8, int(np.prod(shape)), position + 1).reshape(shape)


def read_evidence(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file: an 8-byte length, a JSON header, raw numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kinds = {"F32": np.float32, "I64": np.int64}
    found = {}
    for name, row in header.items():
        if name != "__metadata__":
            begin, end = row["data_offsets"]
            raw = data[8 + length + begin : 8 + length + end]
            found[name] = np.frombuffer(raw, kinds[row["dtype"]]).reshape(row["shape"])
    return found


def check(model: Model, path: Path) -> dict[str, float]:
    """Accuracy and agreement with the torch reference on the stored evidence, here."""
    evidence = read_evidence(path)
    outputs = np.concatenate(
        [model.logits(evidence["input"][i : i + 64]) for i in range(0, len(evidence["input"]), 64)]
    )
    reference, kind = evidence["reference"], model.task.get("output")
    result = {"samples": len(outputs), "largest_error": float(np.abs(outputs - reference).max())}
    if kind == "values":
        return result
    if kind == "threshold":
        guesses, theirs = outputs > 0, reference > 0
    else:
        axis = 1 if kind == "argmax_channels" else -1
        guesses, theirs = outputs.argmax(axis), reference.argmax(axis)
    result["equal_argmax"] = float((guesses == theirs).mean())
    if "label" in evidence:
        counted = evidence["label"] != model.task.get("ignore_index", -(2**31))
        result["accuracy"] = float((guesses == evidence["label"])[counted].mean())
    return result


def files_in(paths: list[Path], suffixes: tuple[str, ...] = IMAGES) -> list[Path]:
    """The images (or sounds) among files and folders, in order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
        elif path.is_file():
            found.append(path)
        else:
            sys.exit(f"{path}: no such file.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    verbs = parser.add_subparsers(dest="verb", required=True)
    predict = verbs.add_parser("predict", help="classify images and folders of images")
    predict.add_argument("paths", type=Path, nargs="+")
    predict.add_argument("--json", action="store_true", help="one JSON object a line, with logits")
    bench = verbs.add_parser("bench", help="time one sample")
    bench.add_argument("--runs", type=int, default=50)
    checking = verbs.add_parser("check", help="repeat the accuracy on the evidence beside the model")
    checking.add_argument("--evidence", type=Path)
    for verb in (predict, bench, checking):
        verb.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if not given.model.is_file():
        sys.exit(f"{given.model}: no such file.")
    model = Model(given.model, given.threads)
    if given.verb == "bench":
        print(json.dumps(model.bench(given.runs)))
    elif given.verb == "check":
        print(json.dumps(check(model, given.evidence or given.model.with_name("evidence.safetensors"))))
    else:
        plain = model.task["name"] == "classification"
        for path in files_in(given.paths, model.suffixes()):
            image = model.load(path)
            if given.json:
                values = model.logits(model.preprocess(image)[None])[0]
                said = {"classes": model.predict(image)} if plain else model.read(image)
                print(json.dumps({"path": str(path), "logits": values.tolist(), **said}))
            elif not plain:
                found = {k: v for k, v in model.read(image).items() if k != "classes"}
                print(path, json.dumps(found))
            else:
                print(path, " ".join(f"{name}={share:.3f}" for name, share in model.predict(image)))


if __name__ == "__main__":
    main()
