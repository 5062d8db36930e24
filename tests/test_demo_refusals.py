"""`flatcompress demo`: which runs it refuses, by the task that their data has."""

import pytest

from flatcompress import data
from flatcompress.cli import demoing
from flatcompress.errors import UserError


def test_the_task_that_the_data_brings_counts():
    gauges = data.load("drawn-gauges", train_count=8, val_count=8, test_count=8)
    with pytest.raises(UserError, match="the task of this run is 'regression'"):
        demoing._check(gauges)


def test_keys_of_classification_are_no_other_task():
    digits = data.load(
        "rotated-digits", held_out="75", size=8, corruptions="none", task={"name": "classification", "focal": 2.0}
    )
    demoing._check(digits)
