"""Function-space matrices: kernels over outputs and examples."""
