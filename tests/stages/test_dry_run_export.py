"""What the writer refuses is known before anything is trained."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import SHAPE, config, context
from torch import nn

from flatcompress import onnx_export
from flatcompress.errors import UserError
from flatcompress.stages.dry_run import dry_run
from flatcompress.stages.export import ExportConfig


def entry(kind: str, **keys) -> tuple:
    return kind, ExportConfig.model_validate(keys) if kind == "export" else config(kind, epochs=1, **keys)


class Determinant(nn.Module):
    """No writer of ONNX has an operator for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linalg.matrix_exp(x.mean((0, 1)))[0, 0].sigmoid()


def net(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(SHAPE[0], 4, 3, padding=1), nn.ReLU(), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )


@pytest.mark.parametrize("profile", ["packed", "float32"])
def test_a_model_that_cannot_be_written_is_refused_in_the_dry_run(profile: str) -> None:
    entries = [entry("export", profile=profile)]
    if profile == "packed":
        entries.insert(0, entry("quantize", method="lsq"))
    with pytest.raises(UserError, match=rf"^stages.{len(entries) - 1}.export: .*2"):
        dry_run(context(lambda: net(Determinant())), entries)


def test_a_profile_that_does_not_fit_is_refused_in_the_dry_run() -> None:
    with pytest.raises(UserError, match="no layer is quantized"):
        dry_run(context(lambda: net(nn.Identity())), [entry("export", profile="packed")])


def test_a_raw_exception_of_the_writer_becomes_one_sentence(monkeypatch) -> None:
    def fail(*args, **keys):
        raise KeyError("axis")

    monkeypatch.setattr(onnx_export, "export", fail)
    with pytest.raises(
        UserError, match=r"stages.0.export: the file of Sequential cannot be written \(KeyError: 'axis'\)"
    ):
        dry_run(context(lambda: net(nn.Identity())), [entry("export", profile="float32")])


def test_the_dry_run_changes_neither_the_model_nor_the_random_numbers() -> None:
    work = context(lambda: net(nn.Identity()))
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    state = torch.get_rng_state()
    dry_run(work, [entry("quantize", method="lsq"), entry("export", profile="packed")])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in work.model.state_dict().items())
