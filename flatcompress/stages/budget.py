"""How much a stage may measure: numbers of samples and layers, from what it trained, and so the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.25  # of the training, at most, goes to the sharpness of the whole, of the layers and to the map of them
GRADIENT = 3  # forward passes that a gradient costs
HESSIAN = 6  # and a product with the Hessian
PROBES = 4  # such products for each sample of the map


@dataclass(frozen=True)
class Sizes:
    """What is measured: samples for the whole model's sharpness, for each layer's, the layers, samples of the map."""

    whole: int
    each: int
    layers: int
    map: int


def sizes(measuring: str, trained: int, layers: int, full: Sizes) -> Sizes:
    """`full` where ``measuring`` is "full" or costs at most `SHARE` of the stage's training, else as much as that buys.

    trained: samples that the stage took a gradient of, each as often as it did. layers: how many the model has.
    At least 32 samples, 8 layers and 16 samples of each are measured, 8 for the map, whatever was trained.
    """
    if measuring == "full":
        return full
    third = SHARE * GRADIENT * trained / 3  # in forward passes of one sample
    whole = _between(32, third / (GRADIENT + 2), full.whole)
    each = _between(16, third / (GRADIENT + layers), full.each)
    some = _between(8, third / each - GRADIENT, layers)
    return Sizes(whole, each, min(layers, some), _between(8, third / (PROBES * HESSIAN), full.map))


def _between(least: int, wanted: float, most: int) -> int:
    return min(most, max(least, int(wanted)))


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names at equal distances, the first and the last among them; all where there are no more."""
    if count >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]
