"""Triton's kernels by family, and the arithmetic and the tiles that they share."""
