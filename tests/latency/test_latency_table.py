"""The latency table: what it measures, how it reads widths between, and budgets in milliseconds. No figure is a clock's
but where the test says so, and none is compared with another clock's."""

from __future__ import annotations

import json

import onnxruntime as ort
import pytest
import torch
from stage_pieces import config, context
from torch import nn

from flatcompress import models
from flatcompress.errors import RunError, UserError
from flatcompress.latency import table as latency_table
from flatcompress.latency.table import Curve, LatencyTable, LayerCost, grid, pairs
from flatcompress.onnx_export.runtime import kernel_time, sessions
from flatcompress.prune import CostModel, Limits, Width
from flatcompress.stages import prune

CONV = {"kind": "conv", "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "size": [6, 6],
        "inputs": 16, "outputs": 16, "depthwise": False}  # fmt: skip
DEPTHWISE = {**CONV, "depthwise": True}
LINEAR = {"kind": "linear", "rows": 1, "inputs": 32, "outputs": 10, "depthwise": False}


def work_ms(shape, widths, threads=1):
    """Times of a machine that pays for whole blocks of 8 outputs, and nothing else."""
    return {(i, o): 1e-4 * (1 if shape["depthwise"] else i) * -(-o // 8) * 8 for i, o in widths}


@pytest.fixture
def steady(tmp_path, monkeypatch):
    """A machine whose networks take twice their kernels' sum and 0.1 ms."""
    monkeypatch.setenv("FLATCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(latency_table, "kernel_ms", work_ms)

    def networks_ms(models, example, threads=1, activation_bits=8):
        shapes = [latency_table.layer_shapes(m, example) for m in models]
        sums = [sum(work_ms(s, [(s["inputs"], s["outputs"])]).popitem()[1] for s in own.values()) for own in shapes]
        clip = 0.05 if activation_bits < 8 else 0.0
        return [(CostModel(m, example).dense, 0.1 + clip + 2 * total) for m, total in zip(models, sums, strict=True)]

    monkeypatch.setattr(latency_table, "networks_ms", networks_ms)


@pytest.mark.parametrize("shape", [CONV, DEPTHWISE, LINEAR], ids=["conv", "depthwise", "linear"])
def test_every_width_is_timed_as_an_integer_kernel(shape):
    widths = pairs({**shape, "inputs": 8, "outputs": 8}) if shape is not LINEAR else [(16, 5), (32, 10)]
    times = kernel_time.kernel_ms(shape, widths)
    assert set(times) == set(widths) and min(times.values()) > 0
    counts = sessions.kernels(kernel_time.side_by_side(shape, widths)).counts
    assert counts["QGemm" if shape is LINEAR else "QLinearConv"] == len(widths)


def test_large_layers_are_timed_in_several_sessions(monkeypatch):
    monkeypatch.setattr(kernel_time, "SESSION_BYTES", 16 * 16 * 9 + 1)
    widths = [(16, 16), (16, 8), (8, 8), (16, 16)]
    assert kernel_time._parts(CONV, widths) == [[(16, 16)], [(16, 8), (8, 8)], [(16, 16)]]


def test_a_profiler_that_names_no_kernels_is_an_error_not_a_zero(monkeypatch):
    monkeypatch.setattr(kernel_time, "_profiled", lambda model, threads: {})
    with pytest.raises(RunError, match=r"widths \(8, 8\)"):
        kernel_time.kernel_ms(CONV, [(8, 8)])


def test_disturbed_runs_do_not_count():
    assert kernel_time._fastest([0, 0, 0, 0]) == 5e-4
    assert kernel_time._fastest([5, 5, 6, 900, 5, 4, 900, 900, 900, 900, 900, 900]) == pytest.approx((4 + 5 + 5) / 3e3)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 16), (16, 24), (24, 144), (64, 512), (512, 1000), (1280, 10)])
def test_widths_that_the_default_rounding_leaves_are_on_the_grid(inputs, outputs):
    ins, outs = grid({**CONV, "inputs": inputs, "outputs": outputs})
    wide = grid({**DEPTHWISE, "inputs": outputs, "outputs": outputs})[1]
    assert ins[-1] == inputs and outs[-1] == outputs and len(outs) <= 33
    limits = Limits()
    for width, found in ((inputs, ins if inputs <= 64 else []), (outputs, wide)):
        group = type("G", (), {"units": width, "channels": width, "kind": "channels"})
        allowed = set(range(limits.least(group), width + 1, limits.step(group))) if found else set()
        assert allowed <= set(found)


