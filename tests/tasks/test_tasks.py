"""Every task: what its loss and metrics mean, what it refuses, and a run to a file whose certificate holds."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from task_problems import IMAGES, PROBLEMS, SERIES, N, images

from flatcompress import Pipeline, data, onnx_export
from flatcompress.errors import UserError
from flatcompress.onnx_export.proof import judging
from flatcompress.recipe import parse_recipe
from flatcompress.recipe.identity import digest
from flatcompress.tasks import TASKS, Task, build, metrics
from flatcompress.tasks.agreement import AGREEMENTS, distillation
from flatcompress.tasks.losses import CrossEntropy

OPTIONS = {"device": "cpu", "threads": 1, "batch_size": 24}


def parts(name: str) -> dict:
    p = PROBLEMS[name]
    return {"train": (p.x[:64], p.y[:64]), "test": (p.x[64:], p.y[64:])}


def test_every_task_has_a_problem_here():
    assert set(PROBLEMS) == set(TASKS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_perfect_output_has_the_best_metric_and_the_smaller_loss(name):
    p, task = PROBLEMS[name], build(name)
    y = task.target(p.x, task.targets(p.y, "train"))
    poor = torch.zeros_like(p.perfect)
    assert float(task.loss(p.perfect, y)) < float(task.loss(poor, y))
    good, bad = (task.measure([(o[:50], y[:50]), (o[50:], y[50:])])[task.selects] for o in (p.perfect, poor))
    assert good == p.best and task.better(good, bad) and not task.better(bad, good)
    assert float(task.summed_loss(p.perfect, y)) >= 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_output_of_another_shape_is_refused_with_both_shapes(name):
    p, task = PROBLEMS[name], build(name)
    found = data.bundle(parts(name), task)
    y = found.test.task.target(p.x, task.targets(p.y, "train"))
    assert found.task.output(p.perfect, y, found.classes) is None
    assert str(tuple(p.wrong.shape)) in found.task.output(p.wrong, y, found.classes)


STAGES = [
    {"train": {"method": "sam", "epochs": 1}},
    {"prune": {"method": "magnitude", "ratio": 0.3, "epochs": 2, "schedule_steps": 1}},
    {"quantize": {"epochs": 1, "weight_bits": 4, "activation_bits": 8, "distill": 0.5, "flatness_map": False}},
    {"export": {"latency": False}},
]


@pytest.mark.filterwarnings("ignore:.*compute in floats")
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "classification"])
def test_a_run_ends_in_a_file_whose_certificate_holds_and_can_be_repeated(name, tmp_path):
    made = Pipeline(PROBLEMS[name].net(), parts(name), STAGES, task=name, name=name, **OPTIONS)
    result = made.run(tmp_path / "run")
    task, last = build(name), result.ledger[-1]
    assert result.certificate["holds"], result.certificate["failures"]
    assert result.certificate["metric"]["name"] == task.selects == last["metric"]["name"]
    assert last["metrics"][task.selects]["test"] is not None
    assert last["accuracy"]["test"] == last["metrics"].get("accuracy", {}).get("test")
    again = onnx_export.verify(tmp_path / "run")
    assert again.holds and task.selects in again.measured
    told = {e.key: e.value for e in onnx.load(result.onnx).metadata_props}
    assert json.loads(told["task"])["output"] == task.agreement


def test_a_task_of_one_s_own_runs_to_a_file_and_its_direction_selects(tmp_path):
    worst = (lambda output, y: (output - y).abs().max(), "lower")
    own = Task(loss=F.l1_loss, metrics={"bias": lambda output, y: (output - y).mean(), "worst": worst})
    x, y = IMAGES, IMAGES.mean((1, 2, 3))[:, None]
    given = {"train": (x[:64], y[:64]), "test": (x[64:], y[64:])}
    result = Pipeline(images(1), given, [STAGES[0], STAGES[2], STAGES[3]], task=own, **OPTIONS).run(tmp_path / "run")
    assert result.certificate["holds"] and result.certificate["metric"]["name"] == "worst"
    assert set(result.ledger[-1]["metrics"]) == {"bias", "worst"}
    assert "not known here" in onnx_export.verify(tmp_path / "run").notes[-1]


def test_without_a_direction_the_loss_selects():
    own = Task(loss=F.l1_loss, metrics={"bias": lambda output, y: (output - y).mean()})
    assert own.selects == "loss" and own.better(0.1, 0.2)
    found = own.measure([(torch.ones(4, 1), torch.zeros(4, 1))])
    assert found == {"bias": 1.0, "loss": 1.0}


def test_classification_is_what_it_was():
    task = build()
    z, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    assert torch.equal(task.loss(z, y), F.cross_entropy(z, y))
    assert torch.equal(task.training_loss(0.1)(z, y), F.cross_entropy(z, y, label_smoothing=0.1))
    assert torch.equal(task.summed_loss(z, y), F.cross_entropy(z, y, reduction="sum"))
    assert task.measure([(z, y)]) == {"accuracy": int((z.argmax(1) == y).sum()) / 8} and task.plain
    plain, named = ({"stages": [{"train": {}}], **more} for more in ({}, {"task": "regression"}))
    assert digest(parse_recipe(plain)) == digest(parse_recipe({**plain, "task": None}))
    assert digest(parse_recipe(plain)) != digest(parse_recipe(named))


def test_ignored_pixels_count_for_nothing():
    task, z = build({"name": "segmentation", "ignore_index": 255}), torch.randn(2, 3, 4, 4)
    y = torch.randint(0, 3, (2, 4, 4))
    y[:, 0] = 255
    other = z.clone()
    other[:, :, 0] = -z[:, :, 0] * 7
    assert torch.equal(task.loss(z, y), task.loss(other, y))
    assert task.measure([(z, y)]) == task.measure([(other, y)])
    assert float(task.loss(z, torch.full_like(y, 255))) == 0  # a batch of nothing else is no NaN


def test_focal_loss_of_gamma_zero_is_cross_entropy_and_a_sure_sample_counts_less():
    z, y = torch.tensor([[9.0, 0.0], [0.1, 0.0]]), torch.zeros(2, dtype=torch.long)
    assert torch.allclose(CrossEntropy(focal=1e-9)(z, y), F.cross_entropy(z, y))
    sure, unsure = (
        float(CrossEntropy(focal=2.0)(z[i : i + 1], y[:1]) / F.cross_entropy(z[i : i + 1], y[:1])) for i in (0, 1)
    )
    assert sure < 1e-6 < 0.2 < unsure


def test_balanced_weights_make_every_class_count_the_same():
    y = torch.tensor([0] * 6 + [1] * 2)
    task = build({"name": "classification", "class_weights": "balanced"}).fit(y, ("a", "b"))
    z = torch.zeros(8, 2)
    assert torch.allclose(task.loss.weight, torch.tensor([8 / 12, 2.0]))
    assert torch.allclose(task.loss(z, y), F.cross_entropy(z, y))
    named = build({"name": "classification", "class_weights": {"b": 3}}).fit(y, ("a", "b"))
    assert named.loss.weight.tolist() == [1, 3]


def test_metrics_are_scikit_learn_s():
    from sklearn import metrics as theirs

    g = torch.Generator().manual_seed(2)
    z, y = torch.randn(40, 3, generator=g).round(decimals=1), torch.randint(0, 3, (40,), generator=g)
    hot = F.one_hot(y, 3).float()
    scores, classes, labels, found = z.numpy(), y.numpy(), hot.numpy(), z.argmax(1).numpy()
    rows = {
        "f1": (metrics.confusion(None, 1, metrics.macro_f1), y, theirs.f1_score(classes, found, average="macro")),
        "iou": (metrics.confusion(None, 1, metrics.mean_iou), y, theirs.jaccard_score(classes, found, average="macro")),
        "recall": (
            metrics.confusion(None, 1, metrics.balanced_accuracy),
            y,
            theirs.balanced_accuracy_score(classes, found),
        ),
        "labels": (metrics.label_f1(), hot, theirs.f1_score(labels, scores > 0, average="macro")),
        "precision": (
            metrics.average_precision(),
            hot,
            theirs.average_precision_score(labels, scores),
        ),
        "r2": (metrics.r2(), z * 2, theirs.r2_score(scores * 2, scores)),
        "rmse": (metrics.mean_error(2, True), hot, theirs.root_mean_squared_error(labels.flatten(), scores.flatten())),
    }
    for name, (metric, target, expected) in rows.items():
        assert metric.finish(metric.rows(z, target).double()) == pytest.approx(expected, abs=1e-6), name
    assert metrics.auroc(z[:, 0].double(), y == 0) == pytest.approx(theirs.roc_auc_score(classes == 0, scores[:, 0]))
    assert np.isnan(metrics.auroc(z[:, 0], y < 3))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_planted_fault_in_the_outputs_is_found(name):
    p, task = PROBLEMS[name], build(name)
    reference = p.perfect.numpy()
    truth = task.target(p.x, task.targets(p.y, "t")).numpy()
    same = judging.compare(reference, reference, 1.0, 0.0, task.agreement)
    assert same["flips"] == 0 and same["bit_equal"] == 1.0
    found = copy.deepcopy(reference)
    found[: N // 2] = reference[: N // 2].mean() - found[: N // 2]
    row = judging.compare(reference, found, 1e-3, 0.0, task.agreement)
    assert judging.failures(row, same) and judging.metric_failure(reference, found, truth, 0.0, task)
    assert (row["equal_argmax"] is None) == (AGREEMENTS[task.agreement] is None)
    assert judging.metric_failure(reference, reference, truth, 0.0, task) == []


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_distillation_is_zero_at_the_teacher_and_teaches_nobody_else(agreement):
    teacher = torch.randn(3, 4, 5, 5)
    student = (teacher + 1e-3 * torch.randn_like(teacher)).requires_grad_()
    assert float(distillation(agreement, teacher, teacher)) == pytest.approx(0, abs=1e-6)
    distillation(agreement, student, teacher).backward()
    assert bool(student.grad.any())


LATE_CLASS = (torch.arange(N) >= 64).long()[:, None, None].expand(N, 8, 8)
LATE_LABEL = torch.stack([torch.ones(N), (torch.arange(N) > 70).float()], 1)
LATE_BOXES = [[[int(i >= 64), 0.1, 0.1, 0.6, 0.6]] for i in range(N)]
REFUSED = {
    "float targets": ("classification", IMAGES, torch.rand(N), "task: regression"),
    "masks": ("classification", IMAGES, PROBLEMS["segmentation"].y, "task: segmentation"),
    "multi-hot": ("classification", IMAGES, PROBLEMS["multilabel"].y.long(), "task: multilabel"),
    "one-hot": ("classification", IMAGES, torch.eye(3)[torch.arange(N) % 3], "task: multilabel"),
    "classes per step": ("classification", IMAGES, torch.full((N, 5), 2), "task: sequence"),
    "NaN": ("regression", IMAGES, torch.full((N,), torch.nan), "target 0 holds NaN"),
    "text": ("regression", IMAGES, ["a"] * N, "text"),
    "complex": ("regression", IMAGES, torch.zeros(N, dtype=torch.complex64), "complex"),
    "one number": ("regression", IMAGES, 3.0, "one number"),
    "unequal lengths": ("regression", IMAGES, torch.rand(5), "N = 5"),
    "class numbers as labels": ("multilabel", IMAGES, torch.arange(N), "task: classification"),
    "two as a label": ("multilabel", IMAGES, torch.full((N, 2), 2), "label 0 of sample 0 is 2"),
    "masks of another size": ("segmentation", IMAGES, torch.zeros(N, 4, 4).long(), "one class for every pixel"),
    "mask below zero": ("segmentation", IMAGES, torch.full((N, 8, 8), -1), "class -1 in sample 0"),
    "mask of 5000": ("segmentation", IMAGES, torch.full((N, 8, 8), 5000), "class 5000"),
    "mask of shares": ("segmentation", IMAGES, torch.rand(N, 8, 8), "class numbers"),
    "one class a sample": ("segmentation", IMAGES, torch.arange(N) % 2, r"\[N, H, W\]"),
    "one class a step": ("sequence", IMAGES, torch.arange(N) % 2, r"\[N, T\]"),
    "kinds of anomaly": ("reconstruction", IMAGES, torch.arange(N) % 5, "0 normal, 1 anomalous"),
    "anomalies to learn": ("reconstruction", IMAGES, torch.arange(N) % 2, "leave them to the test part"),
    "class missing": ("segmentation", IMAGES, LATE_CLASS, "none to learn from"),
    "boxes in pixels": ("detection", IMAGES, [[[0, 1, 1, 5, 7]]] * N, "image 0: box 0 lies outside of its image"),
    "a box without area": ("detection", IMAGES, [[], [[0, 0.5, 0.5, 0.5, 1]]] * (N // 2), "image 1: box 0 has no area"),
    "boxes of four numbers": ("detection", IMAGES, torch.rand(N, 2, 4), "class x0 y0 x1 y1 a row"),
    "boxes for one class a sample": ("detection", IMAGES, torch.arange(N) % 2, "class x0 y0 x1 y1 a row"),
    "boxes in series": ("detection", SERIES, [[]] * N, r"boxes belong to images \[C, H, W\]"),
    "class of boxes missing": ("detection", IMAGES, LATE_BOXES, "none to learn from"),
    "label missing": ("multilabel", IMAGES, LATE_LABEL, "none to learn from"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_targets_of_another_kind_are_refused_in_one_sentence(case):
    task, x, y, reason = REFUSED[case]
    cut = (lambda t, a, b: t) if isinstance(y, float) else (lambda t, a, b: t[a:b])
    with pytest.raises(UserError, match=reason) as caught:
        data.bundle({"train": (x[:64], cut(y, 0, 64)), "test": (x[64:], cut(y, 64, N))}, task)
    assert "\n" not in str(caught.value)


WRONG = {
    "an overlap of two": ({"name": "detection", "nms": 2}, "nms is a number from 0 to 1"),
    "a misspelt name": ("regresion", "Did you mean 'regression'"),
    "a key of another task": ({"name": "regression", "focal": 2}, "key of task regression 'focal'"),
    "class weights of text": ({"name": "classification", "class_weights": "even"}, "'balanced'"),
    "a weight of zero": ({"name": "classification", "class_weights": [0, 1]}, "above 0"),
    "a focal exponent below zero": ({"name": "multilabel", "focal": -1}, "exponent"),
    "an index that is text": ({"name": "segmentation", "ignore_index": "void"}, "whole number"),
    "an unknown loss": ({"name": "regression", "loss": "huber"}, "loss of task regression"),
    "an unknown metric": ({"name": "segmentation", "select": "dice"}, "metric of task segmentation"),
    "no name": ({"focal": 2}, "'name'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_recipe_s_task_is_checked_when_it_is_read(case):
    task, reason = WRONG[case]
    with pytest.raises(UserError, match=f"task: .*{reason}"):
        parse_recipe({"task": task, "stages": [{"train": {}}]})


NOT_FOR_IT = {
    "label smoothing": ({"train": {"label_smoothing": 0.1}}, images(2), "label_smoothing belongs"),
    "logits": ({"train": {"method": "tram"}}, images(2), "'tram' compares probabilities"),
    "a model of another size": ({"train": {}}, images(3), r"\(2, 3\)"),
}


@pytest.mark.parametrize("case", NOT_FOR_IT)
def test_what_a_task_cannot_do_is_said_before_anything_is_trained(case):
    stage, net, reason = NOT_FOR_IT[case]
    with pytest.raises(UserError, match=reason):
        Pipeline(net, parts("regression"), [stage], task="regression", **OPTIONS).prepare()


def test_a_loss_that_cannot_read_the_output_is_said_before_anything_is_trained():
    own = Task(loss=F.cross_entropy, metrics={})
    with pytest.raises(UserError, match="task 'own': its loss or a metric cannot read"):
        Pipeline(images(2), parts("multilabel"), [{"train": {}}], task=own, **OPTIONS).prepare()
