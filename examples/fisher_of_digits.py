"""The Fisher matrix of a small convolutional net on handwritten digits, in every representation, against the exact one.

    python examples/fisher_of_digits.py            (or: make demo)

Trains the net, stops at three points (initialisation, early, trained), builds the exact Fisher matrix of a fixed set of
images in every representation at each, and measures what is lost: in Frobenius norm, in the trace, in products with
random directions, and in the damped natural gradients of minibatches. Prints one table for the trained net and writes

    out/fisher_of_digits.csv    every number, for every point in training and every damping, mean and standard deviation
    out/fisher_of_digits.png    the figure (and .pdf)

Protocol: George 2021, thesis, section 3.4.1, on a net small enough that the dense matrix is the judge.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

SEED = 0
FISHER_EXAMPLES = 256  # images over which every matrix is averaged
DRAWS = 20  # random directions, and minibatch gradients, a checkpoint
GRADIENT_BATCH = 64
TABLE_DAMPING = 1e-2
DAMPINGS = [10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0)]
CHECKPOINTS = {"initialisation": 0, "early": 30, "trained": 800}  # SGD steps

REPRESENTATIONS: dict[str, Any] = {
    "Dense": nng.PMatDense,
    "LowRank": nng.PMatLowRank,
    "Implicit": nng.PMatImplicit,
    "BlockDiag": nng.PMatBlockDiag,
    "Mixed": nng.PMatMixed({"conv1": nng.PMatBlockDiag, "conv2": nng.PMatBlockDiag}, default=nng.PMatEKFAC),
    "EKFAC": nng.PMatEKFAC,
    "EKFAC reduce": nng.PMatEKFAC.options(sharing="reduce"),
    "KFAC": nng.PMatKFAC,
    "KFAC reduce": nng.PMatKFAC.options(sharing="reduce"),
    "QuasiDiag": nng.PMatQuasiDiag,
    "Diag": nng.PMatDiag,
    "Eye": nng.PMatEye,
}
EXACT = ("Dense", "LowRank", "Implicit")  # equal to the Fisher matrix up to rounding: a check, not a competitor


class ConvNet(nn.Module):
    """Three convolutions and a linear read-out: 3114 parameters, 64, 16 and 4 positions sharing each kernel."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 1, 8, 8) -> (n, 10)``."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.head(x.flatten(1))


@dataclass
class Accuracy:
    """What one representation loses at one point in training. Lists hold one number a draw."""

    frobenius: float
    trace: float
    forward: list[float]  # cos(F v, M v), v uniform on the sphere
    natural: dict[float, list[float]] = field(default_factory=dict)  # damping -> cos of damped natural gradients
    solve: dict[float, list[float]] = field(default_factory=dict)  # damping -> cos(v, (M + x)^-1 (F + x) v)


