"""Batched linear algebra on Kronecker factors: tensors are (..., n, n) in float32 or float64.

Everything here computes in the dtype of its input. :mod:`hf_soap.linalg.precision` prevents TF32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def symmetrize(matrix: Tensor) -> Tensor:
    """Returns (A + Aᵀ)/2 of ``matrix`` (..., n, n), which removes the asymmetry that rounding leaves."""
    return (matrix + matrix.mT).mul_(0.5)


def eye_like(matrix: Tensor) -> Tensor:
    """Returns the identity (n, n) with the dtype and device of ``matrix`` (..., n, n)."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def safe_scale(matrix: Tensor) -> Tensor:
    """Returns a divisor for each matrix (..., m, n) that keeps sums of squares of its entries in range.

    In float32, squares of entries below 1e-23 vanish, and squares of entries above 1e19 overflow. Entries of factors
    are squares already.

    Returns:
        (..., 1, 1): 1 where the largest entry is between 2⁻⁴⁰ and 2⁴⁰ or 0, so that most matrices stay as they are;
        else the power of two that brings the largest entry into [1, 2), so that the division is exact.
    """
    if not matrix.numel():
        return matrix.new_ones(*matrix.shape[:-2], 1, 1)
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=(-2, -1), keepdim=True)
    _, exponent = torch.frexp(largest)
    usual = ((largest >= 2.0**-40) & (largest <= 2.0**40)) | (largest == 0)
    one = torch.ones_like(largest)
    return torch.where(usual, one, torch.ldexp(one, exponent - 1))


def power(rows: Tensor, exponent: float) -> Tensor:
    """Returns ``rows`` (..., k) to the power of ``exponent``, each row computed by itself.

    CPUs process several numbers at once, but the last few one by one, which rounds them differently. If all rows were
    computed together, a row would depend on its place in the batch.
    """
    return torch.cat([row**exponent for row in rows.reshape(-1, rows.shape[-1]).split(1)]).view(rows.shape)


def pack(matrix: Tensor) -> Tensor:
    """Folds symmetric matrices (..., n, n) to (..., n // 2 + 1, n), which holds one triangle.

    The lower right corner is stored below the diagonal of the upper left one.
    """
    n = matrix.shape[-1]
    rows = n // 2 + 1
    folded = matrix[..., :rows, :].clone()
    corner = matrix[..., rows:, rows:].tril()
    under = folded[..., 1 : n - rows + 1, : n - rows]
    under.copy_(corner + under.triu(1))
    return folded


def unpack(folded: Tensor) -> Tensor:
    """Restores the symmetric matrices that :func:`pack` folded."""
    rows, n = folded.shape[-2:]
    matrix = folded.new_empty(*folded.shape[:-2], n, n)
    left, right = folded[..., :rows], folded[..., rows:]
    under = folded[..., 1 : n - rows + 1, : n - rows]
    matrix[..., :rows, :rows] = left.triu() + left.triu(1).mT
    matrix[..., :rows, rows:] = right
    matrix[..., rows:, :rows] = right.mT
    matrix[..., rows:, rows:] = under.tril() + under.tril(-1).mT
    return matrix


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Unfolds mode ``mode`` of a batch of blocks into the rows of a batch of matrices.

    Args:
        tensor: (blocks, d_1, ..., d_k).
        mode: Which of the k modes, counted from 0.

    Returns:
        (blocks, d_mode, product of the others): a view where the layout allows one.
    """
    blocks, size = tensor.shape[0], tensor.shape[mode + 1]
    return tensor.movedim(mode + 1, 1).reshape(blocks, size, -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies mode ``mode`` of every block by the transpose of its matrix: G ×_mode Qᵀ.

    Args:
        tensor: (blocks, d_1, ..., d_k).
        matrix: (blocks, d_mode, r), typically an orthonormal basis; pass ``basis.mT`` to rotate back.
        mode: Which of the k modes, counted from 0.

    Returns:
        (blocks, d_1, ..., r, ..., d_k), contiguous.
    """
    shape = list(tensor.shape)
    shape[mode + 1] = matrix.shape[-1]
    blocks, size = tensor.shape[0], tensor.shape[mode + 1]
    before = tensor[0].shape[:mode].numel()
    if before == 1:
        return torch.bmm(matrix.mT, tensor.reshape(blocks, size, -1)).view(shape)
    if mode == tensor.dim() - 2:
        return torch.bmm(tensor.reshape(blocks, before, size), matrix).view(shape)
    stacked = tensor.reshape(blocks, before, size, -1)
    return torch.matmul(matrix.mT.unsqueeze(1), stacked).view(shape)


def permute(tensor: Tensor, order: Tensor, mode: int) -> Tensor:
    """Reorders the indices of mode ``mode`` of every block.

    Args:
        tensor: (blocks, d_1, ..., d_k).
        order: The old index at each new one, (blocks, d_mode), int64.
        mode: Which of the k modes, counted from 0.

    Returns:
        (blocks, d_1, ..., d_k), a new tensor.
    """
    if mode == tensor.dim() - 2:
        shape = [tensor.shape[0], *[1] * mode, tensor.shape[-1]]
        return tensor.gather(-1, order.view(shape).expand_as(tensor))
    # Copies of whole rows take a third of the time of a gather.
    before, size = math.prod(tensor.shape[1 : mode + 1]), tensor.shape[mode + 1]
    starts = torch.arange(0, tensor.shape[0] * before * size, size, device=tensor.device)
    rows = (starts.view(-1, before, 1) + order.unsqueeze(1)).flatten()
    return tensor.flatten(0, mode + 1).index_select(0, rows).view(tensor.shape)


def add_gram_(factor: Tensor, tensor: Tensor, mode: int, *, beta: float, alpha: float) -> Tensor:
    """Accumulates a Gram matrix in place: A ← β A + α X Xᵀ, where X is the unfolding of ``tensor``.

    Args:
        factor: (blocks, d_mode, d_mode), changed in place.
        tensor: (blocks, d_1, ..., d_k), same dtype.
        mode: Which mode X unfolds.
        beta: Weight of the old factor.
        alpha: Weight of the new Gram matrix.

    Returns:
        ``factor``.
    """
    if mode == tensor.dim() - 2:
        rows = tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
        return factor.baddbmm_(rows.mT, rows, beta=beta, alpha=alpha)
    columns = unfold(tensor, mode)
    return factor.baddbmm_(columns, columns.mT, beta=beta, alpha=alpha)
