"""A run says where its result lies in the spread that its recipe states, and the spread changes nothing else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flatcompress.cli import printing
from flatcompress.errors import UserError
from flatcompress.recipe import identity, parse_recipe
from flatcompress.report import expected

STAGES = [{"train": {"method": "none", "epochs": 1}}]
LEDGER = [{"accuracy": {"test": 0.2}}, {"accuracy": {"test": 0.95, "held_out": 0.9, "corrupted": None}}]


def test_the_last_row_is_compared_and_what_is_outside_is_said_loudly():
    said = expected.sentences({"test": (0.9, 0.01), "held_out": (0.9, 0.0), "corrupted": (0.7, 0.1)}, LEDGER)
    assert "OUTSIDE" in said[0] and "5.0 deviations above" in said[0]
    assert "within" in said[1] and "at the mean" in said[1]
    assert "not measured" in said[2]


def test_two_deviations_are_within_and_more_are_not():
    told = [expected.sentences({"test": (mean, 0.01)}, LEDGER)[0] for mean in (0.9701, 0.9699, 0.9299, 0.9301)]
    assert ["OUTSIDE" in sentence for sentence in told] == [True, False, True, False]


def test_nothing_is_said_where_nothing_is_expected_or_no_task_has_accuracy():
    assert expected.sentences(None, LEDGER) == []
    assert expected.sentences({"test": (0.9, 0.1)}, [{"accuracy": None}])[0].startswith("test: not measured")
    assert expected.sentences({"test": (0.9, 0.1)}, [])[0].startswith("test: not measured")


def test_what_is_expected_is_no_part_of_what_a_recipe_computes():
    plain, told = parse_recipe({"stages": STAGES}), parse_recipe({"stages": STAGES, "expected": {"test": [0.9, 0.01]}})
    assert identity.digest(plain) == identity.digest(told)
    assert identity.differences(plain, told) == []
    assert parse_recipe(told.to_dict()).expected == {"test": (0.9, 0.01)}


@pytest.mark.parametrize("wrong", [{"test": 0.9}, {"test": [90, 1]}, {"test": [0.9]}, {"test": [0.9, -0.1]}])
def test_a_wrong_spread_is_refused_at_its_key(wrong):
    with pytest.raises(UserError, match="expected"):
        parse_recipe({"stages": STAGES, "expected": wrong})


def test_the_terminal_shows_it_below_the_ledger(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(printing, "_console", lambda: Console(file=out, width=200))
    empty = dict.fromkeys(("certificate", "onnx", "report", "folder"))
    printing.print_result({**empty, "ledger": [], "expected": ["test 98.5 %: within"]})
    assert "expected:   test 98.5 %: within" in out.getvalue()
