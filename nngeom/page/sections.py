"""The sections of a report: what was measured, as tables and charts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.attribution.influence import Influence
from nngeom.core.errors import ArgumentTypeError
from nngeom.page.blocks import MOST_POINTS, MOST_ROWS, MOST_SERIES, Bars, Block, Group, Lines, Listing, Section, Series
from nngeom.plot.bars import extremes
from nngeom.plot.readings import Spectrum, layers_of, spectrum_of
from nngeom.track.history import History
from nngeom.views.approximation import approximation_report
from nngeom.views.diagnosis import diagnose
from nngeom.views.explanation import explain
from nngeom.views.shown import Frame

QUERIES, EXAMPLES = 50, 10
READINGS = {"trace": "trace", "top": "largest eigenvalue", "rank": "effective rank"}


def seen(model: nn.Module, batch: Any, function: Any) -> Section:
    """What the engine saw of the model on a batch, and what was proved of it."""
    explanation = explain(model, batch, function=function)
    diagnosis = diagnose(model, batch, function=function)
    (parameters,) = explanation.frames()
    findings, effects = diagnosis.frames()
    text = (
        "Every parameter: where it is used, the structure of its Jacobian rows and the numbers that each "
        f"representation holds for its block; how its rows are known to be right; on what the outputs depend. "
        f"{explanation.note()}"
    )
    tables = {"Parameters": parameters, "Proofs": findings, "What the outputs depend on": effects}
    return Section("What was seen", text, [Listing(caption, frame) for caption, frame in tables.items()])


def spectra(objects: Mapping[str, Any]) -> Section:
    """The eigenvalues of matrices and kernels."""
    read = {name: spectrum_of(x) for name, x in objects.items()}
    largest = {name: s.values for name, s in read.items()}
    signs = {
        "Positive eigenvalues": {name: v[v > 0] for name, v in largest.items()},
        "Negative eigenvalues, absolute": {name: -v.flip(0)[v.flip(0) < 0] for name, v in largest.items()},
    }
    charts: list[Block] = [_spectrum(caption, by) for caption, by in signs.items() if any(map(len, by.values()))]
    rows = [[name, str(s.size), str(len(s.values)), *_counts(s)] for name, s in read.items()]
    head = ["", "rows", "known", "negative", "at rounding", "largest", "smallest"]
    text = "Eigenvalues by rank; those at rounding level are counted, not drawn. Of matrices known by their products "
    text += "alone the largest are shown."
    return Section("Spectra", text, [*charts, Listing("Counts", Frame(head, rows, numbers=6))])


def _counts(read: Spectrum) -> list[str]:
    ends = (read.values[0], read.values[-1])
    return [str(int((read.values < 0).sum())), str(read.zeros), *(f"{float(x):.4g}" for x in ends)]


def _spectrum(caption: str, values: Mapping[str, Tensor]) -> Lines:
    series = []
    for name, v in values.items():
        if not len(v):
            continue
        ranks = torch.logspace(0, math.log10(len(v)), MOST_POINTS).round().long().unique() - 1
        keep = ranks if len(v) > MOST_POINTS else torch.arange(len(v))
        series.append(Series(name, (keep + 1).tolist(), v[keep].tolist()))
    return Lines(caption, "rank", "eigenvalue", series, log_x=True, log_y=True)


def layers(matrices: Mapping[str, Any]) -> Section:
    """Trace, largest eigenvalue and effective rank of every layer."""
    read = {name: layers_of(m) for name, m in matrices.items()}
    groups = [
        Group(f"{name}: {title}", list(by)[:MOST_ROWS], [getattr(r, field) for r in by.values()][:MOST_ROWS])
        for name, by in read.items()
        for field, title in READINGS.items()
    ]
    rows = [
        [name, layer, str(r.parameters), *(f"{x:.4g}" if x == x else "-" for x in (r.trace, r.top, r.rank))]
        for name, by in read.items()
        for layer, r in by.items()
    ]
    frame = Frame(["matrix", "layer", "parameters", *READINGS.values()], rows, numbers=4)
    text = "Of the diagonal block of every layer. The effective rank is exp of the entropy of the eigenvalues."
    return Section("Layers", text, [Bars("By layer", groups), Listing("All numbers", frame)])


def approximation(matrices: Mapping[str, Any]) -> Section:
    """The other matrices against the first."""
    reference, *others = matrices
    table = approximation_report({name: matrices[name] for name in others}, matrices[reference])
    text = (
        f"Against {reference}: relative errors of the trace, of quadratic forms and of products with random vectors; "
    )
    text += "cosines and residuals of products and of solves at several dampings, means over draws."
    (frame,) = table.frames()
    return Section("Approximation", text, [Listing("Accuracy", frame)])


def training(tracker: Any) -> Section:
    """The columns of a tracker, or of its history, those of one kind in one chart."""
    history = getattr(tracker, "history", tracker)
    if not isinstance(history, Mapping) or "step" not in history:
        raise ArgumentTypeError(
            f"tracker is {type(tracker).__name__}; expected a nng.track.Tracker, or its history, a dict with 'step'"
        )
    steps = [float(x) for x in history["step"]]
    charts: dict[str, list[Series]] = {}
    most = max(20, min(MOST_POINTS, 40_000 // max(len(history), 1)))
    for name, column in history.items():
        if name != "step":
            charts.setdefault(_kind(name), []).append(Series(name, steps, [float(x) for x in column]).thinned(most))
    text = f"{len(steps)} measurements, steps {steps[0]:g} to {steps[-1]:g}." if steps else "Nothing was measured yet."
    blocks: list[Block] = [_curves(kind, series) for kind, series in charts.items() if steps]
    frame = Frame(list(History(history)), [[f"{x:.5g}" for x in row] for row in zip(*history.values())], len(history))
    return Section("Training", text, [*blocks, Listing("All numbers", frame)])


def _curves(kind: str, series: list[Series]) -> Lines:
    numbers = [y for s in series for y in s.y if math.isfinite(y)]
    wide = bool(numbers) and min(numbers) > 0 and max(numbers) > 30 * min(numbers)
    dropped = len(series) - MOST_SERIES
    caption = kind.replace("_", " ") + (f" (without {dropped} more)" if dropped > 0 else "")
    return Lines(caption, "step", kind.replace("_", " "), series[:MOST_SERIES], log_y=wide)


def _kind(column: str) -> str:
    """What a column shares a chart with: its name before a slash and without a number, or the last word of it."""
    base = re.sub(r"_\d+$", "", column.partition("/")[0])
    for word in ("loss", "accuracy"):
        base = word if base.endswith(word) else base
    return base or column


def influences(scores: Influence | Tensor) -> Section:
    """The training examples with the largest and smallest scores of every query."""
    whole = next(
        (x for x in (getattr(scores, "scores", scores), getattr(scores, "values", None)) if x is not None), None
    )
    if not isinstance(whole, Tensor) or whole.ndim != 2:
        raise ArgumentTypeError(
            f"influence is {type(scores).__name__}; expected what nng.influence returned, or (q, n)"
        )
    groups, rows = [], []
    for query in range(min(len(whole), QUERIES)):
        values, examples = extremes(scores, query, EXAMPLES)
        groups.append(Group(f"query {query}", [f"train {i}" for i in examples], values))
        rows += [[str(query), str(i), f"{x:.5g}"] for x, i in zip(values, examples)]
    more = f" The first {QUERIES} of {len(whole)} queries." if len(whole) > QUERIES else ""
    text = "A positive score: more weight on the training example lowers the loss of the query." + more
    frame = Frame(["query", "training example", "score"], rows, numbers=3)
    return Section("Influence", text, [Bars("Largest and smallest scores", groups), Listing("All numbers", frame)])
