"""Initial weights: exact round trips, and errors that name the file and the first key."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatcompress.errors import UserError
from flatcompress.models import build, load_weights

torch.set_num_threads(1)


def net(seed: int = 0, classes: int = 5) -> nn.Module:
    return build("resnet8", num_classes=classes, input_shape=(3, 16, 16), seed=seed)


def save(state: dict, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("nest", [False, True])
def test_weights_come_back_exactly(tmp_path, name, nest):
    state = net().state_dict()
    if nest:
        state = {f"module.{key}": value for key, value in state.items()}  # as DistributedDataParallel saves
        state = {"state_dict": state, "epoch": 3} if name.endswith(".pt") else state
    path = save(state, tmp_path / name)
    loaded = build("resnet8", num_classes=5, input_shape=(3, 16, 16), seed=9, weights=str(path))
    assert all(torch.equal(a, b) for a, b in zip(net().state_dict().values(), loaded.state_dict().values()))


def test_step_counters_may_be_missing(tmp_path):
    state = {k: v for k, v in net().state_dict().items() if not k.endswith("num_batches_tracked")}
    load_weights(net(1), save(state, tmp_path / "w.pt"))


def test_a_new_head_keeps_the_rest(tmp_path):
    path = save(net(classes=9).state_dict(), tmp_path / "w.safetensors")
    model = build("resnet8", num_classes=5, input_shape=(3, 16, 16), seed=3, weights=str(path), new_head=True)
    assert torch.equal(model.conv1.weight, net(classes=9).conv1.weight)
    assert not torch.equal(model.conv1.weight, net(3).conv1.weight)
    assert torch.equal(model.fc.weight, net(3).fc.weight)


def _drop(state):
    del state["layer1.0.conv1.weight"]


def _extra(state):
    state["layer9.weight"] = torch.zeros(1)


def _reshape(state):
    state["fc.weight"] = torch.zeros(3, 64)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (_drop, ["1 missing (first: layer1.0.conv1.weight)"]),
        (_extra, ["1 unexpected (first: layer9.weight)"]),
        (_reshape, ["fc.weight, (3, 64) in the file, (5, 64) in the model"]),
    ],
)
def test_a_mismatch_names_the_first_key(tmp_path, change, fragments):
    state = net().state_dict()
    change(state)
    path = save(state, tmp_path / "w.pt")
    before = net()
    with pytest.raises(UserError) as caught:
        load_weights(before, path)
    assert all(fragment in str(caught.value) for fragment in [*fragments, str(path)]), caught.value
    # Refused as a whole: nothing was half loaded.
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), net().state_dict().values()))


class _Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("kind", ["missing", "garbage.pt", "garbage.safetensors", "pickle", "module", "list", "folder"])
def test_other_files_are_refused_without_running_them(tmp_path, kind, capsys):
    path = tmp_path / (kind if "." in kind else "w.pt")
    if kind.startswith("garbage"):
        path.write_bytes(b"\x00\xff" * 40)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_Payload()))
    elif kind == "module":
        torch.save(net(), path)
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=str(path)):
        load_weights(net(), path)
    assert "never run" not in capsys.readouterr().out
