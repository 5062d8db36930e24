"""Data sets: the embedded ones, the user's own, and the corruptions they are tested under.

`load` gives a `DataBundle` of normalised `ImageSet`s: training, selection, test, the unseen domain, corruptions.
Everything is determined by the seed and nothing is downloaded. The package knows nothing of models or training.
"""

from __future__ import annotations

from flatcompress.data.bundle import DataBundle, ImageSet, collate
from flatcompress.data.corruptions import CORRUPTIONS
from flatcompress.data.in_memory import bundle
from flatcompress.data.loading import DATASETS, load
from flatcompress.data.resampling import resampled

__all__ = ["CORRUPTIONS", "DATASETS", "DataBundle", "ImageSet", "bundle", "collate", "load", "resampled"]
