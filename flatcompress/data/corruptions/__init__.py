"""Corruptions in the manner of ImageNet-C (arXiv 1903.12261): fifteen kinds at five severities, and occlusion.

Own implementations in plain torch: any resolution (lengths are shares of the image side), any number of channels,
deterministic by seed, offline. Severity 1 is mild; 5 is hard, but leaves a trained network above chance. The numbers
are therefore not comparable with the released ImageNet-C files; `imagecorruptions`, the kept library, refuses
images under 32 pixels and two of its kinds fail with today's numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.corruptions import blur, digital, noise, weather
from flatcompress.data.images.pixels import ChunkedPixels
from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator, mixed
from flatcompress.registry import Registry

CORRUPTIONS = Registry("corruption")
CORRUPTIONS.add("gaussian_noise", noise.gaussian_noise, "additive sensor noise", "1903.12261")
CORRUPTIONS.add("shot_noise", noise.shot_noise, "photon counting noise", "1903.12261")
CORRUPTIONS.add("impulse_noise", noise.impulse_noise, "salt and pepper", "1903.12261")
CORRUPTIONS.add("defocus_blur", blur.defocus_blur, "out of focus", "1903.12261")
CORRUPTIONS.add("glass_blur", blur.glass_blur, "frosted glass", "1903.12261")
CORRUPTIONS.add("motion_blur", blur.motion_blur, "moved in a straight line", "1903.12261")
CORRUPTIONS.add("zoom_blur", blur.zoom_blur, "moved towards the object", "1903.12261")
CORRUPTIONS.add("snow", weather.snow, "white streaks", "1903.12261")
CORRUPTIONS.add("frost", weather.frost, "crystals from the border inwards", "1903.12261")
CORRUPTIONS.add("fog", weather.fog, "light grey clouds", "1903.12261")
CORRUPTIONS.add("brightness", weather.brightness, "overexposed", "1903.12261")
CORRUPTIONS.add("contrast", digital.contrast, "washed out", "1903.12261")
CORRUPTIONS.add("elastic_transform", digital.elastic_transform, "smoothly deformed", "1903.12261")
CORRUPTIONS.add("pixelate", digital.pixelate, "resolution lost", "1903.12261")
CORRUPTIONS.add("jpeg_compression", digital.jpeg_compression, "block artefacts", "1903.12261")
CORRUPTIONS.add("occlusion", digital.occlusion, "a grey square in the way; not part of ImageNet-C")

SEVERITIES = (1, 2, 3, 4, 5)
FULL = tuple(kind for kind in CORRUPTIONS if kind != "occlusion")
# One kind of each family and occlusion, mild, middle and hard: what the ledger measures after every stage.
DEFAULT = ("gaussian_noise", "defocus_blur", "brightness", "contrast", "pixelate", "occlusion")
DEFAULT_SEVERITIES = (1, 3, 5)


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt uint8 images [B, C, H, W]; returns new uint8 images of the same shape.

    >>> grey = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    >>> corrupt(grey, "brightness", 5).float().mean() > 200
    tensor(True)
    """
    if severity not in SEVERITIES:
        raise UserError(f"severity of {kind} must be one of 1, 2, 3, 4, 5, found {severity!r}")
    make = CORRUPTIONS[kind]
    changed = make(images.float() / 255, severity, generator(seed, kind, severity))
    return changed.clamp(0, 1).mul(255).round().to(torch.uint8)


def selection(option: Any) -> list[tuple[str, int]]:
    """(kind, severity) pairs of a data set's ``corruptions`` option.

    >>> selection(["fog", "snow/5"])
    [('fog', 1), ('fog', 2), ('fog', 3), ('fog', 4), ('fog', 5), ('snow', 5)]
    """
    if option is None or option == "none" or option is False:
        return []
    if option == "default":
        return [(kind, severity) for kind in DEFAULT for severity in DEFAULT_SEVERITIES]
    if option == "full":
        return [(kind, severity) for kind in FULL for severity in SEVERITIES]
    if isinstance(option, str) and option not in CORRUPTIONS and "/" not in option:
        raise unknown("corruptions option", option, ["default", "full", "none", *CORRUPTIONS])
    named: Iterable[Any] = [option] if isinstance(option, str) else option
    if not isinstance(named, (list, tuple)):
        raise UserError(f"data option 'corruptions' must be default, full, none or a list of kinds, found {option!r}")
    return list(dict.fromkeys(pair for item in named for pair in _pairs(str(item))))


def _pairs(item: str) -> list[tuple[str, int]]:
    kind, _, severity = item.partition("/")
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind, CORRUPTIONS)
    if not severity:
        return [(kind, each) for each in SEVERITIES]
    if severity not in map(str, SEVERITIES):
        raise UserError(f"corruption {item!r}: the severity must be one of 1, 2, 3, 4, 5, found {severity!r}")
    return [(kind, int(severity))]


def how_many(data_set: str, option: Any, count: int) -> int | None:
    """How many test samples of a set that is no images' the corruptions are measured on; None: there are none. 0: all.

    Such a set has its own kinds of corruption, all of them or none. UserError for another option.
    """
    if option in (None, "none", False):
        return None
    if option != "default" or count < 0:
        raise UserError(f"data set {data_set!r}: corruptions is default or none, corrupted_count 0 (all) or more.")
    return count


def corrupted_parts(test: Part, option: Any, count: int, seed: int) -> dict[str, Part]:
    """The chosen corruptions of (``count`` random samples of) ``test``; each is computed when first read."""
    pairs = selection(option)
    if count < 0:
        raise UserError(f"data option 'corrupted_count' must be 0 (all) or more, found {count}")
    if count and count < len(test.rows):
        chosen = torch.randperm(len(test.rows), generator=generator(seed, "corrupted"))[:count]
        test = test.take(chosen.sort().values)
    parts = {}
    for kind, severity in pairs:
        pixels = ChunkedPixels(test.pixels, test.rows, partial(_change, kind, severity, seed))
        rows = torch.arange(len(test.rows))
        parts[f"{kind}/{severity}"] = Part(pixels, rows, test.labels, test.domain_ids, test.identities, test.targets)
    return parts


def _change(kind: str, severity: int, seed: int, images: Tensor, chunk: int) -> Tensor:
    return corrupt(images, kind, severity, mixed(seed, chunk))
