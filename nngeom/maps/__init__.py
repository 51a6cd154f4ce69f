"""The maps between parameter space and function space: Jacobians and their transposes."""
