"""What it costs to compute bases and inverses seldom: KFAC, EKFAC and EKFAC-ra on the auto-encoder, every 1, 10, 50 and
200 steps.

24 settings each (3 lr x 4 dampings, with momentum 0 and 0.9) on one seed, the best on three; training loss after 40
epochs of 8 steps.

    python examples/optimizer_amortisation.py        # docs/data/amortisation.json, docs/images/amortisation.png
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path

import torch
from autoencoder_of_digits import MOMENTA, autoencoder, digits, loss_of
from optimizer_race import DOCS, Training, experiment, final, grid

import nngeom as nng

PERIODS = (1, 10, 50, 200)
METHODS = ("EKFAC-ra", "EKFAC", "KFAC")
DAMPED = grid((3e-3, 0.01, 0.03), (1e-4, 3e-4, 1e-3, 3e-3), MOMENTA)


def plot(path: Path, image: Path) -> None:
    """The final loss against the period, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for method in METHODS:
        losses = [
            [final(r, results["epochs"]) for r in results["best"][f"{method}, every {period}"]] for period in PERIODS
        ]
        finite = [(period, [v for v in row if math.isfinite(v)]) for period, row in zip(PERIODS, losses)]
        at = [period for period, row in finite if row]
        rows = [row for _, row in finite if row]
        (line,) = axis.plot(at, [sum(row) / len(row) for row in rows], "o-", label=method)
        axis.fill_between(at, [min(row) for row in rows], [max(row) for row in rows], alpha=0.2, color=line.get_color())
    axis.set(
        xlabel="steps between bases or inverses",
        ylabel=f"training loss after {results['epochs']} epochs",
        xscale="log",
        yscale="log",
    )
    axis.legend(fontsize=7)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--out", type=Path, default=DOCS, help="where data/amortisation.json and images/amortisation.png go"
    )
    parser.add_argument("--plot", action="store_true", help="only draw docs/data/amortisation.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.SkippedStepWarning)
    path, x = options.out / "data" / "amortisation.json", digits()
    if not options.plot:
        grids = {f"{method}, every {period}": DAMPED for method in METHODS for period in PERIODS}
        experiment(Training(autoencoder, loss_of, x, x, 200), grids, options.epochs, path)
    plot(path, options.out / "images" / "amortisation.png")


if __name__ == "__main__":
    main()
