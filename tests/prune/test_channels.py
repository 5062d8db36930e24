"""The physical cut: equal to the mask, repeatable from the plan, all or nothing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prune_nets import NETS, Plain, images, largest_difference, net, randomized
from safetensors.torch import save_file
from torch import Tensor, nn

from flatcompress import models
from flatcompress.errors import RunError, UserError
from flatcompress.plan import Plan, Step, apply_plan, check_state, load_weights
from flatcompress.prune import (
    Budget,
    Limits,
    SoftMask,
    choose,
    find_groups,
    prune,
    score,
    shrink,
)
from flatcompress.prune.dependency import (
    axes,
)

RATIOS = (0.25, 0.5, 0.75)
BUILT_IN = sorted(models.MODELS)
HUGGING_FACE = {
    "transformers:resnet": {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "basic"},
    "transformers:mobilenet_v2": {"depth_multiplier": 0.35},
    "transformers:vit": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
                         "patch_size": 8},
}  # fmt: skip


def build(name: str) -> nn.Module:
    if name in NETS:
        return net(name)
    config = HUGGING_FACE.get(name)
    if config is not None:
        pytest.importorskip("transformers")

    return randomized(models.build(name, num_classes=4, input_shape=(3, 32, 32), seed=0, config=config))


def input_of(name: str) -> Tensor:
    return images(8 if name in NETS else 32)


def masked_at(model: nn.Module, x: Tensor, ratio: float) -> tuple[list, SoftMask]:
    groups = find_groups(model, x)
    return groups, SoftMask(
        groups, choose(groups, score(groups), Budget("ratio", ratio), Limits(floor=0.05, round_to=1))
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", [*NETS, "resnet8", "resnet20", "ds_cnn", "vit_tiny", *HUGGING_FACE])
def test_cut_model_computes_what_the_masked_one_does(name: str, ratio: float) -> None:
    model, x = build(name), input_of(name)
    groups, mask = masked_at(model, x, ratio)
    before = sum(p.numel() for p in model.parameters())
    assert largest_difference(model, groups, mask, x) < 1e-6
    assert sum(p.numel() for p in model.parameters()) < before


@pytest.mark.slow
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_cut_equals_mask_for_every_built_in_model(name: str, ratio: float) -> None:
    model, x = build(name), input_of(name)
    groups, mask = masked_at(model, x, ratio)
    assert largest_difference(model, groups, mask, x) < 1e-6


QUICK = ["residual", "grouped", "gated", "resnet8", "ds_cnn", "vit_tiny", *HUGGING_FACE]
TRAINED = [
    pytest.param(name, ratio, marks=[] if name in QUICK and ratio == 0.5 else [pytest.mark.slow])
    for name in [*NETS, *BUILT_IN, *HUGGING_FACE]
    for ratio in RATIOS
]


@pytest.mark.parametrize(("name", "ratio"), TRAINED)
def test_mask_holds_through_training_steps_and_the_cut_still_equals_it(name: str, ratio: float) -> None:
    model, x = build(name), input_of(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 1, 2])).backward()
        optimizer.step()

    step()  # momentum that would move the weights again
    groups, mask = masked_at(model, x, ratio)
    for _ in range(3):
        step()
        mask.apply_()
    assert largest_difference(model, groups, mask, x) < 1e-6


def test_adam_and_decay_do_not_move_removed_channels() -> None:
    model, x = net("residual"), images()
    groups, mask = masked_at(model, x, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 1, 2])).backward()
        mask.mask_gradients_()
        optimizer.step()
        mask.apply_()
    removed = 0
    for group, keep in zip(groups, mask.keep, strict=True):
        for member in group.outs:
            rows = model.get_submodule(member.name).weight[~member.spread(keep, True)]
            assert not rows.any()
            removed += rows.numel()
    assert removed > 0


@pytest.mark.parametrize("name", ["residual", "grouped", "vit_tiny", "transformers:vit"])
def test_plan_repeats_the_cut_on_a_fresh_model(name: str) -> None:
    model, x = build(name), input_of(name)
    fresh = copy.deepcopy(model)
    plan = prune(model, x, 0.5, floor=0.05, round_to=1)
    again = apply_plan(fresh, Plan.from_json(plan.to_json()))
    assert torch.equal(model(x), again(x))
    check_state(again, model.state_dict())
    assert {type(m) for m in model.modules()} == {type(m) for m in again.modules()}


def test_heads_and_head_counts_are_in_the_plan() -> None:
    model = models.build("vit_tiny", num_classes=4, input_shape=(3, 16, 16), seed=0, num_heads=4)
    plan = prune(model, images(16), 0.5, ranking="uniform")
    attention = model.blocks[0].attn
    assert attention.num_heads == 2 and attention.qkv.out_features == 3 * 2 * attention.head_dim
    assert plan.of_kind("channels")[0]["attributes"]["blocks.0.attn"] == {"num_heads": 2}
    assert model.blocks[0].fc1.out_features == 64 == model.blocks[0].fc2.in_features


_RELOAD = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import load_file
from flatcompress import models
from flatcompress.plan import Plan, apply_plan
for name, config in json.loads(sys.argv[2]):
    folder = Path(sys.argv[1]) / name.replace(":", "_")
    model = models.build(name, num_classes=4, input_shape=(3, 32, 32), seed=5, config=config)
    apply_plan(model, Plan.load(folder / "plan.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    data = load_file(folder / "data.safetensors")
    assert torch.equal(model.eval()(data["x"]), data["y"]), name
    print(name)
"""


