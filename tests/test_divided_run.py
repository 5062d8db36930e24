"""Runs of two processes that divide the weights: resumed equals undisturbed, a file comes out, misuse is told early."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import recipe, under_torchrun

from flatcompress import Pipeline
from flatcompress.errors import UserError
from flatcompress.recipe import parse_recipe
from flatcompress.training.callback import Callback

SYNCED = {"perturb": "synced", "epochs": 2}
STAGES = [
    {"train": {"method": "sam", "rho": 0.05, "averaging": "swad", **SYNCED}},
    {"quantize": {"method": "gaqat", "K": 5, "weight_bits": 4, "activation_bits": 4, **SYNCED}},
    {"export": {"profile": "packed"}},
]


class Stopped(RuntimeError):
    """The machine went away."""


class Stop(Callback):
    """Ends the run after so many steps, in all stages together."""

    def __init__(self, after: int) -> None:
        self.left = after

    def after_step(self, step: int) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped


def raw(**changes):
    return recipe(**{"strategy": "fsdp", "checkpoint_every": 1, "stages": STAGES, **changes})


def run(folder: Path, *callbacks: Callback):
    given = raw()
    model, data, stages = (given.pop(key) for key in ("model", "data", "stages"))
    return Pipeline(model, data, stages, callbacks=callbacks, **given).run(folder)


def work(folder: Path) -> None:
    """In one of the two processes: an undisturbed run, and one that is stopped in each of its trainings."""
    straight = run(folder / "straight")
    resumed, stops = None, 0
    for after in (5, 9, 10**6):
        try:
            resumed = run(folder / "resumed", Stop(after))
        except Stopped:
            stops += 1
    found = {"straight": straight.model.state_dict(), "resumed": resumed.model.state_dict()}
    if os.environ["RANK"] == "0":
        found["holds"] = straight.certificate["holds"]
    torch.save({**found, "stops": stops}, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes found."""
    folder = tmp_path_factory.mktemp("divided")
    return under_torchrun(Path(__file__), folder)


@pytest.mark.slow
def test_resumed_equals_undisturbed_and_the_processes_agree(two):
    first, second = two
    assert first["stops"] == 2 and first["holds"] is True
    for name, value in first["straight"].items():
        assert torch.equal(first["resumed"][name], value), name
        assert torch.equal(second["straight"][name], value), name


def test_one_process_has_nothing_to_divide(tmp_path):
    runs = {}
    for strategy in ("ddp", "fsdp"):
        given = raw(strategy=strategy, stages=[{"train": {"method": "sam", "perturb": "synced", "epochs": 1}}])
        runs[strategy] = Pipeline.from_recipe(parse_recipe(given, "recipe")).run(tmp_path / strategy).model.state_dict()
    assert all(torch.equal(runs["fsdp"][name], value) for name, value in runs["ddp"].items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": recipe()["stages"]}, "climbs in every process by itself"),
        ({"stages": [STAGES[0], recipe()["stages"][1]]}, "ranks, cuts or masks weights"),
        ({"stages": [{"train": {"method": "tram", **SYNCED}}]}, "runs the network with other weights"),
        ({"stages": [{"quantize": {"method": "cage"}}]}, "cage works on weights outside"),
        ({"stages": [{"quantize": {"dampen": 0.1}}]}, "dampen works on weights outside"),
        ({"precision": "fp16"}, "Take bf16 or no"),
        ({"memory_format": "channels_last"}, "Take contiguous or auto"),
    ],
)
def test_what_divided_weights_do_not_allow_is_refused_before_anything_runs(changes, said):
    with pytest.raises(UserError, match=said):
        parse_recipe(raw(**changes), "recipe")
