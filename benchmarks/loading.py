"""Loading: images augmented and decoded a second on one core, and how much of a training step waits for them.

    python -m benchmarks.loading [--quick] [--check] [--threads 1] [--against CHECKOUT]

``augment``: 224-pixel images in memory, each setting of ``data.augment``. ``before`` is the same change as one writes
it first: an affine grid sampled in float32, brightness, contrast, saturation and hue as a pass each, grey, normalised.
It is given the allocator of a run, which keeps what it frees and so helps such passes most. ``then`` is another
commit's `ImageSet`, in a process of its own, as its runs had it.
``decode``: JPEG files of 500 x 375 pixels, quality 85, to 224 pixels. ``pillow`` is Pillow's plain decode and resize;
``draft`` its scaled decoding (other pixels); ``ours`` is `FilePixels` with simplejpeg, ``without`` the same without it.
``step``: MobileNetV2 at 224 pixels trained by SGD on a folder of 20,000 such JPEGs (300 with --quick; the files hold
128 pictures), larger than memory and so decoded as it is read, batch 32: seconds of a step, and the share of them in
which it waits for its batch, with as many loading processes. ``listing`` is what the folder costs before.

Targets
  1. with ``--against`` commit 4004874: ``augment: domainbed`` at least 5 times as fast as there.
  2. ours at least 1.5 times as fast as Pillow.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import _against
from benchmarks._common import arguments, finish, interleaved, ratio
from flatcompress import data, models
from flatcompress.data import augment
from flatcompress.data.bundle import ImageSet, Part
from flatcompress.data.images import decoding, reading
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.environment import keep_freed_memory
from flatcompress.training.batches import Feed, epoch_batches

SIDE, BATCH, PICTURES = 224, 32, 128
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = {"none": None, "standard": "standard", "domainbed": "domainbed", "trivial": "trivial", "rand": "rand"}
LEAST_AUGMENT, LEAST_DECODE = 5.0, 1.5


def pictures(count: int, width: int, height: int) -> list[Image.Image]:
    """Smooth colours with grain: what a JPEG of a photograph takes, in pixels and in bytes."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 8, (height, width, 1))
        found.append(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)))
    return found


