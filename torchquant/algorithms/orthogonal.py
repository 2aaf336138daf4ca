"""Orthogonal matrices that spread a value over all channels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hadamard", "rotation_matrix"]


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, divided by the square root of its size.

    Args:
        size: a power of two.

    Returns:
        float64 ``[size, size]``, symmetric and orthogonal; all magnitudes are equal.

    Raises:
        ValueError: size is not a power of two.

    Example:
        >>> hadamard(4) * 2
        tensor([[ 1.,  1.,  1.,  1.],
                [ 1., -1.,  1., -1.],
                [ 1.,  1., -1., -1.],
                [ 1., -1., -1.,  1.]], dtype=torch.float64)
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard: size must be a power of two, got {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    scaled: Tensor = matrix / size**0.5
    return scaled


def rotation_matrix(
    size: int, kind: str = "hadamard", seed: int = 0, *, keeps_ones: bool = False
) -> Tensor:
    """A random orthogonal matrix.

    "hadamard" with a size of ``2^k * m`` is the Kronecker product of a Hadamard matrix of size
    ``2^k`` and a random orthogonal matrix of size ``m``, with random signs. Each channel is then
    spread more evenly than by "random", which is uniformly distributed.

    Args:
        size: the number of channels.
        kind: "hadamard" or "random".
        seed: the matrix follows from it.
        keeps_ones: if True, the matrix maps the vector of ones to itself, so that it commutes with
            the subtraction of the mean.

    Returns:
        float64 ``[size, size]``.

    Raises:
        ValueError: size is not positive, or kind is unknown.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).

    Example:
        >>> q = rotation_matrix(12)
        >>> torch.allclose(q @ q.T, torch.eye(12, dtype=torch.float64))
        True
        >>> rotation_matrix(12, keeps_ones=True).sum(1).round(decimals=6).unique().tolist()
        [1.0]
    """
    if kind not in ("hadamard", "random"):
        raise ValueError(f'rotation_matrix: kind must be "hadamard" or "random", got {kind!r}')
    if size < 1:
        raise ValueError(f"rotation_matrix: size must be positive, got {size}")
    generator = torch.Generator().manual_seed(seed)
    power = size & -size if kind == "hadamard" else 1
    odd = _orthogonal(size // power, generator, keeps_ones)
    matrix, signs = hadamard(power), _signs(power if keeps_ones else size, generator)
    if not keeps_ones:
        return torch.kron(matrix, odd.contiguous()) * signs[:, None]
    signs[0] = 1.0  # the first column of the Hadamard matrix is the vector of ones
    return torch.kron((matrix * signs) @ matrix, odd.contiguous())


def _orthogonal(size: int, generator: torch.Generator, keeps_ones: bool) -> Tensor:
    """A uniformly distributed orthogonal matrix, perhaps of those that keep the vector of ones."""
    if keeps_ones:
        if size == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        ones = torch.ones(size, 1, dtype=torch.float64)
        start = torch.cat([ones, torch.eye(size, dtype=torch.float64)[:, 1:]], 1)
        basis = torch.linalg.qr(start)[0]  # the first column is along the ones
        inner = torch.block_diag(
            torch.ones(1, 1, dtype=torch.float64), _orthogonal(size - 1, generator, False)
        )
        kept: Tensor = basis @ inner @ basis.T
        return kept
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix, triangle = torch.linalg.qr(normal)
    uniform: Tensor = matrix * triangle.diagonal().sign()  # QR alone prefers some
    return uniform


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
