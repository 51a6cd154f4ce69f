"""Processor time of one step over that of SGD with momentum, amortised over the schedule, and the memory of the state.

    python examples/optimizer_cost.py        # docs/data/cost.json, and the table on the screen

Single-threaded; the optimizers take turns, block by block of 50 steps, so that a busy machine slows all of them alike.
Medians over the blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from autoencoder_of_digits import autoencoder, loss_of
from optimizer_race import DOCS
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

Network = tuple[Callable[[], nn.Module], Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]
BLOCK, ROUNDS = 50, 9
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-4),
    "EKFAC-ra (default)": lambda m: nng.optim.EKFAC(m, lr=1e-4),
    "EKFAC-ra, statistics at refreshes only": lambda m: nng.optim.EKFAC(m, lr=1e-4, statistics_decay=0.0),
    "EKFAC, scalings of the batch": lambda m: nng.optim.EKFAC(m, lr=1e-4, scalings="batch"),
    "KFAC, inverse_every=50": lambda m: nng.optim.KFAC(m, lr=1e-4, inverse_every=50),
    "KFAC (default, inverse_every=10)": lambda m: nng.optim.KFAC(m, lr=1e-4),
    "KFAC, every step": lambda m: nng.optim.KFAC(m, lr=1e-4, inverse_every=1),
}


def conv_net() -> nn.Sequential:
    """Three convolutions on 16 x 16 images, 60 000 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def run(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    for _ in range(steps):
        opt.zero_grad()
        if isinstance(opt, nng.optim.NaturalGradient):
            with opt.observe():
                loss(model(x), y).backward()
        else:
            loss(model(x), y).backward()
        opt.step()
    return time.process_time() - start


def state_bytes(state: object) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(state_bytes(x) for x in items)


def main(out: Path, *, quick: bool) -> None:
    """Every task; with ``quick`` the first alone, in one round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, colours, labels = torch.rand(1000, 64), torch.randn(128, 3, 16, 16), torch.randint(0, 10, (128,))
    tasks: dict[str, Network] = {
        f"auto-encoder, batch {n}": (lambda: autoencoder(0), images[:n], images[:n], loss_of)
        for n in (100, 200, 500, 1000)
    }
    tasks["conv net, batch 128"] = (conv_net, colours, labels, F.cross_entropy)
    table: dict[str, dict] = {}
    for task, (make, x, y, loss) in list(tasks.items())[: 1 if quick else None]:
        rounds = 1 if quick else ROUNDS if task.startswith("auto") else 3
        trained = {name: (model := make(), method(model)) for name, method in METHODS.items()}
        numel = sum(p.numel() for p in make().parameters())
        spent: dict[str, list[float]] = {name: [] for name in METHODS}
        for model, opt in trained.values():
            run(model, opt, x, y, loss, 1)
        for _ in range(rounds):
            for name, (model, opt) in trained.items():
                spent[name].append(run(model, opt, x, y, loss, BLOCK))
        table[task] = {
            name: {
                "milliseconds": median(spent[name]) / BLOCK * 1e3,
                "ratio": median(spent[name]) / median(spent["SGD"]),
                "state, in parameters": state_bytes(opt.state_dict()) / 4 / numel,
            }
            for name, (_, opt) in trained.items()
        }
        for name, row in table[task].items():
            print(f"{task:24s} {name:40s}", {k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
    path = out / "data" / "cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/cost.json goes")
    parser.add_argument("--quick", action="store_true", help="one task, one round")
    options = parser.parse_args()
    main(options.out, quick=options.quick)
