"""The dashboard: six panels that tell how training went."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from nngeom.core.errors import FileError, MissingExtraError

# Okabe & Ito's colours, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}

History = dict[str, list[float]]


def dashboard(history: History, path: str | os.PathLike[str] | None = None, title: str = "") -> Any:
    """Loss and accuracy, spectrum, effective rank, alignment by layer, MGS and coherence of a tracker's ``history``.

    ``path``: the file it is written to, where given; ``title``: above the panels. A panel without data says which
    metric it needs. Raises :class:`MissingExtraError` without matplotlib, :class:`FileError` where ``path`` cannot be
    written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib is not installed; install it: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(12, 6.6), layout="constrained")
        axes = fig.subplots(2, 3)
        panels = (_progress, _spectrum, _effective_rank, _alignment, _mgs, _coherence)
        for ax, panel in zip(axes.flat, panels):
            panel(ax, history)
            _steps(ax, history["step"])
        if title:
            fig.suptitle(title, fontsize=12, x=0.01, ha="left")
        if path is not None:
            try:
                fig.savefig(path, dpi=120)
            except (OSError, ValueError) as error:
                raise FileError(f"{path} cannot be written: {error}") from error
    return fig


def _steps(ax: Any, steps: Sequence[float]) -> None:
    """A logarithmic axis for schedules that thin out, a plain one for even steps."""
    ax.set_xlabel("step")
    if len(steps) > 4 and steps[-1] > 0 and steps[-1] - steps[-2] > 3 * (steps[2] - steps[1]):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=0)


def _empty(ax: Any, title: str, metric: str) -> None:
    ax.set_title(title)
    ax.grid(visible=False)
    ax.set(xticks=[], yticks=[])
    ax.text(
        0.5,
        0.5,
        f'metrics=["{metric}"]',
        ha="center",
        va="center",
        color="#999999",
        transform=ax.transAxes,
        family="monospace",
    )


def _line(ax: Any, history: History, column: str, label: str, colour: str, **options: Any) -> None:
    ax.plot(history["step"], history[column], color=colour, label=label, **options)


def _progress(ax: Any, history: History) -> None:
    losses = [c for c in history if c.endswith("loss")]
    scores = [c for c in history if c.endswith(("accuracy", "acc"))]
    if not losses and not scores:
        return _empty(ax, "Loss and accuracy", "loss")
    ax.set_title("Loss and accuracy" if scores else "Loss")
    for style, column in zip(("-", "--", ":", "-."), losses):
        _line(ax, history, column, _readable(column), COLOURS[0], ls=style)
    if losses:
        ax.set_ylabel("loss", color=COLOURS[0])
        if min(x for c in losses for x in history[c] if x == x) > 0:
            ax.set_yscale("log")
    if scores:
        twin = ax.twinx()
        twin.spines["right"].set_visible(True)
        twin.grid(visible=False)
        for style, column in zip(("-", "--", ":", "-."), scores):
            _line(twin, history, column, _readable(column), COLOURS[1], ls=style)
        twin.set_ylim(0, 1.02)
        twin.set_ylabel("accuracy", color=COLOURS[1])
    handles = [h for a in ax.figure.axes if a.bbox.bounds == ax.bbox.bounds for h in a.get_lines()]
    if len(losses) + len(scores) > 2:
        ax.legend(handles=handles, loc="center left")
    return None


def _spectrum(ax: Any, history: History) -> None:
    columns = [c for c in history if c.startswith("eigenvalue_")]
    if not columns:
        return _empty(ax, "Spectrum of the centred kernel", "spectrum")
    import matplotlib

    ax.set_title("Spectrum of the centred kernel")
    shades = matplotlib.colormaps["viridis"]
    for j, column in enumerate(columns):
        values = [x if x > 0 else float("nan") for x in history[column]]
        ax.plot(
            history["step"],
            values,
            color=shades(0.9 * j / max(1, len(columns) - 1)),
            label=column.removeprefix("eigenvalue_"),
        )
    ax.set(yscale="log", ylabel="eigenvalue")
    ax.legend(title="index", ncols=2, title_fontsize=8)
    return None


def _effective_rank(ax: Any, history: History) -> None:
    if "effective_rank" not in history:
        return _empty(ax, "Effective rank", "effective_rank")
    ax.set_title("Effective rank")
    _line(ax, history, "effective_rank", "effective rank", COLOURS[2])
    ax.fill_between(history["step"], history["effective_rank"], color=COLOURS[2], alpha=0.1, lw=0)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("exp(entropy of the spectrum)")
    return None


def _alignment(ax: Any, history: History) -> None:
    layers = [c for c in history if c.startswith("alignment/")]
    if not layers and "alignment" not in history:
        return _empty(ax, "Alignment with the labels", "alignment")
    import matplotlib

    ax.set_title("Alignment with the labels (CKA)")
    shades = matplotlib.colormaps["plasma"]
    for j, column in enumerate(layers):
        ax.plot(
            history["step"],
            history[column],
            color=shades(0.85 * j / max(1, len(layers) - 1)),
            lw=1.2,
            label=column.removeprefix("alignment/") or "model",
        )
    if "alignment" in history:
        _line(ax, history, "alignment", "all layers", "#000000", lw=2.4)
    ax.set_ylim(bottom=0)
    if len(layers) <= 12:
        ax.legend(ncols=2 if len(layers) > 4 else 1, title="layer", title_fontsize=8)
    return None


def _mgs(ax: Any, history: History) -> None:
    if "mgs_trace" not in history:
        return _empty(ax, "Model Gradient Similarity", "mgs")
    ax.set_title("Model Gradient Similarity")
    _line(ax, history, "mgs_trace", "tr K / N", COLOURS[0])
    ax.set_yscale("log")
    ax.set_ylabel("mean eigenvalue, tr K / N", color=COLOURS[0])
    twin = ax.twinx()
    twin.spines["right"].set_visible(True)
    twin.grid(visible=False)
    _line(twin, history, "mgs_logdet", "log det / N", COLOURS[1])
    twin.set_ylabel("mean log eigenvalue, log det / N", color=COLOURS[1])
    return None


def _coherence(ax: Any, history: History) -> None:
    if "coherence_ratio" not in history:
        return _empty(ax, "Coherence of the gradients", "coherence")
    ax.set_title("Coherence of the gradients")
    _line(ax, history, "coherence_ratio", "m alpha", COLOURS[3])
    ax.axhline(1, color="#999999", lw=1, ls=":")
    ax.text(
        0.01, 1, "orthogonal", ha="left", va="bottom", color="#777777", fontsize=7.5, transform=ax.get_yaxis_transform()
    )
    ax.set_ylabel(r"$m\,\alpha$: examples that agree")
    ax.set_ylim(bottom=0)
    return None


def _readable(column: str) -> str:
    return column.replace("_", " ")
