"""Axis 1: how an operation uses its parameters, one file an operation family."""

from nngeom.layers import bilinear, conv, conv_transpose, einsum, elementwise, embedding, linear, norm