def reload_all(names: list[str], folder: Path) -> None:
    for name in names:
        model, x = build(name), images(32)
        plan, here = prune(model, x, 0.5), folder / name.replace(":", "_")
        here.mkdir()
        (here / "plan.json").write_text(plan.to_json())
        save_file(model.state_dict(), here / "model.safetensors")
        save_file({"x": x, "y": model(x).detach()}, here / "data.safetensors")
    wanted = json.dumps([(name, HUGGING_FACE.get(name)) for name in names])
    command = [sys.executable, "-c", _RELOAD, str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == names, done.stderr


def test_reload_in_a_new_process_without_pickle(tmp_path: Path) -> None:
    reload_all(["resnet8", "ds_cnn", "vit_tiny"], tmp_path)


@pytest.mark.slow
def test_reload_of_every_model_in_a_new_process(tmp_path: Path) -> None:
    reload_all([*BUILT_IN, *HUGGING_FACE], tmp_path)


def test_dead_channels_go_first_and_nothing_changes() -> None:
    model, x = net("plain"), images()
    with torch.no_grad():
        for parameter in (model.conv2.weight, model.conv2.bias, model.bn2.weight, model.bn2.bias):
            parameter[4:12] = 0
        model.fc.weight[:, 4:12] = 0
    before = model(x)
    data = prune(model, x, 8 / 24, round_to=1).of_kind("channels")[0]
    assert data["layers"]["conv2"]["out"] == {"of": 16, "keep": [[0, 4], [12, 16]]} and "conv1" not in data["layers"]
    torch.testing.assert_close(model(x), before)


def test_one_of_two_equal_channels_can_go_and_the_cut_equals_the_mask() -> None:
    model, x = net("residual"), images()
    groups = find_groups(model, x)
    with torch.no_grad():  # channel 5 of the stream is channel 2 again, wherever the stream is written or read
        for group in (g for g in groups if g.name == "conv1"):
            for member in group.members:
                for _, tensor, dim in axes.tensors(member.module, member.axis):
                    tensor.select(dim, 5).copy_(tensor.select(dim, 2))
    scores = score(groups, "fpgm")[0]
    assert scores[2] == scores[5]
    keep = [torch.ones(g.units, dtype=torch.bool) for g in groups]
    keep[0][5] = False
    assert largest_difference(model, groups, SoftMask(groups, keep), x) < 1e-6


def test_two_cuts_follow_each_other() -> None:
    model, x = net("residual"), images()
    fresh = copy.deepcopy(model)
    plan = prune(model, x, 0.25, round_to=1) + prune(model, x, 0.25, round_to=1)
    assert torch.equal(apply_plan(fresh, plan)(x), model(x))


def test_plan_of_another_model_is_refused_with_the_first_layer() -> None:
    plan = prune(net("plain"), images(), 0.5)
    wide = Plain()
    wide.conv1 = nn.Conv2d(3, 9, 3)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(UserError, match="conv1: the plan was made for 8 output channels, this model has 9"):
        apply_plan(wide, plan)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
    with pytest.raises(UserError, match="conv1: the plan cuts this layer, which Sequential does not have"):
        apply_plan(nn.Sequential(nn.Linear(2, 2)), plan)


def test_unpruned_checkpoint_is_refused_with_the_first_tensor() -> None:
    dense = net("plain").state_dict()
    model = net("plain")
    prune(model, images(), 0.5)
    for load in (check_state, load_weights):  # torch's own error ends with the last tensor that does not fit
        with pytest.raises(UserError, match=r"conv1\.weight: the checkpoint has shape \(8, 3, 3, 3\)"):
            load(model, dense)


@pytest.mark.parametrize("keep", [[[0, 9]], [[4, 4]], [[3, 5], [1, 2]], [7], [], None])
def test_damaged_plan_is_refused(keep: object) -> None:
    model = net("plain")
    with pytest.raises(UserError, match="conv1"):
        apply_plan(model, Plan([Step("channels", {"layers": {"conv1": {"out": {"of": 8, "keep": keep}}}})]))
    assert model.conv1.out_channels == 8


def test_plan_data_is_plain_json_with_runs() -> None:
    plan = prune(net("plain"), images(), 0.5, round_to=1)
    data = json.loads(plan.to_json())["steps"][0]["data"]
    kept = data["layers"]["conv1"]["out"]
    assert kept["of"] == 8 and all(len(run) == 2 for run in kept["keep"])
    assert data["kept_channels"] == 12 and data["total_channels"] == 24


def test_emptying_a_group_is_an_error_and_the_model_stays_whole() -> None:
    model, x = net("plain"), images()
    groups = find_groups(model, x)
    keep = [torch.zeros(8, dtype=torch.bool), torch.ones(16, dtype=torch.bool)]
    with pytest.raises(UserError, match="conv1"):
        shrink(model, groups, keep)
    assert model.conv1.out_channels == 8


def test_keeping_everything_is_an_error() -> None:
    model = net("plain")
    groups = find_groups(model, images())
    with pytest.raises(UserError, match="nothing was pruned"):
        shrink(model, groups, SoftMask(groups))


def test_wrong_groups_fail_the_check_and_nothing_is_cut() -> None:
    model, x = net("plain"), images()
    groups = find_groups(model, x)
    consumer = groups[0].members[-1]
    consumer.owner.copy_(consumer.owner.flip(0))  # consumes the channels in the wrong order
    keep = [torch.arange(8) > 2, torch.ones(16, dtype=torch.bool)]
    with pytest.raises(RunError, match="nothing was cut"):
        shrink(model, groups, keep, x)
    assert model.conv1.out_channels == 8


def test_weight_masks_are_cut_with_their_weights() -> None:
    from flatcompress.prune.masks import sparsify

    model, x = net("plain"), images()
    sparsify(model, 0.5)
    mask = model.conv2.weight_mask.clone()
    data = prune(model, x, 0.5).of_kind("channels")[0]["layers"]["conv2"]
    rows = [i for a, b in data["out"]["keep"] for i in range(a, b)]
    columns = [i for a, b in data["in"]["keep"] for i in range(a, b)]
    assert torch.equal(model.conv2.weight_mask, mask[rows][:, columns])


def test_a_layer_that_keeps_few_of_its_channels_is_named():
    model, x = build("resnet8"), images(32)
    groups = find_groups(model, x)
    keep = [torch.ones(g.units, dtype=torch.bool) for g in groups]
    keep[0][2:] = False
    with pytest.warns(UserWarning, match=rf"few are left in {groups[0].name} \(2 of {groups[0].units} channels\)"):
        shrink(model, groups, keep, x)


def test_half_of_the_channels_is_no_reason_to_warn(recwarn):
    model, x = build("resnet8"), images(32)
    groups = find_groups(model, x)
    keep = [torch.arange(g.units) < g.units // 2 for g in groups]
    shrink(model, groups, keep, x)
    assert not [w for w in recwarn if "few are left" in str(w.message)]
