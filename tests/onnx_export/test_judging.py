"""What two sets of outputs prove, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randomize_norms
from scipy.stats import beta

from flatcompress import models, quant
from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.proof import judging
from flatcompress.onnx_export.proof.roundoff import HALF, roundoff


def outputs(*margins: float, winner: int = 0) -> np.ndarray:
    """Two classes; row i is ahead by ``margins[i]``."""
    rows = np.zeros((len(margins), 2), np.float32)
    rows[:, winner] = margins
    return rows


def row(reference: np.ndarray, found: np.ndarray, roundoff: float = 0.0, step: float = 100.0) -> dict:
    return judging.compare(reference, found, step, roundoff)


@pytest.mark.parametrize("samples", [9, 51, 52, 100, 1795, 100_000])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 9])
def test_too_many_is_the_lower_limit_of_clopper_and_pearson(count, samples):
    limit = beta.ppf(judging.DOUBT, count, samples - count + 1) if count else 0.0
    assert judging.too_many(count, samples, judging.FLIPPED) == (limit > judging.FLIPPED)


def test_a_flip_that_rounding_explains_is_no_evidence_and_one_that_it_does_not_is():
    reference, found = outputs(1.0, 3.0, 3.0), outputs(1.0, 1.0, 1.0, winner=1)
    assert judging.decisive(reference, found, 0.4).tolist() == [True, True, True]
    assert judging.decisive(reference, found, 0.5).tolist() == [False, True, True]
    compared = row(reference, found, 0.5)
    assert (compared["flips"], compared["decisive"], compared["undecided"]) == (3, 2, 1 / 3)


def test_the_margin_is_taken_to_the_class_that_was_found():
    reference = np.array([[5.0, 4.9, 0.0]], np.float32)
    assert not judging.decisive(reference, np.array([[0, 1, 0]], np.float32), 0.1)[0]
    assert judging.decisive(reference, np.array([[0, 0, 1]], np.float32), 0.1)[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_never_explained(bad):
    reference = outputs(*[1.0] * 9)
    found = reference.copy()
    found[3, 0] = bad
    fine = row(reference, reference, 1e9)
    assert judging.failures(row(reference, found, 1e9), fine) and judging.failures(fine, row(reference, found, 1e9))


@pytest.mark.parametrize(("samples", "allowed"), [(9, 0), (51, 0), (100, 1), (1795, 4)])
def test_few_samples_are_judged_with_their_uncertainty(samples, allowed):
    reference = outputs(*[1.0] * samples)
    for count, refused in ((allowed, False), (allowed + 1, True)):
        found = reference.copy()
        found[:count] = found[:count, ::-1]
        compared = row(reference, found)
        assert bool(judging.failures(row(reference, reference), compared)) is refused
        assert bool(judging.failures(compared, row(reference, reference))) is refused


def test_an_output_off_by_more_than_a_step_is_refused_whatever_roundoff_may_do():
    reference = outputs(*[50.0] * 9)
    compared = row(reference, reference + np.float32(1.01), roundoff=100.0, step=1.0)
    assert compared["largest_error_steps"] > 1 and judging.failures(compared, row(reference, reference))


def test_accuracy_may_change_on_undecided_samples_alone():
    reference, found, truth = outputs(1.0, 1.0, 9.0), outputs(1.0, 1.0, 9.0), np.zeros(3, np.int64)
    found[0] = found[0, ::-1]
    assert judging.metric_failure(reference, found, truth, 0.5) == []
    assert "-0.3333" in judging.metric_failure(reference, found, truth, 0.4)[0]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    model = models.build("resnet8", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8)
    x = torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, weight_bits=8, activation_bits=8, example_input=x[:2])
    quant.calibrate(model, [x])
    return export(model.eval(), x[:2], tmp_path_factory.mktemp("lowered") / "m.onnx"), x


def test_integer_kernels_have_next_to_no_roundoff_floats_have_some_and_halves_more(lowered):
    exported, x = lowered
    exact, single, half = (
        roundoff(exported.reference, [x[:9]], **options)
        for options in ({"floats": False}, {"floats": True}, {"floats": True, "unit": HALF})
    )
    assert exact < 1e-4 * single and 0 < single < half
    assert single == roundoff(exported.reference, [x[:9]], floats=True)
    assert single == pytest.approx(roundoff(exported.reference, list(x[:9].split(2)), floats=True), rel=1.0)


def test_measuring_roundoff_leaves_the_reference_as_it_was(lowered):
    exported, x = lowered
    before = exported.reference(x)
    roundoff(exported.reference, [x], floats=True)
    assert torch.equal(before, exported.reference(x))


@pytest.mark.parametrize("samples", [9, 100])
def test_an_untrained_network_holds_although_rounding_decides_its_classes(samples, tmp_path):
    model = randomize_norms(models.build("resnet18", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8))
    x = torch.randn(samples, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    quant.quantize(model, weight_bits=8, activation_bits=8, example_input=x[:2])
    quant.calibrate(model, [x])
    certificate = certify(export(model.eval(), x[:2], tmp_path / "m.onnx"), [x], latency_runs=0, write=False)
    assert certificate["holds"], certificate["failures"]
    assert certificate["parity"]["unoptimized"]["undecided"] > 0.5
