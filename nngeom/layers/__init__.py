"""Axis 1: how an operation uses its parameters, one file an operation family; what an adapter is written with."""

from nngeom.core.layout import Arrangement
from nngeom.layers import bilinear, conv, conv_transpose, einsum, elementwise, embedding, grouped, linear, norm, stacked
from nngeom.layers.adapter import adapts
from nngeom.layers.call import Call, NotStructured
from nngeom.layers.use import Slot, Use

__all__ = ["Arrangement", "Call", "NotStructured", "Slot", "Use", "adapts"]
