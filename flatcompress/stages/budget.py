"""How much is measured: samples, layers and corruptions, from what is trained, and so the same every time.

A quarter of the training, counted in forward passes, is divided evenly between the sharpness of the whole, that of the
layers with the map of them, the corrupted images and the proof. Sharpness is a stage's own; corrupted images and the
proof are those of the whole recipe, so that all rows of a ledger are of the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHARE = 0.25  # of the training, at most
PARTS = 4
GRADIENT = 3  # forward passes that a gradient costs
HESSIAN = 12  # and a product with the Hessian, which takes depthwise convolutions channel by channel
PROBES = 4  # such products for each sample of the map
GRIDS = 60  # steps of a layer's grid that the map tries
PROOF_FORWARDS = 6  # what the trained model, its reference and the file, twice, cost for a sample
PROOF_BYTES = 2 << 30
PROVED = 32  # samples that a proof is on at least
CORRUPTED, FEWEST = 32, 16  # samples of a corruption; where even these are too many of every kind, as few as the second
EVALUATED = 48  # runs of a reference that show what roundoff does, at least
DECIDING = 1 / 8  # of the stage's training: what decides its scales, or its statistics, is not cut by `measure`


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
    At least 16 samples, 4 layers and 8 samples of each are measured, 4 for the map, whatever was trained.
    """
    if measuring == "full":
        return full
    part = SHARE * GRADIENT * trained / PARTS  # in forward passes of one sample
    whole = _between(16, part / (GRADIENT + 2), full.whole)
    half = part / 2
    each = _between(8, half / (GRADIENT + layers), full.each)
    some = _between(4, half / each - GRADIENT, layers)
    return Sizes(whole, each, min(layers, some), _between(4, half / (PROBES * HESSIAN), full.map))


def probes(measuring: str, trained: int, samples: int) -> int:
    """Products with the Hessian for each of the map's ``samples``: as many as their share buys, `PROBES` at most."""
    half = SHARE * GRADIENT * trained / PARTS / 2
    return PROBES if measuring == "full" else _between(1, half / (samples * HESSIAN), PROBES)


def grids(probes: int) -> int:
    """Grids tried for each layer of the map: all, or a third where the training does not buy all the ``probes``."""
    return GRIDS if probes == PROBES else GRIDS // 3


@dataclass(frozen=True)
class Planned:
    """What a recipe trains: samples, each as often as it is read (passes do not count: methods are compared on the
    same images), and how many rows its ledger will have.
    """

    samples: int = 0
    rows: int = 1

    def forwards(self) -> float:
        """Forward passes of one sample that a part of the measuring may take for one row."""
        return SHARE * GRADIENT * self.samples / PARTS / max(1, self.rows)


def corrupted(measuring: str, planned: Planned, parts: Mapping[str, int]) -> tuple[list[str], int]:
    """Which of ``parts``, samples by "kind/severity", are measured after every stage, and on how many samples each.

    All of them where ``measuring`` is "full", nothing is trained, or they cost no more than their share; else fewer
    samples, `CORRUPTED` at least, and then fewer severities, one of every kind at least; where that is still more, of
    these fewer samples, `FEWEST` at least.
    """
    most = max(parts.values(), default=0)
    allowed = planned.forwards()
    if measuring == "full" or not planned.samples or sum(parts.values()) <= allowed:
        return list(parts), most
    kinds = {name.split("/")[0] for name in parts}
    least = _between(FEWEST, allowed / len(kinds), CORRUPTED)
    each = _between(min(least, most), allowed / len(parts), most)
    chosen = set(_by_kinds(list(parts))[: _between(len(kinds), allowed / each, len(parts))])
    return [name for name in parts if name in chosen], each


def _by_kinds(names: Sequence[str]) -> list[str]:
    """The names with one severity of every kind first, the middle one, then the hardest, then the mildest."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.split("/")[0], []).append(name)
    ordered: list[list[str]] = []
    for found in by_kind.values():
        middle = found.pop(len(found) // 2)
        ordered.append([middle, *(found.pop(-1 if i % 2 == 0 else 0) for i in range(len(found)))])
    return [row[i] for i in range(max(map(len, ordered))) for row in ordered if i < len(row)]


def proof(measuring: str, planned: Planned, samples: int, bytes_each: int) -> int:
    """How many of a test part's ``samples`` the certificate is measured on.

    All where ``measuring`` is "full"; else as many as their share of the training buys, `PROVED` at least, and no
    more than lie in `PROOF_BYTES` at once.
    """
    if measuring == "full":
        return samples
    fit = max(32, PROOF_BYTES // max(1, bytes_each))
    bought = samples if not planned.samples else _between(PROVED, planned.forwards() / PROOF_FORWARDS, samples)
    return min(samples, fit, bought)


def evaluations(measuring: str, planned: Planned, most: int) -> int:
    """How often the proof runs the reference on moved values to see what roundoff does: ``most``, or what is bought."""
    if measuring == "full" or not planned.samples:
        return most
    return _between(EVALUATED, planned.forwards() / PROOF_FORWARDS, most)


def deciding(most: int, trained: int, least: int) -> int:
    """How many samples a trained stage's scales, or its BatchNorm statistics, come from: one forward pass each.

    ``most`` of them, as far as they cost no more than `DECIDING` of the training, ``least`` at least. trained: samples
    that the stage takes a gradient of, each as often as it does.

    >>> deciding(512, 5 * 6295, 64), deciding(512, 320, 32)
    (512, 120)
    """
    return _between(min(least, most), DECIDING * GRADIENT * trained, most)


def _between(least: int, wanted: float, most: int) -> int:
    return min(most, max(least, int(wanted)))


def spread(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names at equal distances, the first and the last among them; all where there are no more."""
    if count >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]
