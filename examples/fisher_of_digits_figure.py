"""The figure of ``fisher_of_digits.py``: what every representation loses, through training and against damping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Okabe & Ito's colours, distinguishable with any colour vision; one marker a family, dashes for the "reduce" variants.
COLOURS = {
    "BlockDiag": "#000000",
    "Mixed": "#CC79A7",
    "EKFAC": "#0072B2",
    "KFAC": "#56B4E9",
    "QuasiDiag": "#009E73",
    "Diag": "#E69F00",
    "Eye": "#999999",
}
MARKERS = {"BlockDiag": "s", "Mixed": "P", "EKFAC": "o", "KFAC": "^", "QuasiDiag": "v", "Diag": "D", "Eye": "X"}
BANDS = ("BlockDiag", "EKFAC", "Diag")  # three bands can be told apart; every spread is in the CSV file


def draw(
    path: Path, run: dict[str, dict[str, Any]], memory: dict[str, str], names: list[str], dampings: list[float]
) -> None:
    """``path.png`` and ``path.pdf``; ``run`` is ``{checkpoint: {representation: Accuracy}}``, ``memory`` a text a
    representation.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9.5,
            "legend.frameon": False,
        }
    )
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 7.0), constrained_layout=True)
    fig.get_layout_engine().set(hspace=0.06)
    top = axes[0]
    _through_training(top[0], run, names, lambda a: (a.frobenius, 0.0), r"(a) Frobenius error $\|M - F\| \,/\, \|F\|$")
    _through_training(
        top[1], run, names, lambda a: (fmean(a.forward), stdev(a.forward)), r"(b) products: $\cos(Fv,\, Mv)$"
    )
    _through_training(
        top[2],
        run,
        names,
        lambda a: (a.trace, 0.0),
        r"(c) trace error $|\mathrm{tr}\,M - \mathrm{tr}\,F| \,/\, \mathrm{tr}\,F$",
    )
    top[0].set_yticklabels([f"{name}  ({memory[name]})" for name in names])
    top[2].legend(loc="upper right", title="checkpoint", handletextpad=0.3)
    for j, (checkpoint, accuracy) in enumerate(run.items()):
        _against_damping(axes[1, j], accuracy, names, dampings)
        axes[1, j].set_title(f"({'def'[j]}) damped natural gradients, {checkpoint}")
    axes[1, 0].set_ylabel("cosine with the exact one")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        handlelength=2.2,
        columnspacing=1.2,
        handletextpad=0.4,
    )
    for kind in ("png", "pdf"):
        fig.savefig(path.with_suffix(f".{kind}"), dpi=180)
    plt.close(fig)


def _through_training(
    ax: Any, run: dict[str, dict[str, Any]], names: list[str], value: Callable[[Any], tuple[float, float]], title: str
) -> None:
    """One row a representation, one shade a checkpoint; bars are one standard deviation over draws."""
    rows = [len(names) - j for j in range(len(names))]
    for checkpoint, shade, shift in zip(run, ("#b8b8b8", "#767676", "#000000"), (0.22, 0.0, -0.22)):
        points = [value(run[checkpoint][name]) for name in names]
        bars = [s for _, s in points] if any(s for _, s in points) else None
        ax.errorbar(
            [m for m, _ in points],
            [r + shift for r in rows],
            xerr=bars,
            fmt="o",
            color=shade,
            markersize=4.2,
            elinewidth=1.1,
            label=checkpoint,
        )
    ax.set(title=title, yticks=rows, yticklabels=[], ylim=(0.4, len(names) + 0.6))
    ax.set_xlim(left=min(-0.02 * ax.get_xlim()[1], 0))
    ax.tick_params(axis="y", length=0)
    for row in rows[1::2]:
        ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", zorder=0)


def _against_damping(ax: Any, accuracy: dict[str, Any], names: list[str], dampings: list[float]) -> None:
    """One line a representation, where it is positive definite; means over minibatches."""
    for name in names:
        x = [d for d in dampings if accuracy[name].natural.get(d)]
        middle = [fmean(accuracy[name].natural[d]) for d in x]
        around = [stdev(accuracy[name].natural[d]) for d in x]
        family, reduce = name.split()[0], name.endswith("reduce")
        colour = COLOURS[family]
        style = {
            "linestyle": "--" if reduce else "-",
            "markerfacecolor": "white" if reduce else colour,
            "marker": MARKERS[family],
        }
        ax.plot(x, middle, label=name, color=colour, linewidth=1.4, markersize=4, **style)
        if name in BANDS:
            ax.fill_between(
                x,
                [m - s for m, s in zip(middle, around)],
                [m + s for m, s in zip(middle, around)],
                color=colour,
                alpha=0.13,
                linewidth=0,
            )
    ax.set(xscale="log", ylim=(0, 1.02), xlabel=r"damping $\lambda$")
    ax.minorticks_off()