def test_between_outputs_the_dearer_neighbour_and_between_inputs_a_line():
    cost = LayerCost([4, 8], [8, 16, 24], [[1.0, 3.0, 2.0], [2.0, 6.0, 4.0]])
    assert cost(Width(8, 16, 1)) == 6.0
    assert cost(Width(8, 17, 1)) == cost(Width(8, 23, 1)) == 6.0
    assert cost(Width(8, 9, 1)) == 6.0 and cost(Width(8, 3, 1)) == 2.0
    assert cost(Width(6, 24, 1)) == 3.0 and cost(Width(2, 24, 1)) == 2.0
    depthwise = LayerCost([24], [8, 16, 24], [[1.0, 3.0, 2.0]])
    assert depthwise(Width(16, 16, 16)) == 3.0


def test_curve_of_few_points_is_a_line():
    line = Curve([[2.0, 3.0], [4.0, 6.0], [8.0, 12.0]])
    assert line(6.0) == pytest.approx(9.0) and line(1.0) == pytest.approx(1.5) and line(10.0) == pytest.approx(15.0)
    assert Curve([[2.0, 5.0]])(4.0) == pytest.approx(10.0)


def test_curve_of_five_points_bends_and_goes_straight_on():
    points = [[float(x), 1 + x - 0.04 * x * x] for x in (10, 2, 4, 6, 8)]
    curve = Curve(points)
    assert curve(5.0) == pytest.approx(5.0) and curve(10.0) == pytest.approx(7.0)
    assert curve(20.0) == pytest.approx(7.0 + 0.2 * 10) and curve(1.0) == pytest.approx(2.84 - 0.84)


@pytest.mark.parametrize(
    "points",
    [
        [[4.0, 5.0], [2.0, 1.0]],  # the profiler's own cost makes the offset negative
        [[4.0, 4.0], [2.0, 5.0]],
        [[4.0, 4.0], [4.0, 3.0]],
        [[9.0, 5.0], [8.0, 6.0], [6.0, 6.0], [4.0, 4.0], [2.0, 1.0], [1.0, 0.1]],
    ],
)
def test_curve_rises_from_above_nothing_whatever_was_timed(points):
    found = [Curve(points)(0.1 * x) for x in range(1, 200)]
    assert found[0] > 0 and found == sorted(found)


def test_the_dense_network_counts_twice():
    dense, others = [4.0, 6.0], [[2.0, 3.0], [8.0, 13.0]]
    assert abs(Curve([dense, *others])(4.0) - 6.0) < abs(Curve([*others, dense])(4.0) - 6.0)


