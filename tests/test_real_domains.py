"""The benchmark on real drawings: which runs it makes, and what it makes of their figures."""

from __future__ import annotations

import pytest

from benchmarks import _real_page as page
from benchmarks import real_domains
from benchmarks._real_rows import FLOATS, NETWORKS, cells, contest, cuts, ladder
from flatcompress.recipe import parse_recipe

A, B = "W3A3 GAQAT as published", "W3A3 LSQ+SAGM"


def runs(gains: list[float], network: str = "Lite0") -> dict[str, dict]:
    def told(value: float) -> dict:
        parts = dict.fromkeys(page.PARTS, value)
        return {"accuracy": parts, "val": value, "passes": 9, "cpu_seconds": 1.0, "sharpness": 0.1, "travel": {}}

    found = {}
    for seed, gain in enumerate(gains):
        base = 0.3 + 0.05 * seed  # starts differ by far more than rows do
        found[f"{network} / cartoon / {seed} / {B}"] = told(base)
        found[f"{network} / cartoon / {seed} / {A}"] = told(base + gain / 100)
    found[f"{network} / render / 0 / {A}"] = told(0.9)  # without its pair
    return found


def test_differences_are_taken_over_pairs_alone() -> None:
    gain = page.paired(page.read(runs([1.0, 3.0, 2.0, 2.0])), "Lite0", A, B, "held_out")
    assert gain is not None and gain.mean == pytest.approx(2.0) and len(gain.values) == 4
    assert gain.deviation == pytest.approx((2 / 3) ** 0.5) and gain.error == pytest.approx((2 / 3) ** 0.5 / 2)
    assert gain.pairs_for_a_point == 3  # standard error 0.5 at (2 * 0.816)^2 = 2.7 pairs


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.0], "holds"), ([2.0, 2.1, 1.9], "DOES NOT HOLD"),  # too few pairs
        ([4.0, -3.0, 3.0, -2.0, 1.0], "DOES NOT HOLD"), ([], "NOT MEASURED"),
    ],
)  # fmt: skip
def test_a_rule_wins_by_two_standard_errors_over_five_pairs(gains: list[float], said: str) -> None:
    found = page.read(runs(gains))
    verdict = next(v for v in page.verdicts(found) if "LSQ+SAGM on Lite0" in v)
    assert verdict.startswith(said)
    assert verdict in page.page(found, page.verdicts(found))


def test_the_row_that_is_measured_against_float_is_chosen_by_validation_and_not_by_its_test() -> None:
    chosen, lucky = ladder(4)[4].name, ladder(4)[7].name

    def told(val: float, test: float) -> dict:
        return {"accuracy": dict.fromkeys(page.PARTS, test), "val": val, "passes": 9, "sharpness": 0.1, "travel": {}}

    found = page.read({
        "Lite0 / cartoon / 0 / float ERM": told(0.50, 0.50), f"Lite0 / cartoon / 0 / {chosen}": told(0.48, 0.46),
        f"Lite0 / cartoon / 0 / {lucky}": told(0.40, 0.50),
    })  # fmt: skip
    verdict = page.verdicts(found)[0]
    assert verdict.startswith("DOES NOT HOLD") and chosen in verdict and "-4.0" in verdict


def test_every_run_begins_with_a_float_start_of_the_same_pair_and_is_a_valid_recipe() -> None:
    options = real_domains._common.arguments(None, [], real_domains._own)
    wanted = real_domains.chosen(options)
    seen: set[str] = set()
    for cell in wanted:
        if not cell.row.is_start:
            assert real_domains.start_of(cell).key in seen
        seen.add(cell.key)
    assert len(seen) == len(wanted)
    for network in NETWORKS:
        rows = [*FLOATS, *(row for bits in (3, 4) for row in [*ladder(bits), *contest(bits)]), *cuts(0.25)]
        for row in rows:
            stage = row.stage(network, 4)
            weights = {} if row.is_start else {"weights": "w.safetensors"}
            parse_recipe({"model": {**NETWORKS[network], **weights}, "stages": [stage]}, row.name)


def test_rows_that_are_compared_differ_in_what_their_name_says_alone() -> None:
    reference, *rest = contest(3)
    fixed = next(row for row in rest if row.name.endswith("scales fixed"))
    assert {**fixed.keys, "scale_stop": None} == {**reference.keys, "scale_stop": None}
    published = next(row for row in rest if row.name == A)
    assert {k: v for k, v in published.keys.items() if k not in ("K", "tau", "tau_kind")} == reference.keys


def test_the_best_rows_come_first() -> None:
    order = [c.row.name for c in cells([0, 1], ["cartoon"], list(NETWORKS))]
    assert order.index("W4A4 post-training alone") < order.index("W4A4 LSQ: + distilled")
    assert order.index("W4A4 LSQ: + distilled") < order.index(A) < order.index("W3A3 LSQ+SAM")


def test_without_the_pictures_it_says_how_to_get_them(tmp_path, capsys) -> None:
    assert real_domains.main(["--data", str(tmp_path)]) == 2
    assert "flatcompress data emoji-domains" in capsys.readouterr().err
