"""A deep auto-encoder of digits, trained by KFAC, EKFAC, EKFAC-ra, SGD with momentum and batch normalisation, and Adam.

The experiment of George et al. 2018 (figure 3), small: layers 64-100-50-25-6 and back with sigmoids, weights N(0, 1 / fan-in), logistic
outputs, half the squared error summed over pixels, batches of 200. Every method gets the same number of settings on
one seed (4 lr x 4 dampings, or 16 lr), the best of which is run on three. ``--quick`` shows one setting of each.

    python examples/autoencoder_of_digits.py            # all of it: docs/data/autoencoder.json
    python examples/autoencoder_of_digits.py --plot     # docs/images/autoencoder.png from that file
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import nngeom as nng

DOCS = Path(__file__).parent.parent / "docs"
WIDTHS = (64, 100, 50, 25, 6, 25, 50, 100, 64)
BATCH, EPOCHS, SEEDS = 200, 60, (0, 1, 2)
RATES, DAMPINGS = (3e-3, 0.01, 0.03, 0.1), (3e-4, 1e-3, 3e-3, 1e-2)
GRIDS = {
    "EKFAC-ra": [(lr, x) for lr in RATES for x in DAMPINGS],
    "EKFAC": [(lr, x) for lr in RATES for x in DAMPINGS],
    "KFAC": [(lr, x) for lr in RATES for x in DAMPINGS],
    "KFAC, every step": [(lr, x) for lr in RATES for x in DAMPINGS],
    "SGD + batch norm": [(lr, None) for lr in (10 ** (-3 + 0.25 * j) for j in range(16))],
    "Adam": [(lr, None) for lr in (10 ** (-4 + 0.2 * j) for j in range(16))],
}
QUICK = {"EKFAC-ra": (0.03, 3e-3), "EKFAC": (3e-3, 3e-4), "KFAC, every step": (0.01, 3e-3), "SGD + batch norm": (0.18, None), "Adam": (0.01, None)}


def digits() -> Tensor:
    """``(1797, 64)``, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().data / 16, dtype=torch.float32)


def autoencoder(seed: int, batch_norm: bool = False) -> nn.Sequential:
    """Logits of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for j, (fan_in, width) in enumerate(zip(WIDTHS, WIDTHS[1:])):
        linear = nn.Linear(fan_in, width)
        linear.weight.data.normal_(0, fan_in**-0.5, generator=generator)
        linear.bias.data.zero_()
        layers.append(linear)
        if j < len(WIDTHS) - 2:
            layers += [nn.BatchNorm1d(width), nn.Sigmoid()] if batch_norm else [nn.Sigmoid()]
    return nn.Sequential(*layers)


def loss_of(logits: Tensor, x: Tensor) -> Tensor:
    """Half the squared error, summed over pixels, averaged over examples."""
    return 0.5 * (logits.sigmoid() - x).square().sum(1).mean()


def optimizer(method: str, model: nn.Module, lr: float, damping: float | None) -> torch.optim.Optimizer:
    """A method at one setting of its grid; bases and inverses are computed every 50 steps where nothing else is said."""
    if method == "Adam":
        return torch.optim.Adam(model.parameters(), lr=lr)
    if method == "SGD + batch norm":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    damped = nng.FactoredTikhonov(damping)
    if method.startswith("KFAC"):
        return nng.optim.KFAC(model, lr=lr, damping=damped, inverse_every=1 if method.endswith("every step") else 50)
    return nng.optim.EKFAC(model, lr=lr, damping=damped, basis_every=50, scalings="running" if method == "EKFAC-ra" else "batch")


def train(method: str, lr: float, damping: float | None, seed: int, epochs: int = EPOCHS) -> dict:
    """The training loss after each epoch, and the processor time of the training steps alone."""
    x = digits()
    model = autoencoder(seed, batch_norm=method.endswith("batch norm"))
    opt = optimizer(method, model, lr, damping)
    order = torch.Generator().manual_seed(1000 + seed)
    losses, seconds, spent = [], [], 0.0
    for _ in range(epochs):
        model.train()
        start = time.process_time()
        for batch in x[torch.randperm(len(x), generator=order)].split(BATCH)[: len(x) // BATCH]:
            opt.zero_grad()
            if isinstance(opt, nng.optim.NaturalGradient):
                with opt.observe():
                    loss_of(model(batch), batch).backward()
            else:
                loss_of(model(batch), batch).backward()
            opt.step()
        spent += time.process_time() - start
        model.eval()
        with torch.no_grad():
            value = float(loss_of(model(x), x))
        losses.append(value if math.isfinite(value) else None)
        seconds.append(round(spent, 4))
        if losses[-1] is None or value > 100:
            break
    return {"method": method, "lr": float(f"{lr:.3g}"), "damping": damping, "seed": seed, "loss": losses, "seconds": seconds}


def final(run: dict, epochs: int) -> float:
    """The last loss; infinite where the run diverged."""
    return run["loss"][-1] if len(run["loss"]) == epochs and run["loss"][-1] is not None else math.inf


def experiment(epochs: int, path: Path) -> None:
    """Grid on the first seed, the best setting on all."""
    results: dict = {"epochs": epochs, "grid": {}, "best": {}}
    if path.exists() and json.loads(path.read_text())["epochs"] == epochs:  # methods that are there already are kept
        results = json.loads(path.read_text())
    for method, grid in GRIDS.items():
        if method in results["best"]:
            continue
        runs = [train(method, lr, x, SEEDS[0], epochs) for lr, x in grid]
        best = min(runs, key=lambda r: final(r, epochs))
        results["grid"][method] = [{"lr": r["lr"], "damping": r["damping"], "final": r["loss"][-1] if len(r["loss"]) == epochs else None} for r in runs]
        results["best"][method] = [best] + [train(method, best["lr"], best["damping"], seed, epochs) for seed in SEEDS[1:]]
        print(f"{method:18s} lr {best['lr']:g} damping {best['damping']}: {[round(final(r, epochs), 3) for r in results['best'][method]]}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results))


def plot(path: Path, image: Path) -> None:
    """Loss per epoch and per second of processor time, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for method, runs in results["best"].items():
        kept = [r for r in runs if len(r["loss"]) == results["epochs"] and r["loss"][-1] is not None]
        if not kept:
            continue
        losses, seconds = torch.tensor([r["loss"] for r in kept]), torch.tensor([r["seconds"] for r in kept]).mean(0)
        for axis, at in zip(axes, (torch.arange(1, results["epochs"] + 1), seconds)):
            (line,) = axis.plot(at, losses.mean(0), label=method)
            axis.fill_between(at, losses.amin(0), losses.amax(0), alpha=0.2, color=line.get_color())
    axes[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="seconds of processor time")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one setting of each method, one seed, few epochs")
    parser.add_argument("--plot", action="store_true", help="only draw docs/data/autoencoder.json")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.SkippedStepWarning)  # settings that diverge
    path = DOCS / "data" / "autoencoder.json"
    if options.quick:
        for method, setting in QUICK.items():
            run = train(method, *setting, 0, min(options.epochs, 20))
            print(f"{method:18s} loss {run['loss'][-1]:.3f} after {len(run['loss'])} epochs, {run['seconds'][-1]:.2f} s")
        return
    if not options.plot:
        experiment(options.epochs, path)
    plot(path, DOCS / "images" / "autoencoder.png")


if __name__ == "__main__":
    main()
