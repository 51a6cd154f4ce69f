"""What the three lazy-training examples share: one training loop, and the look of the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.linearized import Curves, Scaled

# Okabe & Ito's colours, distinguishable with any colour vision: one a regime, everywhere.
COLOURS = {0.5: "#009E73", 1.0: "#D55E00", 100.0: "#0072B2"}


def descend(
    model: nn.Module,
    alpha: float,
    x: Tensor,
    y: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Scaled, Tensor], dict[str, Any]],
    *,
    lr: float,
    every: float,
    until: float,
    steps: int,
) -> Curves:
    """Full-batch gradient descent with momentum 0.9 on the alpha-scaled model, at the learning rate ``lr / alpha**2``.

    ``losses(outputs, y) -> (n,)``. A record has ``step``, ``loss`` and what ``measure(scaled, example losses)``
    returns; records are taken when the step has grown by the share ``every`` (and at every one of the first), until the
    mean loss is below ``until`` or ``steps`` are done.
    """
    scaled, run, due = Scaled(model, alpha), Curves(), 0
    optimizer = torch.optim.SGD(scaled.parameters(), lr=scaled.learning_rate(lr), momentum=0.9)
    for step in range(steps + 1):
        optimizer.zero_grad()
        each = losses(scaled(x), y)
        each.mean().backward()
        done = float(each.mean().detach()) < until or step == steps
        if step >= due or done:
            with torch.no_grad():
                run.record(step=step, loss=each.mean(), **measure(scaled, each.detach()))
            due = max(step + 1, int(step * (1 + every)))
        if done:
            break
        optimizer.step()
    return run


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure in the common style and its axes ``(rows, columns)``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spines = {"axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 9.5, "legend.frameon": False, "lines.linewidth": 1.6, **spines}
    )
    return plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False)


def save(fig: Any, path: Path) -> None:
    """Write a PNG of 256 colours."""
    import matplotlib.pyplot as plt
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    print(f"wrote {path}")