@dataclass
class Cost:
    """What one representation costs."""

    megabytes: float
    seconds: float
    gradients: float  # seconds over those of one forward and backward pass on the same images


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images ``(n, 1, 8, 8)`` in [-1, 1] with labels, 1400 and 397 of them."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    images = (torch.as_tensor(x) / 8 - 1).reshape(-1, 1, 8, 8)[order]
    labels = torch.as_tensor(y)[order].long()
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(model: nn.Module, images: Tensor, labels: Tensor, visit: Callable[[str], None]) -> None:
    """SGD with momentum; ``visit`` is called at every checkpoint."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(SEED)
    points = {step: name for name, step in CHECKPOINTS.items()}
    for step in range(max(points) + 1):
        if step in points:
            visit(points[step])
        batch = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def minibatch_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> nng.PVector:
    """``DRAWS`` gradients of the mean loss of minibatches, as one batch of PVectors."""
    collection = nng.LayerCollection.from_model(model)
    rows, generator = [], torch.Generator().manual_seed(SEED)
    for _ in range(DRAWS):
        batch = torch.randint(len(images), (GRADIENT_BATCH,), generator=generator)
        model.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        rows.append(nng.PVector.from_grad(model).flat())
    model.zero_grad()
    return nng.PVector.from_flat(collection, torch.stack(rows))


def cosine(x: nng.PVector, y: nng.PVector) -> list[float]:
    """One cosine a vector of the batch."""
    return (x.dot(y) / (x.norm() * y.norm())).tolist()


def solve(matrix: Any, b: nng.PVector, damping: float) -> nng.PVector | None:
    """``(M + damping I)^-1 b``; ``None`` where the damped matrix is not positive definite (QuasiDiag)."""
    try:
        return matrix.solve(b, damping)
    except nng.SingularError:
        return None


def assess(matrices: dict[str, Any], gradients: nng.PVector) -> dict[str, Accuracy]:
    """Every matrix against the dense one."""
    exact = matrices["Dense"]
    collection, dense, trace = exact.layer_collection, exact.to_dense(), exact.trace()
    v = nng.PVector.randn(collection, DRAWS, dtype=exact.dtype, generator=torch.Generator().manual_seed(SEED))
    v = v / v.norm()  # uniform on the sphere
    fv, (values, basis) = exact @ v, exact.eigh()
    coordinates = basis.T.mv(gradients)
    natural = {x: basis.mv(nng.PVector.from_flat(collection, coordinates.flat() / (values + x))) for x in DAMPINGS}
    out = {}
    for name, m in matrices.items():
        implicit = isinstance(m, nng.PMatImplicit)
        mv = m @ v
        # E |(M - F) v|^2 = |M - F|_F^2 / d on the sphere: an estimate from products where there is no explicit matrix
        difference = (mv - fv).norm().square().mean().sqrt() * math.sqrt(len(dense)) if implicit else (m.to_dense() - dense).norm()
        a = out[name] = Accuracy(float(difference / dense.norm()), float((m.trace() - trace).abs() / trace), cosine(fv, mv))
        few = 2 if implicit else DRAWS  # each is a run of conjugate gradients
        for x in [TABLE_DAMPING] if name in EXACT else DAMPINGS:
            right = torch.cat([gradients.flat()[:few], (fv + x * v).flat()[:few]])
            solved = solve(m, nng.PVector.from_flat(collection, right), x)
            if solved is not None:
                truth = torch.cat([natural[x].flat()[:few], v.flat()[:few]])
                both = cosine(nng.PVector.from_flat(collection, truth), solved)
                a.natural[x], a.solve[x] = both[:few], both[few:]
    return out


def seconds(f: Callable[[], Any], most: float = 0.5) -> float:
    """The fastest of up to five runs, within about ``most`` seconds."""
    runs: list[float] = []
    while not runs or (len(runs) < 5 and sum(runs) < most):
        start = time.perf_counter()
        f()
        runs.append(time.perf_counter() - start)
    return min(runs)


def costs(model: nn.Module, loader: list, matrices: dict[str, Any]) -> dict[str, Cost]:
    """Bytes kept and time to build."""

    def gradient() -> None:
        model.zero_grad()
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    gradient()
    one = seconds(gradient)
    out = {}
    for name, representation in REPRESENTATIONS.items():
        took = seconds(lambda r=representation: nng.FIM(model, loader, r))
        held = 0 if isinstance(matrices[name], nng.PMatImplicit) else matrices[name].nbytes()
        out[name] = Cost(held / 1e6, took, took / one)
    return out


# -- what is printed, written and drawn ----------------------------------------------------------------------------------

Run = dict[str, dict[str, Accuracy]]  # {checkpoint: {representation: accuracy}}


def mean(x: list[float]) -> float:
    """The mean over draws; NaN where there is none."""
    return sum(x) / len(x) if x else math.nan


def spread(x: list[float]) -> float:
    """The standard deviation over draws."""
    return float(torch.tensor(x).std()) if len(x) > 1 else math.nan


def cell(x: list[float]) -> str:
    """``mean ± standard deviation``."""
    return f"{mean(x):.3f} ±{spread(x):.3f}" if x else "indefinite"


def table(accuracy: dict[str, Accuracy], cost: dict[str, Cost]) -> str:
    """The table of one checkpoint, as text."""
    lines = [("representation", "memory", "build", "/gradient", "Frobenius", "trace", "cos F v", "cos nat. gradient")]
    small = lambda x: "0" if x < 1e-9 else f"{x:.3f}"
    for name, a in accuracy.items():
        c = cost[name]
        memory = "data only" if c.megabytes == 0 else f"{1000 * c.megabytes:.3g} kB" if c.megabytes < 1 else f"{c.megabytes:.1f} MB"
        build = f"{1000 * c.seconds:.0f} ms"
        lines.append((name, memory, build, f"{c.gradients:.1f}", small(a.frobenius), small(a.trace), cell(a.forward), cell(a.natural.get(TABLE_DAMPING, []))))
    widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
    text = ["  ".join(x.ljust(w) if j == 0 else x.rjust(w) for j, (x, w) in enumerate(zip(line, widths))) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def write_csv(path: Path, run: Run, cost: dict[str, Cost]) -> None:
    """One line a checkpoint, representation and damping."""
    header = ["checkpoint", "representation", "megabytes", "build seconds", "build gradients", "frobenius error", "trace error", "forward cos", "forward cos std"]
    header += ["damping", "natural gradient cos", "natural gradient cos std", "solve cos", "solve cos std"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for checkpoint, accuracy in run.items():
            for name, a in accuracy.items():
                c = cost[name]
                first = [checkpoint, name, c.megabytes, c.seconds, c.gradients, a.frobenius, a.trace, mean(a.forward), spread(a.forward)]
                for x in [TABLE_DAMPING] if name in EXACT else DAMPINGS:
                    step, back = a.natural.get(x, []), a.solve.get(x, [])
                    writer.writerow([*first, x, mean(step), spread(step), mean(back), spread(back)])


def draw(path: Path, run: Run, cost: dict[str, Cost]) -> None:
    """The figure: accuracy against memory, products and traces through training, natural gradients against damping."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "legend.frameon": False})
    names = [name for name in REPRESENTATIONS if name not in EXACT]
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.6), constrained_layout=True)
    _accuracy_against_memory(axes[0, 0], run["trained"], cost)
    _through_training(axes[0, 1], run, names, lambda a: (mean(a.forward), spread(a.forward)), "(b) products: cos(F v, M v)")
    _through_training(axes[0, 2], run, names, lambda a: (a.trace, 0.0), "(c) trace: |tr M - tr F| / tr F", labels=False)
    for j, checkpoint in enumerate(run):
        _against_damping(axes[1, j], run[checkpoint], names, f"({'def'[j]}) natural gradient, {checkpoint}")
        axes[1, j].set_ylabel("cos with the exact one" if j == 0 else "")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1.8, columnspacing=1.3)
    for kind in ("png", "pdf"):
        fig.savefig(path.with_suffix(f".{kind}"), dpi=180)
    plt.close(fig)


