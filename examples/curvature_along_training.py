"""How far stale Kronecker factors fall behind: KFAC and EKFAC with a basis of the start of training, and of every 100 steps.

A small sigmoid classifier of digits (64-20-20-20-10, Xavier weights of gain 4) trained by SGD with momentum. On a
fixed probe set, layer by layer for the second layer: the relative error ``|F - M| / |F|`` of the empirical Fisher
matrix in Frobenius norm (George et al. 2018, figure 2), and the distance between sorted spectra (figure 4c), for
KFAC and EKFAC in fresh, 100-step-old and initial bases, and for EKFAC-ra's running scalings in the initial basis.

    python examples/curvature_along_training.py        # docs/data/curvature.json, docs/images/curvature.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from autoencoder_of_digits import digits
from optimizer_race import DOCS
from residual_digits import labels
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.core.layout import Layout
from nngeom.pmat.kfac import EigenBlock

STEPS, EVERY, REFRESH, DECAY = 500, 20, 100, 0.75


def network() -> nn.Sequential:
    """64-20-20-20-10 with sigmoids."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((64, 20), (20, 20), (20, 20), (20, 10)):
        linear = nn.Linear(a, b)
        nn.init.xavier_normal_(linear.weight, gain=4.0)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1]).double()


def measured(model: nn.Module, probe: tuple[Tensor, Tensor]) -> tuple[Tensor, Layout, EigenBlock]:
    """The dense block of the second layer, and KFAC's block of it in its eigenbasis."""
    lc = nng.LayerCollection.from_model(model, include="2")
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


def errors(dense: Tensor, layout: Layout, block: EigenBlock) -> tuple[float, float]:
    """Relative Frobenius error, and the distance of sorted spectra relative to ``|F|``."""
    flat = torch.zeros(dense.shape, dtype=dense.dtype)
    layout.scatter_(flat, block.mv(layout.gather(torch.eye(dense.shape[0], dtype=dense.dtype))))
    spectrum = (torch.linalg.eigvalsh(dense) - block.d.flatten().sort().values).norm()
    return float((dense - flat).norm() / dense.norm()), float(spectrum / dense.norm())


def main() -> None:
    torch.set_num_threads(1)
    x, y = digits().double(), labels()
    model, probe, order = network(), (x[:300], y[:300]), torch.Generator().manual_seed(0)
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    curves: dict[str, list] = {"step": []}
    running = first = recent = None
    for step in range(STEPS + 1):
        index = torch.randint(len(x), (128,), generator=order)
        opt.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        if step % EVERY == 0:
            dense, layout, fresh = measured(model, probe)
            first = fresh if first is None else first
            recent = fresh if step % REFRESH == 0 else recent
        if running is None:
            running = first
        v = first.basis.tmv(layout.gather(nng.PVector.from_grad(model, nng.LayerCollection.from_model(model, include="2")).flat()))
        running = dataclasses.replace(running, d=DECAY * running.d + (1 - DECAY) * 128 * v.square())
        if step % EVERY == 0:
            curves["step"].append(step)
            for name, block in {
                "KFAC, fresh": fresh, "KFAC, every 100 steps": recent, "KFAC, first basis": first,
                "EKFAC, fresh": in_basis(dense, layout, fresh), "EKFAC, every 100 steps": in_basis(dense, layout, recent),
                "EKFAC, first basis": in_basis(dense, layout, first), "EKFAC-ra, first basis": running,
            }.items():  # fmt: skip
                curves.setdefault(name, []).append(errors(dense, layout, block))
        opt.step()
    path = DOCS / "data" / "curvature.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(curves))
    for name, values in curves.items():
        if name != "step":
            shown = [f"{values[j][0]:.2g}" for j in (0, 4, 14, 24)]
            print(f"{name:24s} error at 0, 80, 280, 480: {', '.join(shown)}; spectrum at 480: {values[24][1]:.2g}")
    plot(curves)


def plot(curves: dict[str, list]) -> None:
    """Both measures along training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    colours = {"fresh": "C0", "every 100 steps": "C1", "first basis": "C2"}
    for name, values in curves.items():
        if name == "step":
            continue
        kind, age = name.split(", ")
        for axis, j in zip(axes, (0, 1)):
            axis.plot(curves["step"], [v[j] for v in values], {"KFAC": "--", "EKFAC": "-", "EKFAC-ra": ":"}[kind], color=colours[age], label=name)
    axes[0].set(xlabel="step", ylabel="relative error", yscale="log")
    axes[1].set(xlabel="step", ylabel="distance of spectra", yscale="log")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    (DOCS / "images").mkdir(parents=True, exist_ok=True)
    figure.savefig(DOCS / "images" / "curvature.png", dpi=80)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
