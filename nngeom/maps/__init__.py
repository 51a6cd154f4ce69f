"""The maps between parameter space and function space: Jacobians and their transposes."""

from nngeom.maps import expression, mapped, product  # register what +, K @ J and J^T @ J are
