"""Batched linear algebra on Kronecker factors: tensors are (..., n, n) in float32 or float64.

Everything here runs in the dtype that it is given; :mod:`hf_soap.precision` keeps TF32 away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor


def symmetrize(matrix: Tensor) -> Tensor:
    """Returns (A + Aᵀ)/2 of ``matrix`` (..., n, n), which removes the asymmetry that rounding leaves."""
    return (matrix + matrix.mT).mul_(0.5)


def eye_like(matrix: Tensor) -> Tensor:
    """Returns the identity (n, n) in dtype and on the device of ``matrix`` (..., n, n)."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def pack(matrix: Tensor) -> Tensor:
    """Folds symmetric matrices (..., n, n) to (..., n // 2 + 1, n), which holds one triangle.

    The lower right corner is laid under the diagonal of the upper left one.
    """
    n = matrix.shape[-1]
    rows = n // 2 + 1
    folded = matrix[..., :rows, :].clone()
    corner = matrix[..., rows:, rows:].tril()
    under = folded[..., 1 : n - rows + 1, : n - rows]
    under.copy_(corner + under.triu(1))
    return folded


def unpack(folded: Tensor) -> Tensor:
    """Unfolds what :func:`pack` made of symmetric matrices."""
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
    """Lays out mode ``mode`` of a batch of blocks as the rows of a batch of matrices.

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
        matrix: (blocks, d_mode, r), typically an orthonormal basis; pass ``basis.mT`` for the way back.
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


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition with the largest eigenvalue first.

    LAPACK gives up on a few float32 matrices that it solves in float64, so a failed one is retried there.

    Args:
        matrix: (..., n, n), symmetric, float32 or float64.

    Returns:
        Eigenvalues (..., n), descending, and the basis (..., n, n) with one eigenvector a column. NaN for a matrix
        on which float64 does not converge either (one that is not finite, for example).
    """
    try:
        values, basis = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, basis = one_by_one(_eigh, matrix, (1, 2))
    return values.flip(-1), basis.flip(-1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, basis = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, basis = (x.to(matrix.dtype) for x in torch.linalg.eigh(matrix.double()))
    return values, basis


def one_by_one(
    solve: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor, dims: Sequence[int]
) -> tuple[Tensor, ...]:
    """Solves each matrix of a batch by itself, so that one on which a solver gives up does not stop the others.

    Args:
        solve: Works on (n, n), or raises.
        matrix: (..., n, n).
        dims: 1 or 2 for each result of a matrix that is (n,) or (n, n).

    Returns:
        The results (..., n) or (..., n, n); NaN for a matrix on which the solver raises.
    """
    *batch, n, _ = matrix.shape
    flat = matrix.reshape(-1, n, n)
    results = [matrix.new_full((len(flat), *[n] * dim), torch.nan) for dim in dims]
    # LAPACK's layout: products of another one round in other ways, and the other matrices shall not notice.
    results = [result.mT if result.dim() == 3 else result for result in results]
    for place, one in enumerate(flat):
        with suppress(torch.linalg.LinAlgError):
            for result, own in zip(results, solve(one), strict=True):
                result[place] = own
    return tuple(result.unflatten(0, batch) if batch else result[0] for result in results)