def before(images: Tensor, draws: Tensor) -> Tensor:
    """DomainBed's augmentation of uint8 images [B, 3, H, W] by draws [B, 10], a pass for every change."""
    x = images.float().div_(255)
    area, aspect = 1 - 0.3 * draws[:, 0], torch.exp((2 * draws[:, 1] - 1) * 0.14)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = (area.sqrt() * aspect).clamp(max=1) * torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = (area.sqrt() / aspect).clamp(max=1)
    theta[:, :, 2] = (2 * draws[:, 2:4] - 1) * (1 - theta[:, [0, 1], [0, 1]].abs())
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    bright, contrast, saturation = (1 + 0.3 * (2 * draws[:, 5:8] - 1)).T.reshape(3, -1, 1, 1, 1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    x = x * bright
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    grey = (x * luma).sum(1, keepdim=True)
    x = grey + (x - grey) * saturation
    turns = torch.einsum("bij,bjhw->bihw", torch.eye(3).repeat(len(x), 1, 1), x)
    x = turns.clamp(0, 1)
    x = torch.where((draws[:, 9] < 0.1).view(-1, 1, 1, 1), (x * luma).sum(1, keepdim=True).expand_as(x), x)
    return x.sub_(torch.tensor(MEAN).view(-1, 1, 1)).div_(torch.tensor(STD).view(-1, 1, 1))


def augmenting(quick: bool) -> list[dict[str, Any]]:
    """Images a second of every setting, and of `before`."""
    stored = torch.stack([torch.from_numpy(np.array(p)) for p in pictures(2 * BATCH, SIDE, SIDE)]).permute(0, 3, 1, 2)
    stored, n = stored.contiguous(), 2 * BATCH
    rows, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    part, order = Part(MemoryPixels(stored), rows, zeros, zeros, rows), [list(range(BATCH)), list(range(BATCH, n))]

    def ours(option: Any) -> Callable[[], Any]:
        found = ImageSet(part, MEAN, STD, augment.parse(option, 0))
        return lambda: [found.__getitems__(batch) for batch in order]

    def plain() -> list[Tensor]:
        return [before(stored[batch], torch.rand(BATCH, 10)) for batch in order]

    tasks = {"before": plain, **{name: ours(option) for name, option in SETTINGS.items()}}
    times = interleaved(tasks, 3 if quick else 9)
    return [
        {
            "part": "augment",
            "what": name,
            "images_a_second": n / min(seconds),
            "faster": ratio(times["before"], seconds),
        }
        for name, seconds in times.items()
    ]


# What a side of --against runs: it must do with what older commits have.
LINES = """
import sys, time, torch
from flatcompress.data import augment
from flatcompress.data.bundle import ImageSet, Part
torch.set_num_threads(int(sys.argv[1]))
try:
    from flatcompress.environment import keep_freed_memory
    keep_freed_memory()
except ImportError:
    pass
try:
    from flatcompress.data.images.pixels import MemoryPixels
except ImportError:
    from flatcompress.data.pixels import MemoryPixels
torch.manual_seed(0)
coarse, rows, zeros = torch.rand(64, 3, 14, 14), torch.arange(64), torch.zeros(64, dtype=torch.int64)
images = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
part = Part(MemoryPixels(images), rows, zeros, zeros, rows)
found = ImageSet(part, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], augment.parse("domainbed", 0))
for line in sys.stdin:
    begun = time.process_time()
    for start in (0, 32):
        found.__getitems__(list(range(start, start + 32)))
    print(time.process_time() - begun, flush=True)
"""


def against(options: argparse.Namespace, failures: list[str]) -> dict[str, Any]:
    """Images a second of another commit, with how often this one's time fits into its."""
    given = [str(options.threads)]
    here, there = _against.seconds(LINES, options.against, 3 if options.quick else 15, options.threads, given, given)
    faster = ratio(there, here)
    if faster < LEAST_AUGMENT:
        failures.append(f"augment: domainbed is {faster:.2f} times as fast as there, target {LEAST_AUGMENT}")
    return {"part": "augment", "what": "domainbed, then", "images_a_second": 64 / min(there), "now_faster": faster}


@contextmanager
def without_simplejpeg() -> Iterator[None]:
    """As where the extra ``jpeg`` is not installed."""
    kept = decoding._simplejpeg
    decoding._simplejpeg = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        decoding._simplejpeg = kept


def decoded(folder: Path, quick: bool, failures: list[str]) -> list[dict[str, Any]]:
    """Images a second from JPEG files."""
    paths = sorted(folder.rglob("*.jpg"))[: 16 if quick else 64]
    rows, files = torch.arange(len(paths)), reading.FilePixels(paths, (3, SIDE, SIDE))

    def pillow(draft: bool = False) -> None:
        for path in paths:
            with Image.open(path) as image:
                if draft:
                    image.draft("RGB", (SIDE, SIDE))
                np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    def without() -> None:
        with without_simplejpeg():
            files.gather(rows)

    tasks: dict[str, Callable[[], Any]] = {"pillow": pillow, "draft": lambda: pillow(True), "without": without}
    if decoding.decodes_jpeg():
        tasks["ours"] = lambda: files.gather(rows)
    else:
        failures.append("decode: simplejpeg is not installed (pip install 'flatcompress[jpeg]')")
    times = interleaved(tasks, 3 if quick else 9)
    if "ours" in times and (faster := ratio(times["pillow"], times["ours"])) < LEAST_DECODE:
        failures.append(f"decode: {faster:.2f} times as fast as Pillow, target {LEAST_DECODE}")
    return [
        {"part": "decode", "what": name, "images_a_second": len(paths) / min(s), "faster": ratio(times["pillow"], s)}
        for name, s in times.items()
    ]


def fill(folder: Path, count: int) -> None:
    """``count`` JPEG files in ten classes, of `PICTURES` pictures."""
    encoded = []
    for picture in pictures(min(count, PICTURES), 500, 375):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        encoded.append(file.getvalue())
    for i in range(count):
        name = folder / f"class{i % 10}"
        name.mkdir(parents=True, exist_ok=True)
        (name / f"{i:05}.jpg").write_bytes(encoded[i % len(encoded)])


def steps(folder: Path, count: int, quick: bool) -> list[dict[str, Any]]:
    """The share of a step that waits for its batch, with 0, 1 and 2 loading processes."""
    reading.MOST_BYTES = 0 if quick else reading.MOST_BYTES  # a small folder is read as the large one is
    begun = time.perf_counter()
    train = data.load("folder", path=str(folder), size=SIDE, mean=MEAN, std=STD, augment="domainbed",
                      corruptions="none").train  # fmt: skip
    assert train.on_disk
    found = [{"part": "step", "what": "listing", "seconds": time.perf_counter() - begun, "images": count}]
    model = models.build("mobilenet_v2", num_classes=10, input_shape=(3, SIDE, SIDE), seed=0).train()
    model = model.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for workers in (0, 1, 2):
        feed = Feed(train, workers)
        waits, totals = [], []
        batches = iter(feed.epoch(epoch_batches(len(train), BATCH, 0, 0)[: 4 if quick else 14]))
        while True:
            start = time.perf_counter()
            if (batch := next(batches, None)) is None:
                break
            waits.append(time.perf_counter() - start)
            sgd.zero_grad()
            F.cross_entropy(model(batch[0].contiguous(memory_format=torch.channels_last)), batch[1]).backward()
            sgd.step()
            totals.append(time.perf_counter() - start)
        feed.close()
        wait, total = sum(waits[2:]), sum(totals[2:])  # the first two begin the processes
        found.append({"part": "step", "what": f"workers {workers}", "seconds": total / len(totals[2:]),
                      "waiting": wait / total})  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all three, check the targets; returns the exit code."""
    options = arguments(__doc__, argv, _against.option)
    keep_freed_memory()
    failures: list[str] = []
    rows = augmenting(options.quick)
    if options.against is not None:
        rows.append(against(options, failures))
    count = 300 if options.quick else 20_000
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), count)
        rows += decoded(Path(folder), options.quick, failures)
        rows += steps(Path(folder), count, options.quick)
    return finish("loading", rows, failures, options, load=os.getloadavg()[0])


if __name__ == "__main__":
    raise SystemExit(main())
