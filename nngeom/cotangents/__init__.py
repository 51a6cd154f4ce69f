"""Axis 2: what is pulled back, one file a likelihood or loss; what a likelihood or loss is written with."""

from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.per_example import Loss
from nngeom.sweep.columns import Columns

__all__ = ["Columns", "Likelihood", "Loss"]