def test_estimate_is_the_network_not_the_sum_of_its_kernels(steady):
    work = context()
    table = LatencyTable(work.model, work.example())
    assert table(table.dense) == pytest.approx(0.1 + 2 * table.kernels(table.dense))
    half = {name: w._replace(outputs=max(1, w.outputs // 2)) for name, w in table.dense.items()}
    assert table(half) == pytest.approx(0.1 + 2 * table.kernels(half)) and table(half) < table(table.dense)


def test_what_is_measured_once_is_kept(steady, monkeypatch):
    work = context()
    first = LatencyTable(work.model, work.example())
    monkeypatch.setattr(latency_table, "kernel_ms", None)
    monkeypatch.setattr(latency_table, "networks_ms", None)
    again = LatencyTable(work.model, work.example())
    assert again(again.dense) == first(first.dense)


def test_activations_below_8_bits_have_times_of_their_own_and_the_same_kernels(steady, monkeypatch):
    work = context()
    eight = LatencyTable(work.model, work.example())
    monkeypatch.setattr(latency_table, "kernel_ms", None)
    four = LatencyTable(work.model, work.example(), activation_bits=4)
    assert four(four.dense) - eight(eight.dense) == pytest.approx(0.05)
    monkeypatch.setattr(latency_table, "networks_ms", None)
    assert LatencyTable(work.model, work.example(), activation_bits=2)(four.dense) == four(four.dense)
    assert LatencyTable(work.model, work.example())(eight.dense) == eight(eight.dense)


def test_another_network_of_the_same_layers_is_measured_as_a_whole(steady, tmp_path):
    small, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.zeros(1, 3, 8, 8)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    path = tmp_path / "table.json"
    LatencyTable(small, x, path)
    layers = json.loads(path.read_text())["layers"]
    LatencyTable(other, x, path)
    found = json.loads(path.read_text())
    assert found["layers"] == layers and len(found["networks"]) == 2


def test_the_first_figure_of_two_processes_counts_for_both(tmp_path):
    path = tmp_path / "table.json"
    latency_table.keep(path, {"layers": {"a": {"8x8": 1.0}}, "networks": {"n": [[1.0, 2.0]]}})
    late = {"layers": {"a": {"8x8": 9.0, "8x16": 2.0}, "b": {"1x1": 3.0}}, "networks": {"n": [[9.0, 9.0]]}}
    kept = latency_table.keep(path, late)
    assert kept["layers"] == {"a": {"8x8": 1.0, "8x16": 2.0}, "b": {"1x1": 3.0}}
    assert kept["networks"] == {"n": [[1.0, 2.0]]} and json.loads(path.read_text()) == kept


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"layers": {"a": 1}, "networks": {}}', '{"layers": {"a": {"8x8": -1}}, "networks": {}}',
     '{"layers": {}, "networks": {"n": [[1, NaN]]}}', '{"layers": {}, "networks": {"n": [[1]]}}'],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    assert latency_table._load(path) == {"layers": {}, "networks": {}}


def test_the_file_is_per_machine_threads_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("FLATCOMPRESS_CACHE", str(tmp_path))
    one, two = latency_table.cache_file(1), latency_table.cache_file(2)
    monkeypatch.setattr(ort, "__version__", "0.0.1")
    older = latency_table.cache_file(1)
    monkeypatch.setattr(latency_table, "machine", lambda: {"processor": "another"})
    assert len({one, two, older, latency_table.cache_file(1)}) == 4


def work_of(widths):
    """Channels times channels: a cost that every cut lowers."""
    return float(sum(w.inputs // w.groups * w.outputs for w in widths.values()))


def test_networks_timed_as_a_whole_are_cut_evenly_and_by_cost():
    model = models.build("ds_cnn", num_classes=4, input_shape=(1, 8, 8), seed=0).eval()
    x = torch.zeros(2, 1, 8, 8)
    cuts = latency_table.some_cuts(model, x, work_of)
    widths = [CostModel(cut, x).dense for cut in cuts]
    dense, costs = widths[0], [work_of(w) for w in widths]
    assert len(cuts) == 7 and all(w.outputs == dense[n].outputs // 2 for n, w in widths[2].items() if n != "fc")
    assert costs[0] > costs[1] > costs[2] > costs[3]
    for share, cost in zip(latency_table.WEIGHED, costs[4:], strict=True):
        assert 0.9 * share * costs[0] < cost <= share * costs[0]


def test_networks_are_timed_as_exported_and_the_model_is_not_changed():
    model = models.build("ds_cnn", num_classes=4, input_shape=(1, 8, 8), seed=0).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = latency_table.networks_ms(latency_table.some_cuts(model, x, work_of)[:1], x)
    assert found[0][0] == CostModel(model, x).dense and found[0][1] > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_prunable_channels_has_its_dense_point():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert len(latency_table.some_cuts(model, torch.zeros(1, 3, 2, 2), work_of)) == 1


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Conv1d(3, 4, 3), torch.zeros(1, 3, 8)),
        (nn.Conv2d(8, 8, 3, groups=2), torch.zeros(1, 8, 8, 8)),
        (nn.Conv2d(3, 8, 3, padding="same"), torch.zeros(1, 3, 8, 8)),
    ],
)
def test_layers_that_are_not_timed_are_refused_by_name(model, x):
    with pytest.raises(UserError, match=r"^0: a latency budget takes"):
        latency_table.layer_shapes(nn.Sequential(model), x)


def test_latency_budget_is_met_by_the_estimate(steady):
    work = context()
    table = LatencyTable(work.model, work.example())
    removal = prune.Removal(work, config("prune", method="magnitude", latency=0.8))
    keep = removal.choose(removal.budget)
    assert table(removal.costs.widths(removal.groups, keep)) <= 0.8 * table(table.dense) * 1.0001
    for key, value, least in (("latency_ms", 1e-9, 0.1), ("latency", 1e-9, 0.1 / table(table.dense))):
        with pytest.raises(UserError, match=rf"^{key} 1e-09 cannot be met: the smallest that can is") as error:
            prune.dry_run(work.build(), work.example(), config("prune", **{key: value}))
        assert least < float(str(error.value).split("can is ")[1].split()[0]) < 1
    with pytest.raises(UserError, match="within the latency_ms budget 1000 already"):
        prune.dry_run(work.build(), work.example(), config("prune", latency_ms=1000))


def test_a_real_table_estimates_what_was_never_timed(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )
    table = LatencyTable(
        model.eval(), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "table.json"
    )
    narrow = {"0": Width(3, 6, 1), "2": Width(6, 10, 1), "5": Width(160, 4, 1)}
    assert table(narrow) > 0 and table(table.dense) > 0
    found = json.loads((tmp_path / "table.json").read_text())
    assert len(found["layers"]) == 3 and len(next(iter(found["networks"].values()))) >= 4
