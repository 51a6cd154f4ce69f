"""Tables and figure of ``lazy_digits.py``: groups of examples at equal progress, in three regimes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lazy_common import COLOURS, figure, save
from lazy_minibatches import ALPHAS, at
from optimizer_tables import table
from papers_common import mean, seeds_of, spread

SLOW = {"noise at 0.01": 0.01, "noise at 0.003": 0.003}  # controls at alpha = 1: is it the size of the steps?
PROGRESS = {"noise": "clean", "scores": "loss", "spurious": "loss"}
LEVELS = {"noise": (0.7, 0.4, 0.2, 0.1), "scores": (1.0, 0.5, 0.2, 0.1), "spurious": (0.4, 0.3, 0.2, 0.1)}


def resampled(cells: dict[str, Any], name: str, alpha: float, levels: Any) -> dict[str, np.ndarray]:
    """``{curve: (seeds, levels)}`` at equal progress."""
    found = [at(run, PROGRESS[name.split()[0]], levels) for run in seeds_of(cells, f"{name}/{alpha:g}")]
    return {curve: torch.stack([x[curve] for x in found]).numpy() for curve in found[0]}


def shown(values: np.ndarray, digits: str = ".3g") -> str:
    """Mean and deviation, where all seeds got there."""
    return spread(values.tolist(), digits) if np.isfinite(values).all() else "-"


def difference(values: np.ndarray) -> str:
    """The mean over seeds and its standard error."""
    if not np.isfinite(values).all():
        return "-"
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():+.3f}{error}"


def difficulty(cells: dict[str, Any]) -> str:
    """Loss of the hardest over loss of the easiest decile: geometric mean, and the range over seeds."""
    ratios = {}
    for alpha in ALPHAS:
        found = resampled(cells, "scores", alpha, LEVELS["scores"])
        ratios[alpha] = found["q10"] / found["q1"]
    rows = []
    for k, level in enumerate(LEVELS["scores"]):
        columns = [ratios[alpha][:, k] for alpha in ALPHAS]
        middle = [math.exp(np.log(v).mean()) if np.isfinite(v).all() else math.nan for v in columns]
        around = [f" ({v.min():.3g} to {v.max():.3g})" if len(v) > 1 else "" for v in columns]
        rows.append([f"{level:g}", *(f"{m:.3g}{r}" if m == m else "-" for m, r in zip(middle, around))])
    return table(["training loss", *(f"alpha {alpha:g}" for alpha in ALPHAS)], rows)


def wrong_labels(cells: dict[str, Any]) -> str:
    """At equal loss of the clean examples: a run a row, for the wrong labels and for the test."""
    rows, runs = [], [("noise", alpha) for alpha in ALPHAS] + [(name, 1.0) for name in SLOW]
    for curve, title in {"noisy": "wrong labels", "test": "test"}.items():
        for name, alpha in runs:
            found = resampled(cells, name, alpha, LEVELS["noise"])[curve]
            rows.append([title, label(name, alpha), *(shown(v) for v in found.T)])
    return table(["loss of", "run", *(f"clean {level:g}" for level in LEVELS["noise"])], rows)


def label(name: str, alpha: float) -> str:
    """A run with wrong labels."""
    return f"alpha {alpha:g}" + (f", rate {SLOW[name]:g}" if name in SLOW else "")


def ends(cells: dict[str, Any]) -> str:
    """What the runs with wrong labels come to."""
    rows = []
    for name, alpha in [("noise", alpha) for alpha in ALPHAS] + [(name, 1.0) for name in SLOW]:
        runs = seeds_of(cells, f"{name}/{alpha:g}")
        row = [label(name, alpha), f"{mean([r['step'][-1] for r in runs]):.0f}", spread([r["loss"][-1] for r in runs])]
        row += [spread([min(r["test"]) for r in runs]), spread([max(r["test_right"]) for r in runs])]
        rows.append([*row, *(spread([r[key][-1] for r in runs]) for key in ("kernel", "signs"))])
    head = ["run", "steps", "training loss", "lowest test loss", "highest test accuracy", "kernel alignment"]
    return table([*head, "signs kept"], rows)


def spurious(cells: dict[str, Any]) -> str:
    """Accuracies at equal training loss, and by how much the linear regime is ahead, paired by seed."""
    keys, rows = ("with", "without", "test_with", "test_without"), []
    found = {alpha: resampled(cells, "spurious", alpha, LEVELS["spurious"]) for alpha in ALPHAS}
    for k, level in enumerate(LEVELS["spurious"]):
        for alpha in ALPHAS:
            rows.append([f"{level:g}", f"alpha {alpha:g}", *(shown(found[alpha][key][:, k]) for key in keys)])
        ahead = [difference(found[100.0][key][:, k] - found[1.0][key][:, k]) for key in keys]
        rows.append([f"{level:g}", "100 less 1", *ahead])
    groups = [f"{part}, {name} the feature" for part in ("training", "test") for name in ("with", "without")]
    return table(["training loss", "run", *groups], rows)


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """One of difficulty, two of wrong labels, one of the spurious feature."""
    return {
        "lazy_digits_difficulty": difficulty(cells),
        "lazy_digits": wrong_labels(cells),
        "lazy_digits_ends": ends(cells),
        "lazy_digits_spurious": spurious(cells),
    }


def draw(cells: dict[str, Any], path: Path) -> None:
    """Noise and the spurious feature above, deciles and linearity below."""
    fig, axes = figure(4, 2, 8.5, 11)
    (noise, test, train, balanced), (hasty, lazy, ratio, likeness) = axes.reshape(2, 4)
    levels = {
        "noise": np.geomspace(2.2, 0.03, 60),
        "scores": np.geomspace(2.2, 0.045, 60),
        "spurious": np.geomspace(0.55, 0.04, 12),
    }
    for alpha, colour in COLOURS.items():
        regime = f"alpha = {alpha:g}"
        found = resampled(cells, "noise", alpha, levels["noise"])
        _curve(noise, levels["noise"], found["noisy"], colour, label=regime)
        _curve(test, levels["noise"], found["test"], colour, label=regime)
        for kind, style in (("kernel", "-"), ("signs", "--"), ("representation", ":")):
            _curve(
                likeness, levels["noise"], found[kind], colour, style, band=False, label=kind if alpha == 0.5 else None
            )
        found = resampled(cells, "spurious", alpha, levels["spurious"])
        for ax, prefix in ((train, ""), (balanced, "test_")):
            gap = found[f"{prefix}with"] - found[f"{prefix}without"]
            _curve(ax, levels["spurious"], gap, colour, label=regime, marker="o", markersize=3)
        found = resampled(cells, "scores", alpha, levels["scores"])
        _curve(ratio, levels["scores"], np.log10(found["q10"] / found["q1"]), colour, label=regime)
    for (name, rate), style in zip(SLOW.items(), ("--", ":")):
        found = resampled(cells, name, 1.0, levels["noise"])
        _curve(
            noise, levels["noise"], found["noisy"], COLOURS[1.0], style, band=False, label=f"alpha = 1, rate {rate:g}"
        )
    for ax, alpha in ((hasty, 1.0), (lazy, 100.0)):
        found = resampled(cells, "scores", alpha, levels["scores"])
        _deciles(ax, levels["scores"], found)
    noise.set(title="(a) loss of wrong labels", xlabel="loss of the clean examples")
    test.set(title="(b) test loss, 15 % wrong labels", xlabel="loss of the clean examples", ylim=(0.3, 1.5))
    train.set(title="(c) spurious: accuracy with - without", xlabel="training loss")
    balanced.set(title="(d) the same on a balanced test set", xlabel="training loss")
    for ax in (train, balanced):
        ax.axhline(0, color="#888888", linewidth=0.8)
    hasty.set(title="(e) difficulty deciles, alpha = 1", xlabel="training loss", ylabel="loss of the decile")
    lazy.set(title="(f) difficulty deciles, alpha = 100", xlabel="training loss")
    ratio.set(title="(g) hardest over easiest decile", xlabel="training loss", ylabel="power of ten")
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
    """The mean over seeds and one deviation, where most seeds have a value."""
    known = np.isfinite(values).mean(0) > 0.5
    x, values = x[known], values[:, known]
    middle = np.nanmean(values, 0)
    ax.plot(x, middle, style, color=colour, **options)
    if band and len(values) > 1:
        around = np.nanstd(values, 0)
        ax.fill_between(x, middle - around, middle + around, color=colour, alpha=0.2, linewidth=0)


def _deciles(ax: Any, x: np.ndarray, found: dict[str, np.ndarray]) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 10))
    for i in range(10):
        name = {0: "easiest decile", 9: "hardest decile"}.get(i)
        _curve(ax, x, found[f"q{i + 1}"], shades[i], band=False, label=name)
    ax.plot(x, x, color="#000000", linewidth=0.7, linestyle=":")
    ax.set(yscale="log", ylim=(1e-3, 6))
