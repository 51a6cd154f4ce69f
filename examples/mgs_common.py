"""What the examples of Model Gradient Similarity share: the paper's regularisers, nets, one training run.

``GRIDS`` has the methods and the strengths that are tried: of dropout its probability, of Adam its learning rate, of
the cyclical learning rate its peak, of the others the factor of the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from geometry_common import batches, lenet, mlp
from papers_common import Cells
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom import mgs

GRIDS: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "dropout": (0.1, 0.2, 0.4),
    "weight decay": (1e-3, 3e-3, 1e-2),
    "cyclical rate": (0.05, 0.1, 0.2),
    "Adam": (3e-4, 1e-3, 3e-3),
    "loss gradient, parameters": (0.05, 0.2, 0.5),
    "loss gradient, inputs": (1.0, 4.0, 16.0),
    "MGS": (1e-4, 3e-4, 1e-3, 3e-3),
}
COLOUR = dict(zip(GRIDS, ["#000000", "#56B4E9", "#0072B2", "#999999", "#009E73", "#E69F00", "#CC79A7", "#D55E00"]))


@dataclass(frozen=True)
class Recipe:
    """A method with its strength, the mean loss, and how long and in which steps it is trained."""

    method: str
    strength: float
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    epochs: int = 30
    batch: int = 32
    lr: float = 0.05
    optimizer: str = "SGD"

    @property
    def dropout(self) -> float:
        """Of the net that is trained so."""
        return self.strength if self.method == "dropout" else 0.0


def build(kind: str, shape: tuple[int, int, int], dropout: float = 0.0, outputs: int = 10) -> nn.Module:
    """``"FCN"``: three hidden layers of 100; ``"LeNet"``."""
    if kind == "FCN":
        return mlp(math.prod(shape), 100, 3, outputs, dropout)
    return lenet(shape, outputs, dropout)


def step_loss(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, signs: torch.Generator) -> Tensor:
    """The loss of a batch and the method's penalty: the trace of the kernel, of one random probe, is a mean over
    examples, the log-determinant, of 32 of them, over eigenvalues.
    """
    if recipe.method == "MGS":
        penalty, outputs = mgs.trace_penalty(model, x, "rademacher", "mean", generator=signs, return_outputs=True)
        return recipe.loss(outputs, y) + recipe.strength * penalty
    loss = recipe.loss(model(x), y)
    if recipe.method == "MGS, log det":
        return loss + recipe.strength * mgs.logdet_penalty(model, x[:32], reduction="mean")
    if not recipe.method.startswith("loss gradient"):
        return loss
    wrt = recipe.method.removeprefix("loss gradient, ")
    return loss + recipe.strength * mgs.loss_gradient_penalty(model, x, y, wrt, recipe.loss)


def optimizer_of(model: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """SGD with momentum 0.9, or Adam, whose rate falls by half over all ``steps``, or what the method has instead."""
    decay = recipe.strength if recipe.method == "weight decay" else 0.0
    if "Adam" in (recipe.method, recipe.optimizer):
        lr = recipe.strength if recipe.method == "Adam" else recipe.lr
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=decay)
    if recipe.method == "cyclical rate":
        half = max(1, steps // 10)
        return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, recipe.strength / 20, recipe.strength, half)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 ** (1 / steps))


def train(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, visit: Callable[[int], None], *, seed: int, points: int = 15
) -> None:
    """Train; ``visit(epoch)`` in evaluation mode at evenly spaced epochs and at the end, about ``points`` times."""
    optimizer, schedule = optimizer_of(model, recipe, recipe.epochs * -(-len(x) // recipe.batch))
    order, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    every = max(1, recipe.epochs // points)
    for epoch in range(recipe.epochs + 1):
        if epoch % every == 0 or epoch == recipe.epochs:
            visit(epoch)
        model.train()
        for bx, by in batches(x, y, recipe.batch, order) if epoch < recipe.epochs else ():
            optimizer.zero_grad()
            step_loss(model, bx, by, recipe, signs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        model.eval()


def measured(model: nn.Module, batch: Tensor) -> dict[str, float]:
    """The metrics of the kernel on one batch: mean and mean logarithm of eigenvalues, effective rank, cosine."""
    found = mgs.metrics(model.eval(), [batch])
    names = {"trace": "mean_trace", "log": "mean_log", "rank": "effective_rank", "cosine": "cosine"}
    return {short: float(getattr(found, name)[0]) for short, name in names.items()}


def tune(
    cells: Cells, prefix: str, grids: dict[str, tuple[float, ...]], score: Callable[[str, float], float], *, quick: bool
) -> None:
    """``score(method, strength)``, higher is better, of every strength of the grids, under
    ``prefix/tuning/method/strength``; ``quick``: of the first of each.
    """
    for method, grid in grids.items():
        for strength in grid[: 1 if quick else None] if len(grid) > 1 else ():
            cells.add(f"{prefix}/tuning/{method}/{strength}", lambda m=method, s=strength: score(m, s))


def chosen(cells: dict[str, Any], prefix: str, grids: dict[str, tuple[float, ...]] = GRIDS) -> dict[str, float]:
    """The strength of every method with the best score."""
    found = {}
    for method, grid in grids.items():
        scores = {s: cells.get(f"{prefix}/tuning/{method}/{s}") for s in grid}
        found[method] = max(grid, key=lambda s, scores=scores: -math.inf if scores[s] is None else scores[s])
    return found


def strength_of(method: str, strength: float, grid: tuple[float, ...]) -> str:
    """A method with its strength, marked where it is the first or last of its grid."""
    edge = " (edge)" if len(grid) > 1 and strength in (grid[0], grid[-1]) else ""
    return f"{method}{f', {strength:g}{edge}' if len(grid) > 1 else ''}"


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])
