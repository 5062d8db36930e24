"""The first eight of EfficientNet-Lite0's sixteen blocks with their ImageNet weights, for small pictures.

At 40 pixels the later blocks see three pixels or fewer, add nothing, and take most of a step's time. Convolutions pad
alike on all sides, so that odd sizes keep their borders too; the weights were trained with one more on the far side,
which fine-tuning evens out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import _lite0

BLOCKS = 8


def _evenly(block: nn.Module) -> nn.Module:
    """The same with padding inside its convolutions."""
    for module in block.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ZeroPad2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.padding = (child.kernel_size[0] // 2, child.kernel_size[1] // 2)  # type: ignore[assignment]
    return block


class Front(nn.Module):
    """[B, 3, H, W] -> logits [B, classes]."""

    def __init__(self, whole: _lite0.Lite0, num_classes: int) -> None:
        super().__init__()
        self.stem, self.norm, self.act = whole._conv_stem, whole._bn0, whole.act0
        self.blocks = nn.Sequential(*list(whole._blocks)[:BLOCKS])
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        last = self.blocks[-1]._project_conv.out_channels  # type: ignore[union-attr]
        self.fc = nn.Linear(int(last), num_classes)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(self.act(self.norm(self.stem(x)))))))


def front(num_classes: int, input_shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """The pretrained front with a new last layer, drawn by ``seed``, and the fan-in's uniform bound of `nn.Linear`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Front(_lite0.lite0(num_classes, input_shape), num_classes)  # type: ignore[arg-type]
    return _evenly(model).to(memory_format=torch.channels_last).train()
