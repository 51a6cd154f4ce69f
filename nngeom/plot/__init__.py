"""Figures of matrices, kernels and influence with matplotlib: every function returns axes to go on with."""

from nngeom.plot.bars import influence, layers
from nngeom.plot.eigenvalues import spectrum
from nngeom.plot.heatmap import matrix

__all__ = ["influence", "layers", "matrix", "spectrum"]
