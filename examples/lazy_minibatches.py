"""What the examples of lazy training on images share: SGD on the alpha-scaled model, and curves at equal progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from geometry_common import batches
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.linearized import Curves, Scaled, equal_progress, linearity

ALPHAS = (0.5, 1.0, 100.0)


def right(outputs: Tensor, y: Tensor) -> Tensor:
    """``(n,)``: 1 where the prediction is ``y``."""
    return (outputs.argmax(1) == y).double()


def descend(
    model: nn.Module,
    alpha: float,
    x: Tensor,
    y: Tensor,
    measure: Callable[[Scaled, Tensor], dict[str, Any]],
    *,
    lr: float,
    steps: int,
    until: float,
    seed: int,
    batch: int = 100,
    probe: int = 40,
) -> dict[str, list[float]]:
    """Minibatch SGD with momentum 0.9 at ``lr / alpha**2``, in evaluation mode, until the mean loss is below ``until``.

    A record has ``step``, ``loss``, how linear the run has been on the first ``probe`` examples, and what
    ``measure(scaled, outputs)`` returns; records lie apart by a sixth of the steps so far. Float64.
    """
    scaled, run, due, step = Scaled(model.eval(), alpha), Curves(), 0, 0
    optimizer = torch.optim.SGD(scaled.parameters(), lr=scaled.learning_rate(lr), momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    while True:
        for bx, by in batches(x, y, batch, order):
            if step >= due or step == steps:
                with torch.no_grad():
                    outputs = scaled(x)
                    loss = float(F.cross_entropy(outputs, y))
                    found = measure(scaled, outputs)
                now = linearity(scaled, None, [(x[:probe], y[:probe])])
                likeness = {"signs": now.sign_similarity, "kernel": now.kernel_alignment}
                run.record(step=step, loss=loss, **likeness, **found)
                due = max(step + 1, int(step * 7 / 6))
                if loss < until or step == steps:
                    return {name: curve.tolist() for name, curve in run.items()}
            optimizer.zero_grad()
            F.cross_entropy(scaled(bx), by).backward()
            optimizer.step()
            step += 1


def at(run: dict[str, list[float]], progress: str, levels: Any) -> dict[str, Tensor]:
    """Every curve where ``progress`` first falls to each level, NaN where it never does."""
    curves = {name: [float("nan") if v is None else v for v in column] for name, column in run.items()}
    return equal_progress(curves, curves, levels, progress=progress).a


def together(runs: list[dict[str, list[float]]], progress: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Levels of ``progress`` that all runs pass, evenly spaced by ratio, and every curve there ``(runs, levels)``."""
    known = [[v for v in run[progress] if v is not None] for run in runs]
    start, end = min(values[0] for values in known), max(min(values) for values in known)
    levels = torch.logspace(math.log10(start), math.log10(end), 40, dtype=torch.float64)
    levels[-1] = end
    there = [at(run, progress, levels) for run in runs]
    return levels, {name: torch.stack([curves[name] for curves in there]) for name in there[0]}
