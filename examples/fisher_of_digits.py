"""The Fisher matrix of a small convolutional net on handwritten digits, in every representation, against the exact one.

    python examples/fisher_of_digits.py            (or: make demo)

Trains the net, stops at three points (initialisation, early, trained), builds the exact Fisher matrix of a fixed set of
images in every representation at each, and measures what is lost: in Frobenius norm, in the trace, in products with
random directions, and in the damped natural gradients of minibatches. Prints one table for the trained net and writes

    out/fisher_of_digits.csv    every number, for every point in training and every damping, mean and standard deviation
    out/fisher_of_digits.png    the figure (and .pdf)

Protocol: George 2023, thesis, section 3.4.1, on a net small enough that the dense matrix is the judge.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from fisher_of_digits_figure import draw
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

    def __init__(self, widths: tuple[int, int, int] = (6, 12, 16)):
        super().__init__()
        a, b, c = widths
        self.conv1 = nn.Conv2d(1, a, 3, padding=1)
        self.conv2 = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * c, 10)

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
        difference = (
            (mv - fv).norm().square().mean().sqrt() * math.sqrt(len(dense))
            if implicit
            else (m.to_dense() - dense).norm()
        )
        a = out[name] = Accuracy(
            float(difference / dense.norm()), float((m.trace() - trace).abs() / trace), cosine(fv, mv)
        )
        few = 2 if implicit else DRAWS  # each is a run of conjugate gradients
        for x in [TABLE_DAMPING] if name in EXACT else DAMPINGS:
            right = torch.cat([gradients.flat()[:few], (fv + x * v).flat()[:few]])
            solved = solve(m, nng.PVector.from_flat(collection, right), x)
            if solved is not None:
                truth = torch.cat([natural[x].flat()[:few], v.flat()[:few]])
                both = cosine(nng.PVector.from_flat(collection, truth), solved)
                a.natural[x], a.solve[x] = both[:few], both[few:]
    return out


def seconds(f: Callable[[], Any], most: float = 1.0) -> float:
    """The fastest of up to ten runs, within about ``most`` seconds."""
    runs: list[float] = []
    while not runs or (len(runs) < 10 and sum(runs) < most):
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


# -- what is printed, written and drawn --------------------------------------------------------------------------------

Run = dict[str, dict[str, Accuracy]]  # {checkpoint: {representation: accuracy}}


def moments(x: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over draws; NaN where there are none."""
    return (fmean(x), stdev(x)) if x else (math.nan, math.nan)


def size(megabytes: float) -> str:
    """Bytes for people."""
    if megabytes == 0:
        return "data only"
    return (
        f"{megabytes:.1f} MB"
        if megabytes >= 1
        else f"{1000 * megabytes:.0f} kB"
        if megabytes >= 1e-3
        else f"{1e6 * megabytes:.0f} B"
    )


def table(accuracy: dict[str, Accuracy], cost: dict[str, Cost]) -> str:
    """The table of one checkpoint, as text."""
    small = lambda x: "0" if x < 1e-9 else f"{x:.3f}"
    cell = lambda x: "{:.3f} ± {:.3f}".format(*moments(x)) if x else "indefinite"
    lines = [("representation", "memory", "build", "gradients", "Frobenius", "trace", "cos F v", "cos natural grad")]
    for name, a in accuracy.items():
        c = cost[name]
        spent = size(c.megabytes), f"{1000 * c.seconds:.0f} ms", f"{c.gradients:.0f}"
        lines.append(
            (name, *spent, small(a.frobenius), small(a.trace), cell(a.forward), cell(a.natural.get(TABLE_DAMPING, [])))
        )
    widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
    text = [
        "  ".join(x.ljust(w) if j == 0 else x.rjust(w) for j, (x, w) in enumerate(zip(line, widths))) for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def write_csv(path: Path, run: Run, cost: dict[str, Cost]) -> None:
    """One line a checkpoint, representation and damping."""
    header = [
        "checkpoint",
        "representation",
        "megabytes",
        "build seconds",
        "build gradients",
        "frobenius error",
        "trace error",
    ]
    header += [
        "forward cos",
        "forward cos std",
        "damping",
        "natural gradient cos",
        "natural gradient cos std",
        "solve cos",
        "solve cos std",
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for checkpoint, accuracy in run.items():
            for name, a in accuracy.items():
                c = cost[name]
                first = [
                    checkpoint,
                    name,
                    c.megabytes,
                    c.seconds,
                    c.gradients,
                    a.frobenius,
                    a.trace,
                    *moments(a.forward),
                ]
                for x in [TABLE_DAMPING] if name in EXACT else DAMPINGS:
                    writer.writerow([*first, x, *moments(a.natural.get(x, [])), *moments(a.solve.get(x, []))])


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the CSV file and the figure (default: out)"
    )
    parser.add_argument("--quick", action="store_true", help="a narrower net: a look at what there will be")
    args = parser.parse_args(arguments)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(SEED)
    images, labels, test_images, test_labels = digits()
    model = (ConvNet((3, 4, 6)) if args.quick else ConvNet()).double()
    loader = [(images[lo : lo + 128], labels[lo : lo + 128]) for lo in range(0, FISHER_EXAMPLES, 128)]
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters; exact Fisher over {FISHER_EXAMPLES} of "
        f"{len(images)} training images, float64"
    )
    run: Run = {}
    matrices: dict[str, Any] = {}

    def visit(checkpoint: str) -> None:
        correct = (model(test_images).argmax(1) == test_labels).double().mean()
        print(f"  {checkpoint} (step {CHECKPOINTS[checkpoint]}): test accuracy {float(correct):.1%}", flush=True)
        matrices.update(
            {name: nng.FIM(model, loader, representation) for name, representation in REPRESENTATIONS.items()}
        )
        run[checkpoint] = assess(matrices, minibatch_gradients(model, images, labels))

    train(model, images, labels, visit)
    cost = costs(model, loader, matrices)
    print(f"\nTrained net, damping {TABLE_DAMPING:g}:\n\n{table(run['trained'], cost)}\n")
    print(
        "memory: tensors kept. build: fastest of several runs; gradients: the same in forward and backward "
        "passes over these images."
    )
    print(
        "Frobenius, trace: relative errors (0: below 1e-9). cosines with the exact vectors: mean ± standard "
        f"deviation over {DRAWS} draws"
    )
    print("(2 for the solves of Implicit); indefinite: no natural gradient at this damping.")
    write_csv(out / "fisher_of_digits.csv", run, cost)
    names = [name for name in REPRESENTATIONS if name not in EXACT]
    draw(out / "fisher_of_digits", run, {name: size(c.megabytes) for name, c in cost.items()}, names, DAMPINGS)
    print(f"wrote {out}/fisher_of_digits.csv, .png and .pdf; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
