"""Batch sizes and learning-rate schedules on the auto-encoder of the paper's size, in the same processor time.

The network, data and weights of ``autoencoder_full_size`` (``sparse``), KFAC with labels drawn, with given rates and
with steps to the minimum of the quadratic model, which have none, and Adam with batch normalisation at their settings
there, and SGD with it at the best of three rates. Batches of 50, 200 and 800 at constant rates; at 200, rates that fall
to zero as half a cosine, and as ``1 / (1 + 9 t)``, over the part ``t`` of the time that has passed; the latter at 800
too. Losses of 1000 digits that are not trained on. Runs that the file holds are kept.

    python examples/optimizer_batches.py            # docs/data/batches.json, docs/images/batches.png
    python examples/optimizer_batches.py --seconds 1 --seeds 1 --out out
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from autoencoder_full_size import ADAM, adaptive, kfac, sparse
from optimizer_at_size import train
from optimizer_held_out import mnist_digits, shuffled, tasks
from optimizer_race import DOCS

MODEL, SGD = "KFAC, steps of the model", "SGD + batch norm"
METHODS = {
    MODEL: adaptive,
    "KFAC, labels drawn": kfac(0.5),
    "Adam + batch norm": ADAM["Adam + batch norm, lr 0.003"],
    SGD: lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9),
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "half a cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "1 / (1 + 9 t)": lambda t: 1.0 / (1.0 + 9.0 * t),
}
FALLING = list(SCHEDULES)[1:]
CELLS = [(batch, "constant") for batch in (50, 200, 800)] + [(200, name) for name in FALLING] + [(800, FALLING[-1])]
Runs = dict[str, dict[str, dict[str, list]]]  # of a method and a cell, by seed


def cell_name(batch: int, schedule: str) -> str:
    """What is varied: the batch, or at batches of 200 the schedule, or both."""
    of = f"batches of {batch}"
    return of if schedule == "constant" else schedule if batch == 200 else f"{schedule}, {of}"


def plot(path: Path, image: Path) -> None:
    """Losses along the processor time, means and ranges over seeds: a panel for batches, one for schedules."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = json.loads(path.read_text())["methods"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 5), sharey=True)
    panels = ([c for c in CELLS if c[1] == "constant"], [c for c in CELLS if c[0] == 200])
    for axis, cells, title in zip(axes, panels, ("batch size", "schedule, batches of 200")):
        for method, style in zip(METHODS, ("-.", "-", "--", ":")):
            runs = methods[method]
            for k, (batch, schedule) in enumerate(c for c in cells if cell_name(*c) in runs):
                found = list(runs[cell_name(batch, schedule)].values())
                length = min(len(run["loss"]) for run in found)
                losses = torch.tensor([[math.nan if v is None else v for v in run["loss"][:length]] for run in found])
                seconds = torch.tensor([run["seconds"][:length] for run in found]).mean(0)
                what = f"{batch}" if cells is panels[0] else schedule
                axis.plot(seconds, losses.mean(0), style, color=f"C{k}", label=f"{method}: {what}", lw=1.2)
                axis.fill_between(seconds, losses.amin(0), losses.amax(0), alpha=0.15, color=f"C{k}", lw=0)
        axis.set(title=title, xlabel="seconds of processor time", yscale="log")
        axis.legend(fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    axes[0].set_ylabel("loss of digits held out")
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/batches.json and images/batches.png go")
    parser.add_argument("--seconds", type=float, default=15.0, help="processor time of a run")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = options.out / "data" / "batches.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(path.read_text()) if path.exists() else {"limit": options.seconds, "methods": {}}
    task, x = tasks(None)["autoencoder"], mnist_digits()[0][:4000]
    for seed in range(options.seeds):
        for batch, schedule in CELLS:
            for method, make in METHODS.items():
                if method in (MODEL, SGD) and schedule != "constant":
                    continue
                runs = table["methods"].setdefault(method, {}).setdefault(cell_name(batch, schedule), {})
                if str(seed) in runs:
                    continue
                model = lambda seed, _, norm="batch norm" in method: sparse(seed, norm)
                here = replace(task, model=model, batches=shuffled(x, x, batch))
                runs[str(seed)] = train(here, make, seed, table["limit"], max(1, 2000 // batch), SCHEDULES[schedule])
                path.write_text(json.dumps(table))
                print(f"{method:22s} {cell_name(batch, schedule):16s} {seed} {runs[str(seed)]['loss'][-1]}", flush=True)
    plot(path, options.out / "images" / "batches.png")


if __name__ == "__main__":
    main()
