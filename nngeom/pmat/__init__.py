"""Axis 3: matrices over the parameters, one file a representation; what a representation is written with."""

from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Inputs, Moment, Stacked
from nngeom.pmat.block import Block, BlockBasis, EyeBlock, Identity
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import reciprocal
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.quasi_diag import UnitBlock
from nngeom.pmat.recipe import Selection, join_rows
from nngeom.sweep.sweep import Chunk

__all__ = [
    "Block",
    "BlockBasis",
    "Chunk",
    "DenseBlock",
    "DiagBlock",
    "EigenBlock",
    "EyeBlock",
    "Identity",
    "Inputs",
    "KroneckerBlock",
    "LayerJacobian",
    "Layout",
    "Moment",
    "PMat",
    "Selection",
    "Stacked",
    "UnitBlock",
    "join_rows",
    "reciprocal",
]
