"""int8 matrix products in Triton: the problem, the configurations, the kernels, what runs them."""
