"""The complexity of the trajectory against the generalisation gap, when label noise and width vary; beside other
measures.

    python examples/complexity.py [--data FOLDER] [--seeds 5]

500 digits, one hidden layer, full passes of batches of 50 (learning rate 0.1, momentum 0.9) until the training loss is
0.01. The complexity ``C / n`` on a probe of 50 training images, the gap ``test loss - training loss``, and for
comparison the norm of the parameters, their distance from the start, their number, and the trace of the final kernel.
Rank correlations with the gap over all settings of a sweep. Writes out/complexity.png. Protocol: Baratin et al. 2021,
fig. 6 (captioned: width left, noise right).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, arguments, band, batches, corrupt, figure, load, mlp, save
from scipy.stats import spearmanr
from torch.nn import functional as F

import nngeom as nng
from nngeom.analysis import ComplexityMeasure

MEASURES = {
    "gap": "generalisation gap",
    "complexity": "C / n",
    "norm": "|w|",
    "distance": "|w - w0|",
    "parameters": "number of parameters",
    "trace": "sqrt(tr K) / n",
}


def run(data: Data, width: int, noise: float, seed: int, most: int) -> dict[str, float]:
    """Train to a loss of 0.01 and measure."""
    torch.manual_seed(seed)
    order, y = torch.Generator().manual_seed(seed), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    model = mlp(data.x[0].numel(), width, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = [(data.x[:50], y[:50])]
    measure, start = ComplexityMeasure(model, probe, every=5), nng.PVector.from_model(model)
    for _ in range(most):
        for bx, by in batches(data.x, y, 50, order):
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            measure.update()
        with torch.no_grad():
            train = float(F.cross_entropy(model(data.x), y))
        if train < 0.01:
            break
    with torch.no_grad():
        gap = (
            float(
                F.cross_entropy(
                    model(data.x_test), corrupt(data.y_test, noise, torch.Generator().manual_seed(seed + 1))
                )
            )
            - train
        )
    end = nng.PVector.from_model(model)
    trace = float(nng.GramMatrix(model, probe, nng.FMatDiag).trace().sqrt()) / 50
    return {
        "gap": gap,
        "complexity": measure.normalized,
        "norm": float(end.norm()),
        "distance": float((end - start).norm()),
        "parameters": float(end.flat().numel()),
        "trace": trace,
        "loss": train,
        "steps": measure.steps,
    }


def main() -> None:
    """Both sweeps, one figure."""
    args = arguments(__doc__, seeds=5, epochs=400)
    torch.set_num_threads(1)
    data = load(args.data, 500, 500)
    sweeps: dict[str, list[Any]] = {
        "hidden width": [8, 16, 32, 64, 128, 256, 512],
        "label noise": [0.0, 0.1, 0.2, 0.3, 0.5],
    }
    fig, axes = figure(2, len(MEASURES), 14, 5)
    for row, (name, values) in enumerate(sweeps.items()):
        runs = [
            [run(data, v if row == 0 else 256, 0.0 if row == 0 else v, seed, args.epochs) for v in values]
            for seed in range(args.seeds)
        ]
        for ax, colour, (key, title) in zip(axes[row], COLOURS, MEASURES.items()):
            table = np.array([[r[key] for r in line] for line in runs])
            band(ax, values, table, title, colour, marker="o", ms=3)
            gaps = [np.mean([line[j]["gap"] for line in runs]) for j in range(len(values))]
            correlation = spearmanr(table.mean(0), gaps).statistic if np.ptp(table) else float("nan")
            label = title if key == "gap" or np.isnan(correlation) else f"{title}: {correlation:+.2f}"
            ax.set(title=label, xlabel=name, xscale="log" if row == 0 else "linear")
            numbers = " ".join(f"{v:.3g}" for v in table.mean(0))
            print(f"{name:13s} {title:24s} {numbers}   rank correlation with the gap {correlation:+.2f}", flush=True)
        print(f"{name:13s} final losses at most {max(r['loss'] for line in runs for r in line):.3f}")
    save(fig, args.out / "complexity.png")


if __name__ == "__main__":
    main()