# Okabe & Ito's colours, distinguishable with any colour vision; one marker a family, dashes for the "reduce" variants.
COLOURS = {"BlockDiag": "#000000", "Mixed": "#CC79A7", "EKFAC": "#0072B2", "KFAC": "#56B4E9", "QuasiDiag": "#009E73", "Diag": "#E69F00", "Eye": "#999999"}
MARKERS = {"BlockDiag": "s", "Mixed": "P", "EKFAC": "o", "KFAC": "^", "QuasiDiag": "v", "Diag": "D", "Eye": "X"}


def _style(name: str) -> dict[str, Any]:
    family = name.split()[0]
    reduce = name.endswith("reduce")
    return {"color": COLOURS[family], "marker": MARKERS[family], "linestyle": "--" if reduce else "-", "markerfacecolor": "white" if reduce else COLOURS[family]}


def _accuracy_against_memory(ax: Any, accuracy: dict[str, Accuracy], cost: dict[str, Cost]) -> None:
    for name, a in accuracy.items():
        if name == "Implicit":
            continue
        style = {"color": "#D55E00", "marker": "*", "markersize": 9} if name in EXACT else {**_style(name), "markersize": 6.5}
        ax.plot(cost[name].megabytes, a.frobenius, **{**style, "linestyle": "none"})
        ax.annotate(name, (cost[name].megabytes, a.frobenius), textcoords="offset points", xytext=(0, -11), ha="center", fontsize=7.5)
    ax.set(xscale="log", ylim=(-0.1, 1.1), xlabel="memory (MB)", title="(a) |M - F| / |F| against memory, trained")


