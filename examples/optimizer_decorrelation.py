"""How correlated gradients are along eigenvectors of Kronecker factors, against parameters; and a map of sensitivity.

The hidden and the last layer of a digits classifier 64-32-32-10 with tanh (``sklearn``'s 8 x 8 digits, SGD with
momentum, batches of 100), three seeds. Factors come from 900 of the digits, the gradients of single examples from the
897 others, so that nothing is decorrelated by being fitted: second moments ``C`` of a layer's gradients along its
parameters, along eigenvectors of the factors at the same weights (fresh), and of those at the start (stale). Two
numbers: the mean absolute correlation ``|C_ij| / sqrt(C_ii C_jj)`` of two coordinates, and what a diagonal leaves out,
``|C - diag C| / |C|``, which is what EKFAC neglects (George et al. 2018, figure 3 and theorem 2).

    python examples/optimizer_decorrelation.py            # docs/data/decorrelation.json, docs/images/decorrelation.png
    python examples/optimizer_decorrelation.py --plot     # the images alone, and docs/images/sensitivity.png

The map of sensitivity is drawn from the settings that ``autoencoder_of_digits.py`` has tried.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from autoencoder_of_digits import digits
from optimizer_defaults import mlp
from optimizer_race import DOCS
from residual_digits import labels
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

STEPS, SEEDS, SHOWN, LAYERS = (0, 40, 400), (0, 1, 2), 40, ("2", "4")
BASES = ("parameters", "fresh eigenvectors", "stale eigenvectors")
Rows = dict[str, Tensor]


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> Rows:
    """Gradients ``(n, o, i + 1)`` of the examples' losses for the two layers, biases as the last column."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    one = lambda p, a, b: F.cross_entropy(torch.func.functional_call(model, p, (a[None],)), b[None])
    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    return {name: torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"].unsqueeze(-1)], -1) for name in LAYERS}


def eigenvectors(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Those of both factors of the two layers, ``(o, o)`` and ``(i + 1, i + 1)``."""
    fisher = nng.EmpiricalFIM(model, (x, y), nng.PMatEKFAC, loss="cross_entropy")
    blocks = {layout.names[0].removesuffix(".weight"): block for layout, block in fisher.blocks.items()}
    return {name: (blocks[name].ug[0], blocks[name].ua[0]) for name in LAYERS}


def measured(rows: Tensor) -> tuple[float, float, Tensor]:
    """Mean absolute correlation, what a diagonal leaves out, and the correlations of the :data:`SHOWN` coordinates of
    the largest second moments; coordinates along which every gradient is zero are left out.
    """
    flat = rows.flatten(1)
    second = flat.T @ flat / len(flat)
    d = second.diag()
    kept = d > 1e-10 * d.max()
    second, d = second[kept][:, kept], d[kept]
    correlation = second / (d[:, None] * d).sqrt()
    off = ~torch.eye(len(d), dtype=torch.bool)
    first = d.topk(min(SHOWN, len(d))).indices
    return float(correlation[off].abs().mean()), float(second[off].norm() / second.norm()), correlation[first][:, first]


def trained(seed: int, x: Tensor, y: Tensor) -> dict[int, nn.Module]:
    """The classifier after each of :data:`STEPS` steps."""
    found, generator = {}, torch.Generator().manual_seed(seed)
    model = mlp(64, 32, 32, 10, activation=nn.Tanh)(seed)
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            copied = mlp(64, 32, 32, 10, activation=nn.Tanh)(seed)
            copied.load_state_dict(model.state_dict())
            found[step] = copied.double()
        index = torch.randint(len(x), (100,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        opt.step()
    return found


def experiment() -> dict:
    """By step, basis and layer: the two numbers of every seed; matrices of the first seed after the last step."""
    x, y = digits(), labels()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    table: dict = {"numbers": {}, "matrices": {}}
    for seed in SEEDS:
        models = trained(seed, x[:900], y[:900])
        start = eigenvectors(models[0], x[:900].double(), y[:900])
        for step, model in models.items():
            fresh = eigenvectors(model, x[:900].double(), y[:900])
            for name, rows in rows_of(model, x[900:].double(), y[900:]).items():
                for basis, turns in zip(BASES, (None, fresh[name], start[name])):
                    turned = rows if turns is None else turns[0].T @ rows @ turns[1]
                    correlation, left, matrix = measured(turned)
                    numbers = table["numbers"].setdefault(str(step), {}).setdefault(basis, {})
                    numbers.setdefault(name, []).append([float(f"{correlation:.3g}"), float(f"{left:.3g}")])
                    if seed == 0 and step == STEPS[-1] and name == "2":
                        table["matrices"][basis] = [[round(v, 2) for v in line] for line in matrix.tolist()]
    return table


def plot(folder: Path) -> None:
    """Correlations in the middle layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matrices = json.loads((folder / "data" / "decorrelation.json").read_text())["matrices"]
    figure, axes = plt.subplots(1, len(matrices), figsize=(9, 3.1))
    for axis, (basis, matrix) in zip(axes, matrices.items()):
        shown = axis.imshow(torch.tensor(matrix).abs(), vmin=0, vmax=1, cmap="viridis")
        axis.set(title=basis, xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, shrink=0.8, label="absolute correlation")
    _save(figure, folder / "images" / "decorrelation.png")


def plot_sensitivity(folder: Path) -> None:
    """Last training loss over learning rate and damping, with momentum and without; diverged settings are blank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads((DOCS / "data" / "autoencoder.json").read_text())["grid"]
    damped = {method: cells for method, cells in results.items() if cells[0]["damping"] is not None}
    figure, axes = plt.subplots(2, len(damped), figsize=(2.2 * len(damped), 5), sharex=True, sharey=True)
    for column, (method, cells) in zip(axes.T, damped.items()):
        rates, dampings = (sorted({cell[key] for cell in cells}) for key in ("lr", "damping"))
        for axis, momentum in zip(column, (0.0, 0.9)):
            grid = torch.full((len(dampings), len(rates)), math.nan)
            for cell in cells:
                if cell["momentum"] == momentum and cell["final"] is not None:
                    grid[dampings.index(cell["damping"]), rates.index(cell["lr"])] = math.log10(cell["final"])
            shown = axis.imshow(grid, origin="lower", vmin=math.log10(0.4), vmax=math.log10(4), cmap="viridis_r")
            axis.set(xticks=range(len(rates)), yticks=range(len(dampings)))
            axis.set_xticklabels([f"{x:g}" for x in rates], fontsize=9, rotation=60)
            axis.set_yticklabels([f"{x:g}" for x in dampings], fontsize=9)
            axis.set_title(f"{method}\nmomentum {momentum:g}".replace(" balanced", "\nbalanced"), fontsize=9)
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("damping", fontsize=10)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, ticks=[math.log10(x) for x in (0.5, 1, 2, 4)], label="loss")
    bar.ax.set_yticklabels(["0.5", "1", "2", "4"])
    _save(figure, folder / "images" / "sensitivity.png")


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/decorrelation.json and images/*.png go")
    parser.add_argument("--plot", action="store_true", help="only draw what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "data" / "decorrelation.json"
    if not options.plot:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(experiment()))
    plot(options.out)
    plot_sensitivity(options.out)


if __name__ == "__main__":
    main()
