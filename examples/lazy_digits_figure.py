"""Table and figure of ``lazy_digits.py``: groups of examples at equal progress, in three regimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lazy_common import COLOURS, figure, save

from nngeom.linearized import equal_progress

Runs = dict[tuple[str, int, float], dict[str, np.ndarray]]
PROGRESS = {"noise": "clean", "scores": "loss", "spurious": "loss"}
LEVELS = {
    "noise": [1.0, 0.7, 0.4, 0.2, 0.1, 0.05],
    "scores": [1.0, 0.5, 0.2, 0.1, 0.05],
    "spurious": [0.4, 0.3, 0.2, 0.1, 0.05],
}
SLOW = {"noise at 0.01": "--", "noise at 0.003": ":"}
COLUMNS = {
    "noise": ["noisy", "noisy_right", "test", "test_right", "kernel", "signs"],
    "scores": ["q1", "q10", "kernel", "signs"],
    "spurious": ["with", "without", "test_with", "test_without", "kernel", "signs"],
}


def resampled(runs: Runs, name: str, alpha: float, levels: Any) -> dict[str, np.ndarray]:
    """``{curve: (seeds, levels)}`` at equal progress."""
    every = [run for (n, _, a), run in sorted(runs.items()) if n == name and a == alpha]
    at = [equal_progress(r, r, levels, progress=PROGRESS[name.split()[0]]).a for r in every]
    return {curve: torch.stack([x[curve] for x in at]).numpy() for curve in at[0]}


def report(runs: Runs) -> None:
    """Means over seeds, and of the ratio of the hardest to the easiest decile."""
    for name in dict.fromkeys(n for n, _, _ in runs):
        kind = name.split()[0]
        print(
            f"\n{name}: means of {seeds(runs, name)} at equal "
            f"{'loss of the clean examples' if kind == 'noise' else 'training loss'}"
        )
        print(
            "alpha  level   steps  "
            + "  ".join(f"{c:>12s}" for c in COLUMNS[kind])
            + ("  ratio q10/q1" if name == "scores" else "")
        )
        for alpha in dict.fromkeys(a for n, _, a in runs if n == name):
            at = resampled(runs, name, alpha, LEVELS[kind])
            for k, level in enumerate(LEVELS[kind]):
                numbers = "  ".join(f"{_mean(at[c][:, k]):12.3f}" for c in COLUMNS[kind])
                ratio = f"  {np.exp(_mean(np.log(at['q10'][:, k] / at['q1'][:, k]))):12.1f}" if name == "scores" else ""
                print(f"{alpha:5g} {level:6.2f} {_mean(at['step'][:, k]):7.0f}  {numbers}{ratio}")
        if name == "noise":
            for alpha in COLOURS:
                best = [
                    (run["test"].min(), run["test_right"].max())
                    for (n, _, a), run in runs.items()
                    if n == name and a == alpha
                ]
                print(
                    f"alpha {alpha:g}: best test loss {np.mean([b for b, _ in best]):.3f}, best test accuracy "
                    f"{np.mean([b for _, b in best]):.3f}"
                )


def seeds(runs: Runs, name: str) -> str:
    """How many, as text."""
    count = len({s for n, s, _ in runs if n == name})
    return f"{count} seed{'s' if count != 1 else ''}"


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) > len(values) / 2 else float("nan")


def draw(path: Path, runs: Runs) -> None:
    """Noise and the spurious feature above, deciles and linearity below."""
    fig, axes = figure(2, 4, 12.5, 6)
    (noise, test, train, balanced), (hasty, lazy, spread, likeness) = axes
    levels = {
        "noise": np.geomspace(2.2, 0.03, 60),
        "scores": np.geomspace(2.2, 0.045, 60),
        "spurious": np.geomspace(0.55, 0.04, 12),
    }
    for alpha, colour in COLOURS.items():
        label = f"alpha = {alpha:g}"
        at = resampled(runs, "noise", alpha, levels["noise"])
        _curve(noise, levels["noise"], at["noisy"], colour, label=label)
        _curve(test, levels["noise"], at["test"], colour, label=label)
        for kind, style in (("kernel", "-"), ("signs", "--"), ("representation", ":")):
            _curve(likeness, levels["noise"], at[kind], colour, style, band=False, label=kind if alpha == 0.5 else None)
        at = resampled(runs, "spurious", alpha, levels["spurious"])
        for ax, prefix in ((train, ""), (balanced, "test_")):
            _curve(
                ax,
                levels["spurious"],
                at[f"{prefix}with"] - at[f"{prefix}without"],
                colour,
                label=label,
                marker="o",
                markersize=3,
            )
        at = resampled(runs, "scores", alpha, levels["scores"])
        _curve(spread, levels["scores"], at["q10"] / at["q1"], colour, label=label)
    for name, style in SLOW.items():
        if any(n == name for n, _, _ in runs):
            at = resampled(runs, name, 1.0, levels["noise"])
            _curve(
                noise,
                levels["noise"],
                at["noisy"],
                COLOURS[1.0],
                style,
                band=False,
                label=f"alpha = 1, rate {name.split()[-1]}",
            )
    for ax, alpha in ((hasty, 1.0), (lazy, 100.0)):
        at = resampled(runs, "scores", alpha, levels["scores"])
        _deciles(ax, levels["scores"], at)
    noise.set(title=f"(a) loss of wrong labels, {seeds(runs, 'noise')}", xlabel="loss of the clean examples")
    test.set(title="(b) test loss, 15 % wrong labels", xlabel="loss of the clean examples", ylim=(0.3, 1.5))
    train.set(title=f"(c) spurious: accuracy with - without, {seeds(runs, 'spurious')}", xlabel="training loss")
    balanced.set(title="(d) the same on a balanced test set", xlabel="training loss")
    for ax in (train, balanced):
        ax.axhline(0, color="#888888", linewidth=0.8)
    hasty.set(
        title=f"(e) difficulty deciles, alpha = 1, {seeds(runs, 'scores')}",
        xlabel="training loss",
        ylabel="loss of the decile",
    )
    lazy.set(title="(f) difficulty deciles, alpha = 100", xlabel="training loss")
    spread.set(title="(g) hardest over easiest decile", xlabel="training loss", yscale="log")
    likeness.set(title="(h) likeness to the start, run of (a)", xlabel="loss of the clean examples", ylim=(0, 1.03))
    of = {noise: "noise", test: "noise", likeness: "noise", train: "spurious", balanced: "spurious"}
    for ax in axes.flat:
        ax.set(xscale="log", xlim=levels[of.get(ax, "scores")][[0, -1]])
        ticks = [t for t in (2, 1, 0.5, 0.2, 0.1, 0.05) if min(ax.get_xlim()) <= t <= max(ax.get_xlim())]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    noise.legend(fontsize=7)
    for line in likeness.legend(loc="lower left").get_lines():
        line.set_color("#555555")
    hasty.legend(loc="lower left", fontsize=7)
    save(fig, path)


def _curve(
    ax: Any, x: np.ndarray, values: np.ndarray, colour: str, style: str = "-", band: bool = True, **options: Any
) -> None:
    """The mean over seeds and one standard error, where most seeds have a value."""
    known = np.isfinite(values).mean(0) > 0.5
    x, values = x[known], values[:, known]
    middle = np.nanmean(values, 0)
    ax.plot(x, middle, style, color=colour, **options)
    if band and len(values) > 1:
        error = np.nanstd(values, 0, ddof=1) / np.sqrt(np.isfinite(values).sum(0))
        ax.fill_between(x, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def _deciles(ax: Any, x: np.ndarray, at: dict[str, np.ndarray]) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 10))
    for i in range(10):
        name = {0: "easiest decile", 9: "hardest decile"}.get(i)
        _curve(ax, x, at[f"q{i + 1}"], shades[i], band=False, label=name)
    ax.plot(x, x, color="#000000", linewidth=0.7, linestyle=":")
    ax.set(yscale="log", ylim=(1e-3, 6))
