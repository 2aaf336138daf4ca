"""int8 matrix products in Triton: problem, configurations, kernels, and how they run."""
