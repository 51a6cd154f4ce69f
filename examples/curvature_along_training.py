"""How far stale Kronecker factors fall behind: KFAC and EKFAC with a basis of the start of training, and of every 100
steps.

A small sigmoid classifier of digits (64-20-20-20-10, Xavier weights of gain 4) trained by SGD with momentum, three
times. On a fixed probe set, layer by layer: the relative error ``|F - M| / |F|`` of the empirical Fisher matrix in
Frobenius norm (George et al. 2018, figure 2), and the distance between sorted spectra (figure 4c), for KFAC and EKFAC
in fresh, 100-step-old and initial bases, and for EKFAC-ra's running scalings in the initial basis.

    python examples/curvature_along_training.py        # docs/data/curvature.json, docs/images/curvature.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from autoencoder_of_digits import digits
from optimizer_race import DOCS
from residual_digits import labels
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.core.layout import Layout
from nngeom.pmat.kronecker import EigenBlock

STEPS, EVERY, REFRESH, DECAY = 500, 20, 100, 0.75
SEEDS, LAYERS = (0, 1, 2), ("0", "2", "4", "6")


def network(seed: int) -> nn.Sequential:
    """64-20-20-20-10 with sigmoids."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in ((64, 20), (20, 20), (20, 20), (20, 10)):
        linear = nn.Linear(a, b)
        nn.init.xavier_normal_(linear.weight, gain=4.0)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1]).double()


def measured(
    model: nn.Module, lc: nng.LayerCollection, probe: tuple[Tensor, Tensor]
) -> tuple[Tensor, Layout, EigenBlock]:
    """The dense block of a layer, and KFAC's block of it in its eigenbasis."""
    dense = nng.EmpiricalFIM(model, probe, nng.PMatDense, loss="cross_entropy", layer_collection=lc).to_dense()
    kfac = nng.EmpiricalFIM(model, probe, nng.PMatKFAC, loss="cross_entropy", layer_collection=lc)
    ((layout, block),) = kfac.blocks.items()
    return dense, layout, block.eigen()


def in_basis(dense: Tensor, layout: Layout, block: EigenBlock) -> EigenBlock:
    """EKFAC in a given basis: the second moments along it, which are the diagonal of the rotated matrix."""
    columns = block.basis.mv(torch.eye(dense.shape[0], dtype=dense.dtype).view(-1, *block.d.shape))  # eigenvectors
    flat = torch.zeros(dense.shape, dtype=dense.dtype)
    layout.scatter_(flat, columns)
    return dataclasses.replace(block, d=((flat @ dense) * flat).sum(1).view(block.d.shape))


def errors(dense: Tensor, spectrum: Tensor, layout: Layout, block: EigenBlock) -> tuple[float, float]:
    """Relative Frobenius error, and the distance of sorted spectra relative to ``|F|``."""
    flat = torch.zeros(dense.shape, dtype=dense.dtype)
    layout.scatter_(flat, block.mv(layout.gather(torch.eye(dense.shape[0], dtype=dense.dtype))))
    distance = (spectrum - block.d.flatten().sort().values).norm()
    return float((dense - flat).norm() / dense.norm()), float(distance / dense.norm())


class Layer:
    """One layer along training: its bases of different ages, and what was measured in them."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.collection = model, nng.LayerCollection.from_model(model, include=name)
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.first: EigenBlock | None = None

    def measure(self, probe: tuple[Tensor, Tensor], step: int) -> None:
        """Both errors of every approximation, at this step."""
        dense, self.layout, fresh = measured(self.model, self.collection, probe)
        if self.first is None:
            self.first = self.running = fresh
        if step % REFRESH == 0:
            self.recent = fresh
        blocks = {
            "KFAC, fresh": fresh,
            "KFAC, every 100 steps": self.recent,
            "KFAC, first basis": self.first,
            "EKFAC, fresh": in_basis(dense, self.layout, fresh),
            "EKFAC, every 100 steps": in_basis(dense, self.layout, self.recent),
            "EKFAC, first basis": in_basis(dense, self.layout, self.first),
            "EKFAC-ra, first basis": self.running,
        }
        spectrum = torch.linalg.eigvalsh(dense)
        for name, block in blocks.items():
            self.curves.setdefault(name, []).append(errors(dense, spectrum, self.layout, block))

    def follow(self, batch: int) -> None:
        """The running scalings take in the gradient of a batch."""
        v = self.running.basis.tmv(self.layout.gather(nng.PVector.from_grad(self.model, self.collection).flat()))
        self.running = dataclasses.replace(self.running, d=DECAY * self.running.d + (1 - DECAY) * batch * v.square())


def trained(seed: int, steps: int) -> dict[str, dict[str, list]]:
    """``layer -> approximation -> [(error, distance of spectra)]`` along one training."""
    x, y = digits().double(), labels()
    model, probe, order = network(seed), (x[:300], y[:300]), torch.Generator().manual_seed(seed)
    layers = {name: Layer(model, name) for name in LAYERS}
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(steps + 1):
        index = torch.randint(len(x), (128,), generator=order)
        opt.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        for layer in layers.values():
            if step % EVERY == 0:
                layer.measure(probe, step)
            layer.follow(128)
        opt.step()
    return {name: layer.curves for name, layer in layers.items()}


def main(out: Path, seeds: tuple[int, ...], steps: int) -> None:
    torch.set_num_threads(1)
    runs = [trained(seed, steps) for seed in seeds]
    curves = {
        name: {
            kind: [[[float(f"{v:.4g}") for v in pair] for pair in run[name][kind]] for run in runs]
            for kind in runs[0][name]
        }
        for name in LAYERS
    }
    path = out / "data" / "curvature.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": list(range(0, steps + 1, EVERY)), "layers": curves}))
    plot(json.loads(path.read_text()), out)


def plot(results: dict, out: Path) -> None:
    """Both measures along training, a column a layer: mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(LAYERS), figsize=(11, 5), sharex=True, sharey="row")
    colours = {"fresh": "C0", "every 100 steps": "C1", "first basis": "C2"}
    for column, curves in enumerate(results["layers"].values()):
        axes[0, column].set_title(f"layer {column + 1}", fontsize=9)
        for name, runs in curves.items():
            kind, age = name.split(", ")
            values = torch.tensor(runs)  # [seed, step, measure]
            for axis, v in zip(axes[:, column], values.unbind(-1)):
                axis.plot(
                    results["step"],
                    v.mean(0),
                    {"KFAC": "--", "EKFAC": "-", "EKFAC-ra": ":"}[kind],
                    color=colours[age],
                    label=name,
                )
                axis.fill_between(results["step"], v.amin(0), v.amax(0), color=colours[age], alpha=0.08)
    for axis, label in zip(axes[:, 0], ("relative error", "distance of spectra")):
        axis.set(ylabel=label, yscale="log")
    for axis in axes[1]:
        axis.set(xlabel="step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=4, fontsize=7)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    (out / "images").mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "images" / "curvature.png", dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/curvature.json and images/curvature.png go")
    parser.add_argument("--quick", action="store_true", help="one seed and a tenth of the steps")
    options = parser.parse_args()
    main(options.out, SEEDS[:1] if options.quick else SEEDS, STEPS // 10 if options.quick else STEPS)
