"""The bound on a step: the divergence that the quadratic model predicts for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.whole import whole
from nngeom.optim.arguments import number

COPIED = 2**17  # numbers up to which a call a parameter takes longer than copying them side by side


@dataclass
class Bound:
    """What is known of the directions ``v`` of a step before it is taken.

    ``divergence``: ``1/2 sum lr^2 v^T (F + damping) v`` over the groups; ``squared``: ``v^T (F + damping) v`` of all;
    ``lr`` and ``momentum``: the largest of the groups; ``clipped``: whether the bound made the step shorter.
    """

    divergence: float = 0.0
    squared: float = 0.0
    lr: float = 0.0
    momentum: float = 0.0
    clipped: bool = False

    def measure(self, groups: list[dict[str, Any]], step: int, directions: Mapping[Tensor, Tensor]) -> None:
        """Of ``directions`` by parameter, whose ``.grad`` still is the gradient ``(F + damping) v``."""
        numbers = [(number("lr", g["lr"], step), number("momentum", g["momentum"], step)) for g in groups]
        self.lr, self.momentum = (max(column) for column in zip(*numbers))
        self.divergence = self.squared = 0.0
        for group, (lr, _) in zip(groups, numbers):
            pairs = [(p.grad, directions[p]) for p in group["params"] if p.grad is not None]
            if pairs:
                squared = float(_dot(pairs))
                self.squared += squared
                self.divergence += 0.5 * lr**2 * squared

    def factor(self, kl_clip: float | None) -> float:
        """What brings the divergence to ``kl_clip`` at most."""
        clip = 1.0 if kl_clip is None or self.divergence <= kl_clip else math.sqrt(kl_clip / self.divergence)
        self.squared *= clip**2
        self.clipped = clip < 1
        return clip


def _dot(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the inner products of all pairs."""
    flat = [(whole(x).reshape(-1), y.reshape(-1)) for x, y in pairs]
    if sum(y.numel() for _, y in flat) <= COPIED:
        xs, ys = zip(*flat)
        flat = [(torch.cat(xs), torch.cat(ys))]
    products = [torch.dot(x.to(y.dtype), y) for x, y in flat]
    return products[0] if len(products) == 1 else torch.stack(products).sum()
