"""The maps between parameter space and function space: Jacobians and their transposes."""

from nngeom.maps import expression, product  # register what + and J^T @ J' are
