"""Batched linear algebra on Kronecker factors: tensors are (..., n, n) in float32 or float64.

Everything here computes in the dtype of its input. :mod:`hf_soap.linalg.precision` prevents TF32.
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
    """Computes eigendecompositions with the largest eigenvalue first.

    LAPACK fails on many singular float32 matrices: it raises, or returns NaN without an error. One example is the
    factor of an embedding when most tokens do not occur in the batch. Such matrices are solved again one by one.

    Args:
        matrix: (..., n, n), symmetric, float32 or float64.

    Returns:
        Eigenvalues (..., n), descending, and the basis (..., n, n) with eigenvectors as columns. NaN for a matrix that
        is not finite.
    """
    try:
        values, basis = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, basis = one_by_one(_eigh, matrix, (1, 2))
    else:
        if not matrix.is_meta:  # a meta tensor has no values to check
            # On a GPU this makes the host wait, as eigh itself does.
            for place in map(tuple, (~_is_sound(values, basis)).nonzero().tolist()):
                values[place], basis[place] = _eigh_of_hard(matrix[place])
    return values.flip(-1), basis.flip(-1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    with suppress(torch.linalg.LinAlgError):
        values, basis = torch.linalg.eigh(matrix)
        if bool(_is_sound(values, basis)):
            return values, basis
    return _eigh_of_hard(matrix)


def _is_sound(values: Tensor, basis: Tensor) -> Tensor:
    """Returns for each decomposition whether its values are finite and its vectors have length 1, (...,), bool."""
    lengths = torch.linalg.vector_norm(basis, dim=-2)
    sound: Tensor = values.isfinite().all(-1) & ((lengths - 1).abs() < 1e-3).all(-1)  # false for NaN
    return sound


JITTERS = (0.0, 2.0**-48, 2.0**-40, 2.0**-32, 2.0**-24)
"""Sizes of the jitter on the diagonal, relative to the largest entry. They are tried in order until eigh succeeds."""


def _eigh_of_hard(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposes a matrix on which eigh failed, in float64 and without its zero rows and columns.

    eigh fails where many eigenvalues are equal. Zero rows cause most of these, and their eigenvectors are known. If
    eigh still fails, a jitter on the diagonal, different for each row, separates the others.

    Args:
        matrix: (n, n), symmetric.

    Returns:
        Eigenvalues (n,), ascending, and the basis (n, n), in the dtype of the matrix; NaN if no jitter helps.
    """
    failed = matrix.new_full(matrix.shape[-1:], torch.nan), torch.full_like(matrix, torch.nan)
    if not bool(matrix.isfinite().all()):
        return failed
    filled = matrix.any(-1) | matrix.any(-2)
    inner = matrix[filled][:, filled].double()
    order = torch.cat([filled.nonzero(), (~filled).nonzero()]).squeeze(-1)
    scale = inner.abs().amax() if len(inner) else inner.new_zeros(())
    spread = scale * torch.arange(1, len(inner) + 1, dtype=inner.dtype, device=inner.device).sin_()
    for jitter in JITTERS:
        try:
            values, basis = torch.linalg.eigh(inner + (jitter * spread).diag())
        except torch.linalg.LinAlgError:
            continue
        if not bool(_is_sound(values, basis)):
            continue
        if jitter:
            values = (basis * (inner @ basis)).sum(-2)
        # Float64 rounding errors are not eigenvalues, and an inverse root would amplify them.
        noise = len(inner) * torch.finfo(inner.dtype).eps * scale
        values = torch.where(values.abs() > noise, values, 0.0)
        values = torch.cat([values, values.new_zeros(len(matrix) - len(inner))])
        whole = torch.eye(len(matrix), dtype=inner.dtype, device=inner.device)
        whole[: len(inner), : len(inner)] = basis
        ascending = values.argsort(stable=True)
        whole = torch.empty_like(whole).index_copy_(0, order, whole[:, ascending])
        return values[ascending].to(matrix.dtype), whole.to(matrix.dtype)
    return failed


def one_by_one(
    solve: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor, dims: Sequence[int]
) -> tuple[Tensor, ...]:
    """Solves each matrix of a batch by itself, so that a failure on one does not stop the others.

    Args:
        solve: Solves one matrix (n, n), or raises.
        matrix: (..., n, n).
        dims: For each result of ``solve``, 1 if it is (n,) and 2 if it is (n, n).

    Returns:
        The results (..., n) or (..., n, n); NaN for a matrix on which the solver raises.
    """
    *batch, n, _ = matrix.shape
    flat = matrix.reshape(-1, n, n)
    results = [matrix.new_full((len(flat), *[n] * dim), torch.nan) for dim in dims]
    # LAPACK's memory layout: with another one, products of the other matrices would round differently.
    results = [result.mT if result.dim() == 3 else result for result in results]
    for place, one in enumerate(flat):
        with suppress(torch.linalg.LinAlgError):
            for result, own in zip(results, solve(one), strict=True):
                result[place] = own
    return tuple(result.unflatten(0, batch) if batch else result[0] for result in results)
