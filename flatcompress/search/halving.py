"""Who goes on to the next fidelity: asynchronous successive halving for several objectives.

ASHA (arXiv 1810.05934, algorithm 2): a free worker promotes a point that is in the best 1/eta of its rung, from the
highest rung down, and begins a new one where there is none. Best, of several objectives, is by non-dominated sorting
and, within a front, crowding distance (NSGA-II), as in MO-ASHA (arXiv 2106.12639); a point within the budgets goes
before one that is not (constrained domination).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A point of the space as one fidelity sees it. ``values``: all to be minimised; ``violation``: of the budgets."""

    number: int
    values: tuple[float, ...]
    violation: float = 0.0


def dominates(a: Point, b: Point) -> bool:
    """Is ``a`` nowhere worse and somewhere better? Within the budgets beats outside, nearer beats farther.

    >>> dominates(Point(0, (1, 2)), Point(1, (1, 3))), dominates(Point(0, (1, 2)), Point(1, (0, 3)))
    (True, False)
    """
    if a.violation or b.violation:
        return a.violation < b.violation
    return all(x <= y for x, y in zip(a.values, b.values)) and a.values != b.values


def fronts(points: Sequence[Point]) -> list[list[Point]]:
    """The points in fronts: none of the first is dominated, none of the second but by the first, and so on."""
    left, found = list(points), []
    while left:
        best = [p for p in left if not any(dominates(q, p) for q in left)]
        found.append(best)
        chosen = {p.number for p in best}
        left = [p for p in left if p.number not in chosen]
    return found


def crowding(front: Sequence[Point]) -> dict[int, float]:
    """Crowding distance by number (NSGA-II): how far the neighbours are, infinite at the ends."""
    distance = {p.number: 0.0 for p in front}
    for i in range(len(front[0].values)):
        ordered = sorted(front, key=lambda p: (p.values[i], p.number))
        extent = ordered[-1].values[i] - ordered[0].values[i]
        distance[ordered[0].number] = distance[ordered[-1].number] = math.inf
        for before, point, after in zip(ordered, ordered[1:], ordered[2:]):
            if extent:
                distance[point.number] += (after.values[i] - before.values[i]) / extent
    return distance


def ranked(points: Sequence[Point]) -> list[int]:
    """Numbers from the best to the worst: by front, within it the least crowded first, then the earliest.

    >>> ranked([Point(0, (3, 3)), Point(1, (1, 2)), Point(2, (2, 1)), Point(3, (0, 0), violation=1)])
    [1, 2, 0, 3]
    """
    order = []
    for front in fronts(points):
        distance = crowding(front)
        order += sorted((p.number for p in front), key=lambda n: (-distance[n], n))
    return order


def promotion(rungs: Sequence[Sequence[Point]], entered: Mapping[int, int], factor: int) -> tuple[int, int] | None:
    """(number, rung) of a point to go on to ``rung``, from the highest rung down; None where none may.

    ``rungs``: the points that each fidelity has judged; ``entered``: the highest rung that a point has begun.
    """
    for rung in range(len(rungs) - 2, -1, -1):
        best = ranked(rungs[rung])[: len(rungs[rung]) // factor]
        waiting = [number for number in best if entered.get(number, rung) == rung]
        if waiting:
            return waiting[0], rung + 1
    return None
