"""Metrics of a tracker that measure a matrix over the parameters, or ask an optimizer for its own numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nngeom.core.errors import ArgumentError
from nngeom.measures.second_moments import FIM
from nngeom.pmat.kfac import PMatKFAC

Numbers = dict[str, float]
NUMBERS = ("trace", "eigenvalues", "logdet", "layers")


def matrix_metric(
    measure: Callable[..., Any] = FIM,
    representation: Any = PMatKFAC,
    *,
    name: str = "fisher",
    numbers: Sequence[str] = NUMBERS,
    top: int = 3,
    damping: float = 1e-3,
    **options: Any,
) -> Callable[[nn.Module, Any], Numbers]:
    """A metric for ``Tracker(metrics=[...])``: some ``numbers`` of a matrix on the probe set, in columns whose names
    begin with ``name``. ``measure`` makes it (:func:`nngeom.FIM`, :func:`nngeom.GGN`, ...), in a ``representation``.

    ``"trace"``: ``fisher_trace``; ``"eigenvalues"``: the ``top`` largest, ``fisher_eigenvalue_1`` and on;
    ``"logdet"``: ``fisher_logdet``, of the matrix plus ``damping`` times the identity; ``"layers"``: the trace of the
    block of every layer, ``fisher_trace/layer``. ``options``: those of the measure, such as ``likelihood`` or ``loss``.
    Raises :class:`ArgumentError` for other numbers, and what the measure and the representation raise.
    """
    unknown = [x for x in numbers if x not in NUMBERS]
    if unknown or top < 1:
        raise ArgumentError(
            f"numbers={unknown or numbers}, top={top}; expected some of {NUMBERS}, and top of at least 1"
        )

    def metric(model: nn.Module, batches: Any) -> Numbers:
        matrix = measure(model, batches, representation, **options)
        row: Numbers = {}
        if "trace" in numbers:
            row[f"{name}_trace"] = float(matrix.trace())
        if "eigenvalues" in numbers:
            values = matrix.eigh()[0].flip(0)[:top]
            row |= {f"{name}_eigenvalue_{rank}": float(x) for rank, x in enumerate(values, 1)}
        if "logdet" in numbers:
            row[f"{name}_logdet"] = float(matrix.logdet(damping))
        if "layers" in numbers:
            row |= {f"{name}_trace/{layer}": float(block.trace()) for layer, block in matrix.by_layer().items()}
        return row

    metric.__name__ = name
    return metric


def optimizer_metric(optimizer: Any) -> Callable[[nn.Module, Any], Numbers]:
    """A metric for ``Tracker(metrics=[...])``: numbers of an ``optimizer``.

    ``lr`` of its first group; of :mod:`nngeom.optim` also ``damping``, where that is a number or holds one, and how
    many steps were ``skipped_steps``.
    """

    def metric(model: nn.Module, batches: Any) -> Numbers:
        clock = getattr(optimizer, "clock", None)
        lr = optimizer.param_groups[0]["lr"]
        row = {"lr": float(lr(clock.steps) if callable(lr) and clock is not None else lr)}
        if clock is not None:
            damping = getattr(clock.now().damping, "value", None)
            row |= {} if damping is None else {"damping": float(damping)}
            row["skipped_steps"] = float(optimizer.skipped)
        return row

    metric.__name__ = "optimizer"
    return metric
