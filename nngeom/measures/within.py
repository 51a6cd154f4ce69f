"""The metric that a measure is given: for the parameters of its run, in the dtype of its rows."""

from __future__ import annotations

import torch

from nngeom.core.linalg import accumulation_dtype
from nngeom.pmat.metric import Metric, require_matrix
from nngeom.pmat.operator import ParameterOperator
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run


def collection_of(matrix: ParameterOperator | None, given: LayerCollection | None) -> LayerCollection | None:
    """The parameters to measure: those ``given``, else those of a ``matrix``; raises for what is none."""
    if matrix is None:
        return given
    require_matrix(matrix, "metric")
    return matrix.layer_collection if given is None else given


def in_metric(run: Run, matrix: ParameterOperator | None, *, wide: bool = False) -> Metric | None:
    """A ``matrix`` as the metric of a run; ``wide``: for rows in float64. ``None`` where there is none."""
    if matrix is None:
        return None
    network = run.network
    dtype = torch.float64 if wide else accumulation_dtype(network.dtype)
    return Metric(matrix, network.collection, dtype, network.device)
