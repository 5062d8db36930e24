"""What benchmarks share: a missing package in a sentence, figures that are kept; and which targets are missed."""

from __future__ import annotations

import benchmarks
from benchmarks import targets
from benchmarks._common import Kept
from flatcompress.errors import UserError


def test_a_missing_package_and_a_wrong_input_are_one_sentence_and_a_fault_is_not():
    missing = ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")
    assert benchmarks._sentence(missing).endswith("pip install scikit-learn")
    assert benchmarks._sentence(UserError("no such file")) == "no such file"
    assert benchmarks._sentence(ValueError("a fault")) is None


def test_what_was_measured_is_not_measured_again_and_can_be_read_alone(tmp_path):
    path = tmp_path / "b.partial"
    assert Kept(path).get("one", lambda: {"value": 1}) == {"value": 1}
    assert Kept(path).get("one", lambda: 1 / 0) == {"value": 1}
    assert Kept(path, measuring=False).get("two", lambda: 1 / 0) is None
    assert Kept(path).cleared().get("one", lambda: 2) == 2


def row(**different):
    same = {"network": "n", "bits": "W8A8", "target": "openvino", "breaches": [], "run": "openvino", "why_not": None,
            "equal": 1.0, "steps": 0.5, "further": 0.0}  # fmt: skip
    return {**same, **different}


def test_a_target_is_missed_where_a_rule_is_broken_or_outputs_differ_or_nothing_ran():
    assert targets.missed([row(), row(target="tensorrt", run=None, equal=None, steps=None)]) == []
    wrong = [row(breaches=["opset 12"]), row(equal=0.99), row(steps=2.0), row(run=None), row(equal=None)]
    assert [len(targets.missed([one])) for one in wrong] == [1] * len(wrong)
    assert "Not measured: qnn with n." in targets.page([row()], ["qnn with n"])
