"""The report: one interactive HTML file of what is known of a model, its matrices, its training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.attribution.influence import Influence
from nngeom.capture.network import Network
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.fmat.operator import FunctionOperator
from nngeom.page import sections
from nngeom.page.blocks import Section
from nngeom.page.document import document
from nngeom.pmat.operator import ParameterOperator
from nngeom.track.tracker import write_whole

Objects = Mapping[str, Any]


def report(
    path: str | os.PathLike[str],
    model: nn.Module,
    loader: Any,
    *,
    matrix: ParameterOperator | Objects | None = None,
    kernel: FunctionOperator | Objects | None = None,
    tracker: Any = None,
    influence: Influence | Tensor | None = None,
    function: Callable[..., Tensor] | None = None,
    title: str | None = None,
) -> None:
    """Write what is known of a model as one interactive HTML file, which needs no network and nothing beside it.

    Args:
        path: of the file, written whole or not at all.
        model: in evaluation mode, as for any measure.
        loader: as for any measure; the first batch is looked at (:func:`explain`, :func:`diagnose`).
        matrix: a matrix over parameters, or ``{name: matrix}``: spectra and layers are shown; of several, the first is
            what the others are compared with (:func:`approximation_report`; those known by their products are not).
        kernel: a kernel, or ``{name: kernel}``: spectra are shown.
        tracker: a :class:`~nngeom.track.Tracker`, or its history: training curves are shown.
        influence: what :func:`influence` returned, or scores ``(q, n)``: the largest and smallest are shown.
        function: from a batch to its outputs, as for any measure.
        title: above the page; the class of the model by default.

    Long tables and lines of very many points are cut, so that the file stays below 3 MB. Raises
    :class:`ArgumentTypeError` for what is none of these, :class:`FileError` where the file cannot be written, and what
    the readings raise.
    """
    matrices = _named(matrix, ParameterOperator, "matrix")
    kernels = _named(kernel, FunctionOperator, "kernel")
    network = Network.build(model, function, None)
    batch = next(iter(network.batches(loader)))
    parts: list[Section] = [sections.seen(model, batch, function)]
    if both := {**matrices, **kernels}:
        if len(both) < len(matrices) + len(kernels):
            raise ArgumentError(f"matrix and kernel share a name among {[*matrices, *kernels]}; rename one of them")
        parts.append(sections.spectra(both))
    if layered := {name: m for name, m in matrices.items() if hasattr(m, "by_layer")}:  # sums have none
        parts.append(sections.layers(layered))
    first = next(iter(matrices), "")
    compared = {name: m for name, m in matrices.items() if name == first or not m.held}  # solves by products are slow
    if len(compared) > 1:
        parts.append(sections.approximation(compared))
    if tracker is not None:
        parts.append(sections.training(tracker))
    if influence is not None:
        parts.append(sections.influences(influence))
    facts = {
        "model": type(network.model).__name__,
        "parameters": f"{network.collection.numel:,} in {len(network.collection)} tensors",
        "dtype": str(network.dtype).removeprefix("torch."),
        **{name: f"{type(x).__name__}, {x.shape[0]} x {x.shape[1]}" for name, x in both.items()},
    }
    page = document(title or type(network.model).__name__, facts, parts, f"nngeom, torch {torch.__version__}")
    write_whole(Path(path), page)


def _named(given: Any, kind: type, what: str) -> dict[str, Any]:
    """``{name: object}`` of one object, several, or none."""
    if given is None:
        return {}
    named = dict(given) if isinstance(given, Mapping) else {type(given).__name__: given}
    for name, x in named.items():
        if not isinstance(x, kind):
            raise ArgumentTypeError(
                f"{what} {name!r} is {type(x).__name__}; expected a {what}, or a dict of such by name"
            )
    return {str(name): x for name, x in named.items()}
