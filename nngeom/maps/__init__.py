"""The maps between parameter space and function space: Jacobians and their transposes."""

from nngeom.maps import product  # registers what J^T @ J' is