def _through_training(ax: Any, run: Run, names: list[str], value: Callable[[Accuracy], tuple[float, float]], title: str, labels: bool = True) -> None:
    places = {name: len(names) - j for j, name in enumerate(names)}
    for checkpoint, shade, shift in zip(run, ("#56B4E9", "#009E73", "#D55E00"), (0.2, 0.0, -0.2)):
        points = {name: value(run[checkpoint][name]) for name in names}
        ax.errorbar(
            [p[0] for p in points.values()], [places[n] + shift for n in points], xerr=[p[1] for p in points.values()],
            fmt="o", color=shade, markersize=4.5, elinewidth=1.2, label=checkpoint,
        )  # fmt: skip
    ax.set(title=title, yticks=list(places.values()), yticklabels=list(places) if labels else [])
    ax.grid(axis="y", color="#eeeeee", zorder=0)
    if labels:
        ax.legend(loc="lower right", fontsize=8)


def _against_damping(ax: Any, accuracy: dict[str, Accuracy], names: list[str], title: str) -> None:
    for name in names:
        x = [d for d in DAMPINGS if accuracy[name].natural.get(d)]
        y = torch.tensor([mean(accuracy[name].natural[d]) for d in x])
        s = torch.tensor([spread(accuracy[name].natural[d]) for d in x])
        ax.plot(x, y, label=name, linewidth=1.4, markersize=4, **_style(name))
        if not name.endswith("reduce"):
            ax.fill_between(x, y - s, y + s, color=COLOURS[name], alpha=0.08, linewidth=0)
    ax.set(xscale="log", ylim=(0, 1.02), xlabel="damping", title=title)


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the CSV file and the figure (default: out)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(SEED)
    images, labels, test_images, test_labels = digits()
    model = ConvNet().double()
    loader = [(images[lo : lo + 128], labels[lo : lo + 128]) for lo in range(0, FISHER_EXAMPLES, 128)]
    print(f"{sum(p.numel() for p in model.parameters())} parameters; exact Fisher over {FISHER_EXAMPLES} of {len(images)} training images, float64")
    run: Run = {}
    matrices: dict[str, Any] = {}

    def visit(checkpoint: str) -> None:
        correct = (model(test_images).argmax(1) == test_labels).double().mean()
        print(f"  {checkpoint} (step {CHECKPOINTS[checkpoint]}): test accuracy {float(correct):.1%}", flush=True)
        matrices.update({name: nng.FIM(model, loader, representation) for name, representation in REPRESENTATIONS.items()})
        run[checkpoint] = assess(matrices, minibatch_gradients(model, images, labels))

    train(model, images, labels, visit)
    cost = costs(model, loader, matrices)
    print(f"\nTrained net, damping {TABLE_DAMPING:g}:\n\n{table(run['trained'], cost)}\n")
    print("memory: tensors kept. build: fastest run; /gradient: over one forward and backward pass on the same images.")
    print(f"Frobenius, trace: relative errors (0: below 1e-9). cosines with the exact ones: mean ± standard deviation over {DRAWS} draws (Implicit: 2 solves).")
    write_csv(out / "fisher_of_digits.csv", run, cost)
    draw(out / "fisher_of_digits", run, cost)
    print(f"wrote {out}/fisher_of_digits.csv, .png and .pdf; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
