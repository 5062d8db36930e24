"""The search for a better variant: every row is a valid recipe, and the winner is chosen on the source styles alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks import gaqat_variants as g
from flatcompress.sweep import pool
from flatcompress.sweep.pool import Finished
from flatcompress.sweep.spec import Sweep, parse_sweep, runs_of

ROWS = g.methods([3], (12, 6), False)


def sweep() -> Sweep:
    recipe = {"data": g.DATA, "model": g.MODEL, "stages": [g.train("none", 1)]}
    return parse_sweep({"recipe": recipe, "methods": ROWS, "seeds": [0, 1], "held_out": g.STYLES})


def finished(gains: dict[str, tuple[float, float]], seeds: int = 2) -> list[Finished]:
    """Runs of the rows in ``gains`` with that much more (validation, held-out) accuracy than 0.5."""
    made = sweep()
    found = []
    for method in made.methods:
        if method.name in gains:
            val, held = gains[method.name]
            row = {"passes": 1, "seconds": 1.0, "accuracy": {"held_out": 0.5 + held, "test": 0.5, "corrupted": None}}
            runs = runs_of(made, method, {}, made.seeds[:seeds], made.held_out)
            found += [Finished(r, Path(), [row], 0.5 + val) for r in runs]
    return found


NAIVE, DEFAULT, PUBLISHED = (f"W3A3 {n}" for n in (g.NAIVE, g.DEFAULT, g.PUBLISHED))
RUNS = finished({
    "float SAGM": (0.3, 0.3), NAIVE: (0.0, 0.0), PUBLISHED: (0.01, 0.0), DEFAULT: (0.05, 0.01),
    "W3A3 GAQAT, K 10": (0.02, 0.2), "W3A3 GAQAT, K 40": (0.03, 0.03), "W3A3 GAQAT, distilled": (0.01, 0.4),
})  # fmt: skip


def test_every_row_is_a_valid_recipe_of_its_own() -> None:
    runs = pool.check_all(sweep())
    assert len({run.key for run in runs}) == len(runs) == 4 * len(ROWS)


def test_winner_is_chosen_by_validation_and_not_by_the_held_out_style() -> None:
    assert list(g.ranking(RUNS, 3)) == [
        DEFAULT, "W3A3 GAQAT, K 40", "W3A3 GAQAT, K 10", PUBLISHED, "W3A3 GAQAT, distilled", NAIVE
    ]  # fmt: skip
    chosen = g.finalists(RUNS, [3], 1)
    assert set(chosen) == {"float SAGM", NAIVE, PUBLISHED, DEFAULT, "W3A3 GAQAT, K 40"}
    first, second, *_ = g.claims(RUNS, [3])
    assert (first.method, first.other, second.other) == ("W3A3 GAQAT, K 40", NAIVE, DEFAULT)


def test_a_row_that_lacks_runs_is_not_ranked() -> None:
    uneven = [*RUNS, *finished({"W3A3 GAQAT, freeze both": (0.2, 0.2)}, seeds=1)]
    assert "W3A3 GAQAT, freeze both" not in g.ranking(uneven, 3)


def test_table_gives_the_paired_gains() -> None:
    lines = g.gains(RUNS, 3).splitlines()
    assert "| W3A3 GAQAT, K 40 | +3.0 | +3.0 | 0.0 | +0.0 | 2 |" in lines
