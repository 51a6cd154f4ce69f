"""Model Gradient Similarity as a regulariser, on digits with flipped labels: accuracy tables, metrics, attacks.

    python examples/mgs_digits.py [--data FOLDER] [--seeds 5] [--epochs 60] [--nets FCN,LeNet]

Motion-blurred training images, clean test images (as in the later version of the paper), 0/30/60/80 % flipped labels, a
fully connected net and a LeNet-style one. No regulariser, dropout, weight decay, the norm of the loss gradient, and the
MGS trace penalty (one random sign vector a step): each strength is tuned at 50 % noise on a validation split (three
seeds), then fixed. Writes

    out/mgs_digits.csv      final (mean of the last five evaluations) and best test accuracy, mean and deviation over
    seeds out/mgs_digits.png      accuracy and metrics along training at 60 % noise;  out/mgs_attacks.csv     AUROC of
    the two adversarial scores

Protocol: Szolnoky et al. 2022, section 5 and appendices A and C, on nets and data that fit minutes on one core.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import (
    COLOURS,
    Data,
    accuracy,
    arguments,
    band,
    batches,
    corrupt,
    figure,
    lenet,
    load,
    mlp,
    motion_blur,
    save,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom import mgs

NOISES = (0.0, 0.3, 0.6, 0.8)
GRIDS: dict[str, list[float]] = {
    "none": [0.0],
    "dropout": [0.1, 0.2, 0.5],
    "weight": [3e-4, 1e-3, 3e-3, 1e-2],
    "loss-gradient": [0.02, 0.05, 0.2, 0.5],
    "MGS": [1e-4, 2e-4, 5e-4, 2e-3],
}
TUNING_SEEDS = 3
POINTS = 30  # evaluations along training


def build(kind: str, shape: tuple[int, int, int], dropout: float) -> nn.Module:
    """A net by name."""
    return mlp(int(np.prod(shape)), 100, 3, dropout=dropout) if kind == "FCN" else lenet(shape, dropout=dropout)


def train(
    kind: str, method: str, strength: float, data: Data, y: Tensor, epochs: int, seed: int, probe: Tensor | None = None
) -> dict[str, list[float]]:
    """One run; evaluations evenly spaced: test accuracy and, with a probe, the MGS metrics on it."""
    torch.manual_seed(seed)
    model = build(kind, data.shape, strength if method == "dropout" else 0.0)
    decay = strength if method == "weight" else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 ** (1 / epochs))
    order, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    log: dict[str, list[float]] = {"epoch": [], "accuracy": [], "trace": [], "logdet": [], "rank": []}
    every = max(1, epochs // POINTS)
    for epoch in range(epochs + 1):
        if epoch % every == 0:
            log["epoch"].append(epoch)
            log["accuracy"].append(accuracy(model, data.x_test, data.y_test))
            if probe is not None:
                m = mgs.metrics(model.eval(), [probe])
                for name, value in (("trace", m.mean_trace), ("logdet", m.mean_log), ("rank", m.effective_rank)):
                    log[name].append(float(value[0]))
        model.train()
        for bx, by in batches(data.x, y, 32, order) if epoch < epochs else ():
            optimizer.zero_grad()
            step_loss(model, bx, by, method, strength, signs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        schedule.step()
    return log


def step_loss(model: nn.Module, x: Tensor, y: Tensor, method: str, strength: float, signs: torch.Generator) -> Tensor:
    """Cross-entropy and the method's penalty; the MGS trace is divided by the batch size."""
    if method == "MGS":
        penalty, outputs = mgs.trace_penalty(model, x, "rademacher", "mean", generator=signs, return_outputs=True)
        return F.cross_entropy(outputs, y) + strength * penalty
    loss = F.cross_entropy(model(x), y)
    if method != "loss-gradient":
        return loss
    return loss + strength * mgs.loss_gradient_penalty(model, x, y)


def tune(kind: str, data: Data, epochs: int, seeds: int) -> dict[str, float]:
    """The strength of each method with the best final accuracy on a validation split, at 50 % noise, mean over seeds
    99, 98, ...
    """
    cut = len(data.x) * 3 // 4
    split = Data(data.x[:cut], data.y[:cut], data.x[cut:], data.y[cut:])

    def final(method: str, strength: float, seed: int) -> float:
        noisy = corrupt(split.y, 0.5, torch.Generator().manual_seed(seed))
        return float(np.mean(train(kind, method, strength, split, noisy, epochs, seed)["accuracy"][-5:]))

    chosen = {}
    for method, grid in GRIDS.items():
        finals = [np.mean([final(method, s, 99 - k) for k in range(seeds)]) if len(grid) > 1 else 0.0 for s in grid]
        chosen[method] = grid[int(np.argmax(finals))]
        print(
            f"{kind:6s} {method:14s} grid {grid} -> {[round(float(f), 3) for f in finals]} -> {chosen[method]}",
            flush=True,
        )
    return chosen


