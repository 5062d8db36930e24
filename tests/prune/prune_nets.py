"""Small networks with every kind of coupling, and the one question asked of all: does the cut equal the mask?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flatcompress.prune import Group, SoftMask, shrink


class Plain(nn.Module):
    """conv-norm-relu twice, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Residual(Plain):
    """Two residual sums, the second through a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bni = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.back, self.bnb = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + self.bnb(self.back(torch.relu(self.bni(self.inner(x)))))
        return self.fc(torch.relu(self.bn2(self.conv2(x)) + self.short(x)).mean((2, 3)))


class Concat(nn.Module):
    """A concatenation whose halves are also summed with one wide convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.wide = nn.Conv2d(3, 20, 1)
        self.bn = nn.BatchNorm2d(20)
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.left(x)), torch.tanh(self.right(x))], 1)
        return self.fc(self.bn(both + self.wide(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution, a depthwise one that doubles its channels, PReLU, norms per channel, a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(16, 16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.act = nn.PReLU(24)
        self.up = nn.Conv2d(24, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.inorm = nn.InstanceNorm2d(16, affine=True)
        self.transposed = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.grouped(self.norm(self.conv(x))))
        x = self.inorm(self.depthwise(self.up(x)))
        return self.fc(torch.relu(self.transposed(x)).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excitation (the gate of a zero channel is not zero), then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = nn.functional.adaptive_avg_pool2d(x, 4)
        return self.fc2(torch.sigmoid(self.fc1(x.flatten(1))))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 4 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3)])
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.fc(torch.relu(x).mean((2, 3)))


NETS = {"plain": Plain, "residual": Residual, "concat": Concat, "grouped": Grouped, "gated": Gated, "dense": Dense}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with norms that are no identity and no zero parameters, so that nothing hides a wrong cut."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model.eval()


def net(name: str) -> nn.Module:
    """A network of `NETS`, randomized."""
    torch.manual_seed(1)
    return randomized(NETS[name]())


def images(size: int = 8, batch: int = 3, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7))


def group_named(groups: list[Group], name: str) -> Group:
    return next(group for group in groups if group.name == name)


def largest_difference(model: nn.Module, groups: list[Group], mask: SoftMask, x: Tensor) -> float:
    """Largest output difference of the masked model and its cut, in float64, eval then train mode; cuts ``model``.

    Outputs above 1 count in units of the largest: a deep net whose running statistics are far from its batch's has
    outputs of 1e13 in eval mode, where one rounding is 0.004.
    """
    model.double()
    x = x.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its draws depend on the number of channels
    masked = copy.deepcopy(model)
    shrink(model, groups, mask)
    difference = 0.0
    for training in (False, True):
        ours, theirs = model.train(training)(x), masked.train(training)(x)
        scale = max(1.0, float(theirs.detach().abs().max()))
        difference = max(difference, float((ours - theirs).detach().abs().max()) / scale)
    return difference
