"""Axis 1: how an operation uses its parameters, one file an operation family."""

from nngeom.layers import conv, conv_transpose, elementwise, embedding, linear, norm
