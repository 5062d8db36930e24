"""Crops of the photographs that scikit-image and scikit-learn ship: which photograph is a crop from?

Real pixels without a download. Every photograph is cut into five upright stripes; training crops come from the first
and third, test crops from the second and fifth, validation crops from the fourth, so that no pixel is in two splits.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAMES = ("coffee", "astronaut", "chelsea", "rocket", "retina", "ihc", "motorcycle_left", "hubble_deep_field",
         "china", "flower")  # fmt: skip
STRIPES = {"train": (0, 2), "test": (1, 4), "val": (3,)}
CROP = 80  # pixels of the photograph that one image shows


def photographs() -> dict[str, Image.Image]:
    """The photographs by name. ImportError where scikit-image is not installed."""
    import skimage
    import sklearn

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    found = {}
    for name in NAMES:
        paths = [p for folder in folders for p in folder.glob(f"{name}.*") if p.suffix in (".png", ".jpg")]
        found[name] = Image.open(paths[0]).convert("RGB")
    return found


def crops(split: str, per_class: int, side: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [N, 3, side, side] as EfficientNet-Lite takes them, (pixel - 127) / 128, and labels [N], shuffled."""
    images, labels = [], []
    for label, (name, photograph) in enumerate(photographs().items()):
        generator = np.random.default_rng([seed, zlib.crc32(f"{name}/{split}".encode())])
        width, height = photograph.size
        for _ in range(per_class):
            stripe = int(generator.choice(STRIPES[split]))
            crop = min(CROP, width // 5)
            left = stripe * width // 5 + int(generator.integers(0, width // 5 - crop + 1))
            top = int(generator.integers(0, height - crop + 1))
            piece = photograph.crop((left, top, left + crop, top + crop)).resize((side, side), Image.Resampling.BICUBIC)
            if generator.random() < 0.5:
                piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append(np.asarray(piece, dtype=np.float32))
            labels.append(label)
    order = np.random.default_rng(seed).permutation(len(labels))
    pixels = torch.from_numpy(np.stack(images)[order]).permute(0, 3, 1, 2).contiguous()
    return (pixels - 127.0) / 128.0, torch.tensor(labels)[torch.from_numpy(order)]
