"""Every built-in model: any image, any classes, exportable, prunable, and the shapes of its paper."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch_pruning as tp
from torch import nn

from flatcompress.errors import UserError
from flatcompress.models import MODELS, build
from flatcompress.models.blocks import fit_strides, round_channels

torch.set_num_threads(1)

SMALL = {"resnet50": {"width": 8}, "resnet18": {"width": 16}, "mobilenet_v2": {"width": 0.35}}


def small(name: str, input_shape: tuple[int, int, int] = (3, 16, 16), num_classes: int = 5) -> nn.Module:
    return build(name, num_classes=num_classes, input_shape=input_shape, seed=0, **SMALL.get(name, {})).eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (2, 24, 20), (3, 31, 31), (1, 49, 10), (3, 96, 96)])
@pytest.mark.parametrize("name", MODELS)
def test_any_image_gives_finite_logits(name, shape):
    model = small(name, shape)
    with torch.no_grad():
        logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert model.input_shape == shape


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        # torchvision's published counts
        ("resnet18", (3, 224, 224), 1000, 11_689_512),
        ("resnet50", (3, 224, 224), 1000, 25_557_032),
        ("mobilenet_v2", (3, 224, 224), 1000, 3_504_872),
        # 269,722 with the paper's parameter-free shortcuts, plus two projections and their norms
        ("resnet20", (3, 32, 32), 10, 269_722 + 512 + 2 * 32 + 2048 + 2 * 64),
    ],
)
def test_parameter_count_is_the_published_one(name, shape, classes, parameters):
    with torch.device("meta"):
        model = build(name, num_classes=classes, input_shape=shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_modules_used_once(name):
    model = small(name)
    calls: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.GELU, nn.BatchNorm2d, nn.LayerNorm)):
            module.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    model(torch.randn(1, 3, 16, 16))
    assert calls and set(calls.values()) == {1}
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_exports_with_a_dynamic_batch(name):
    model = small(name)
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "vit_tiny"])
def test_half_of_the_channels_can_be_cut(name):
    model = small(name)
    x = torch.randn(1, 3, 16, 16)
    before = sum(p.numel() for p in model.parameters())
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.MetaPruner(
        model, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[head]
    ).step()
    assert model(x).shape == (1, 5)
    assert sum(p.numel() for p in model.parameters()) < 0.5 * before


def test_attention_heads_can_be_cut_by_changing_the_attributes():
    model = small("vit_tiny")
    x = torch.randn(2, 3, 16, 16)
    attention = model.blocks[0].attn
    head_dim, heads = attention.head_dim, attention.num_heads
    # Zeroing what head 0 puts out equals removing it.
    zeroed = copy.deepcopy(model)
    zeroed.blocks[0].attn.proj.weight.data[:, :head_dim] = 0
    rows = torch.arange(3 * heads * head_dim).reshape(3, heads, head_dim)[:, 1:].reshape(-1)
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[rows].detach())
    attention.qkv.bias = nn.Parameter(attention.qkv.bias[rows].detach())
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, head_dim:].detach())
    attention.num_heads = heads - 1
    torch.testing.assert_close(model(x), zeroed(x))


def test_torch_pruning_cuts_the_transformer():
    model = small("vit_tiny")
    x = torch.randn(1, 3, 16, 16)
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    pruner = tp.pruner.MetaPruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        num_heads=heads,
        prune_head_dims=True,
        unwrapped_parameters=[(model.pos_embed, 2)],
    )
    pruner.step()
    for block in model.blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
    assert model(x).shape == (1, 5)
    assert model.pos_embed.shape[2] == 32


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = small(name).state_dict(), small(name).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = build(name, num_classes=5, input_shape=(3, 16, 16), seed=1, **SMALL.get(name, {})).state_dict()
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_small_images_keep_three_pixels_before_the_pool():
    seen = []
    for side in (8, 16, 32, 64, 96, 224):
        model = small("mobilenet_v2", (3, side, side))
        model.pool.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[-1]))
        model(torch.zeros(1, 3, side, side))
    assert seen == [4, 4, 4, 4, 3, 7]
    assert fit_strides([2, 2, 2], (3, 4, 4)) == [1, 1, 1]


@pytest.mark.parametrize(("channels", "rounded"), [(3, 8), (11.2, 16), (12, 16), (36, 40), (35, 32), (320 * 0.35, 112)])
def test_channels_round_to_eights_and_lose_at_most_a_tenth(channels, rounded):
    assert round_channels(channels) == rounded


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"name": "resnet9"}, ["unknown model 'resnet9'", "resnet8", "timm:..."]),
        ({"name": "resnet8", "widht": 8}, ["'widht'", "'width'"]),
        ({"name": "resnet8", "width": "wide"}, ["'width'", "int", "'wide'"]),
        ({"name": "resnet8", "width": 0}, ["'width'", "above 0"]),
        ({"name": "resnet8", "width": True}, ["'width'", "True"]),
        ({"name": "resnet8", "stem_stride": 4}, ["stem_stride", "4"]),
        ({"name": "mobilenet_v2", "width": -1.0}, ["'width'", "-1.0"]),
        ({"name": "vit_tiny", "dim": 30}, ["dim 30", "num_heads 4"]),
        ({"name": "vit_tiny", "patch_size": 99}, ["patch_size 99", "16x16"]),
        ({"name": "resnet8", "num_classes": 0}, ["num_classes", "0"]),
        ({"name": "resnet8", "input_shape": (3, 16)}, ["input_shape", "(3, 16)"]),
        ({"name": "resnet8", "config": {"depths": [1]}}, ["config", "transformers"]),
        ({"name": "resnet8:"}, ["both sides of the colon"]),
    ],
)
def test_wrong_arguments_are_named(arguments, fragments):
    with pytest.raises(UserError) as caught:
        build(**{"num_classes": 5, "input_shape": (3, 16, 16), **arguments})
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_networks_are_built_without_what_quantizing_and_exporting_need() -> None:
    """Other tools' environments build them for comparisons."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['onnxruntime', 'PIL', 'pydantic', 'yaml'])); "
    code = blocked + "from flatcompress import models; models.build('resnet8', num_classes=2, input_shape=(1, 8, 8))"
    subprocess.run([sys.executable, "-c", code], check=True)
