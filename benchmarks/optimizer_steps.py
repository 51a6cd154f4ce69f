"""Processor time of optimizers' steps over that of SGD with momentum, amortised over their default schedules.

    python -m benchmarks.optimizer_steps        # docs/data/steps.json, and the table on the screen
    python -m benchmarks.optimizer_steps --only auto-encoder     # the others stay as they are

Every method steps with its default periods, in turns of 100 steps, which are a whole number of them; of a turn the mean
counts, over turns the median. From the 25th step on. Single-threaded, one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

WARM = 24  # the model is compared with the loss at the first 20 steps, and at every fifth later
TURN = 100  # steps; bases come every 50, inverses every 10, statistics every 10 or 5


class Embedded(nn.Module):
    """A character GPT of 64 positions: two blocks of ``nn.TransformerEncoderLayer``."""

    def __init__(self, width: int = 96, vocabulary: int = 80):
        super().__init__()
        self.table, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        layer = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.positions(torch.arange(x.shape[1]).expand_as(x))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask)
        return self.head(h)


def autoencoder() -> nn.Module:
    """784-1000-500-250-30 and back, sigmoids."""
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Sigmoid())]
    return nn.Sequential(*layers[:-1])


def deep() -> nn.Module:
    """Many small layers, and one to two classes."""
    layers = [layer for _ in range(16) for layer in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 2))


def problems() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]]:
    """Model, inputs, loss of outputs."""
    images, characters = torch.rand(200, 784), torch.randint(0, 80, (16, 64))
    points, labels = torch.randn(32, 10), torch.randint(0, 2, (32,))
    return {
        "auto-encoder 784-1000-500-250-30, batch 200": (
            autoencoder,
            images,
            lambda f: 0.5 * (f.sigmoid() - images).square().sum(1).mean(),
        ),
        "character GPT, width 96, batch 16 x 64": (
            Embedded,
            characters,
            lambda f: F.cross_entropy(f[:, :-1].flatten(0, 1), characters[:, 1:].flatten()),
        ),
        "10-32-2, batch 32": (
            lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2)),
            points,
            lambda f: F.cross_entropy(f, labels),
        ),
        "16 layers of 32-32, batch 32": (deep, torch.randn(32, 32), lambda f: F.cross_entropy(f, labels)),
    }


def soap(model: nn.Module) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=1e-5, precondition_frequency=10)


METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-5, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-5),
    "EKFAC": lambda m: nng.optim.EKFAC(m, lr=1e-5),
    "EKFAC, drowned=0": lambda m: nng.optim.EKFAC(m, lr=1e-5, drowned=0.0),
    "KFAC": lambda m: nng.optim.KFAC(m, lr=1e-5),
    "SOAP": lambda m: nng.optim.SOAP(m, lr=1e-5),
    "SOAP of pytorch_optimizer": soap,
}


def timed(
    make: Callable[[], nn.Module], x: Tensor, loss: Callable[[Tensor], Tensor], turns: int
) -> dict[str, list[float]]:
    """Milliseconds of a step of every method, the mean of each turn; the methods take turns."""
    runs: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for method, optimizer in METHODS.items():
        torch.manual_seed(0)
        model = make()
        runs[method] = model, optimizer(model)
        run(*runs[method], x, loss, WARM)
    means: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(turns):
        for method, (model, opt) in runs.items():
            means[method].append(1e3 * run(model, opt, x, loss, TURN) / TURN)
    return means


def run(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> float:
    """Seconds of processor time of so many ``steps``."""
    start = time.process_time()
    for _ in range(steps):
        opt.zero_grad()
        if isinstance(opt, nng.optim.NaturalGradient):
            with opt.observe("mean"):
                loss(model(x)).backward()
        else:
            loss(model(x)).backward()
        opt.step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="problems whose name begins so")
    parser.add_argument("--turns", type=int, default=9, help="of 100 steps each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.QuadraticModelWarning)  # of steps that are timed, not of use
    path = Path(__file__).parent.parent / "docs" / "data" / "steps.json"
    table = json.loads(path.read_text())
    for name, (make, x, loss) in problems().items():
        if not name.startswith(options.only):
            continue
        times = {method: median(means) for method, means in timed(make, x, loss, options.turns).items()}
        table[name] = {k: {"milliseconds": round(v, 3), "ratio": round(v / times["SGD"], 3)} for k, v in times.items()}
        print(name, {k: (round(v, 3), round(v / times["SGD"], 2)) for k, v in times.items()}, flush=True)
    path.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