def tables(args: Any, data: Data) -> None:
    """All runs of both nets, written as one table; and the figure of the fully connected net at 60 % noise."""
    shown: dict[str, Any] = {}
    rows = []
    for kind in args.nets.split(","):
        strengths = tune(kind, data, args.epochs, 1 if args.quick else TUNING_SEEDS)
        for noise in NOISES:
            for method, strength in strengths.items():
                runs = []
                for seed in range(args.seeds):
                    y = corrupt(data.y, noise, torch.Generator().manual_seed(seed))
                    probe = data.x[:32] if kind == "FCN" and noise == 0.6 else None
                    runs.append(train(kind, method, strength, data, y, args.epochs, seed, probe))
                if kind == "FCN" and noise == 0.6:
                    shown[method] = runs
                curves = np.array([r["accuracy"] for r in runs])
                finals = curves[:, -5:].mean(1)
                best = curves.mean(0).argmax()
                rows.append(
                    [
                        kind,
                        noise,
                        method,
                        strength,
                        finals.mean(),
                        finals.std(),
                        curves.mean(0)[best],
                        curves[:, best].std(),
                    ]
                )
                print(
                    f"{kind:6s} noise {noise:.1f} {method:14s} final {finals.mean():.3f} +- {finals.std():.3f}  "
                    f"best {rows[-1][6]:.3f}",
                    flush=True,
                )
                write(
                    args.out / "mgs_digits.csv",
                    ["net", "noise", "method", "strength", "final", "final_std", "best", "best_std"],
                    rows,
                )
        if kind == "FCN":
            draw_training(shown, args.out / "mgs_digits.png")


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """A CSV file."""
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def draw_training(shown: dict[str, Any], path: Path) -> None:
    """Accuracy, trace and log-determinant along training."""
    fig, axes = figure(1, 4, 12, 3)
    titles = {
        "accuracy": "test accuracy",
        "trace": "mean eigenvalue, tr K / N",
        "logdet": "mean log eigenvalue",
        "rank": "effective rank of K",
    }
    for ax, (key, title) in zip(axes[0], titles.items()):
        for colour, (method, runs) in zip(COLOURS, shown.items()):
            band(ax, runs[0]["epoch"], [r[key] for r in runs], method, colour)
        ax.set(title=title, xlabel="epoch", yscale="log" if key == "trace" else "linear")
    axes[0, 0].legend(fontsize=7.5)
    save(fig, path)


def attacks(args: Any, clean: Data) -> None:
    """AUROC of both scores between clean test images and attacked or merely noisy ones."""
    cases: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
        "FGSM 0.1": lambda m, x, y: mgs.fgsm(m, x, y, 0.1),
        "FGSM 0.2": lambda m, x, y: mgs.fgsm(m, x, y, 0.2),
        "PGD 0.2, 20 steps": lambda m, x, y: mgs.pgd(m, x, y, 0.2, 20),
        "PGD 0.4, 40 steps": lambda m, x, y: mgs.pgd(m, x, y, 0.4, 40),
        "sign noise 0.2": lambda m, x, y: (
            x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
        ),
    }
    scores = np.zeros((args.seeds, len(cases), 2))
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model, order = build("FCN", clean.shape, 0.0), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(60):
            for bx, by in batches(clean.x, clean.y, 32, order):
                optimizer.zero_grad()
                F.cross_entropy(model(bx), by).backward()
                optimizer.step()
        model.eval()
        for j, attack in enumerate(cases.values()):
            moved = attack(model, clean.x_test, clean.y_test)
            for k, score in enumerate((mgs.sample_trace, mgs.sample_fisher_trace)):
                scores[seed, j, k] = mgs.auroc(score(model, clean.x_test), score(model, moved))
    rows = [[name, *scores[:, j].mean(0).round(3), *scores[:, j].std(0).round(3)] for j, name in enumerate(cases)]
    write(args.out / "mgs_attacks.csv", ["input", "trace", "fisher", "trace_std", "fisher_std"], rows)
    for row in rows:
        print(f"{row[0]:20s} AUROC trace {row[1]:.2f}  Fisher {row[2]:.2f}", flush=True)


def main() -> None:
    """Everything."""
    args = arguments(__doc__, seeds=5, epochs=60, nets="FCN,LeNet")
    torch.set_num_threads(1)
    if args.quick:
        args.epochs = max(5, args.epochs // 5)
    clean = load(args.data, 600, 500)
    data = Data(motion_blur(clean.x), clean.y, clean.x_test, clean.y_test)
    attacks(args, clean)
    tables(args, data)


if __name__ == "__main__":
    main()
