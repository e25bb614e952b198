"""Eigendecompositions and QR that do not give up on singular matrices, batched: tensors are (..., n, n)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from hf_soap.linalg import processor

logger = logging.getLogger(__name__)


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


def cholesky_qr(factor: Tensor) -> Tensor:
    """Computes the orthogonal factor of a QR decomposition by products of float64 matrices.

    On GPUs, sequential work dominates a refresh: Householder reflections, or Cholesky decompositions and triangular
    solves of large matrices. Here the last two work on small diagonal blocks only; all the rest is products. Columns
    are scaled, the first Gram matrix is shifted, and a second pass removes the error that condition numbers of 1e8
    leave. Directions in which a factor is zero are kept apart by a shift of float32's spacing at the largest
    eigenvalue. The host does not wait.

    Args:
        factor: (blocks, n, n), float32, symmetric positive semi-definite up to rounding.

    Returns:
        Q, (blocks, n, n), with the signs of a positive diagonal of R; NaN for a matrix that is not finite.

    Source:
        Shifted CholeskyQR: Fukaya et al., arXiv:1809.11085.
    """
    n = factor.shape[-1]
    at_once = max(1, CHOLESKY_ENTRIES // max(1, n * n))
    return torch.cat([_cholesky_qr(part) for part in factor.split(at_once)]) if len(factor) else factor.clone()


CHOLESKY_ENTRIES = 2**26
"""Number of factor entries that :func:`cholesky_qr` works on at once. It takes about 32 bytes for each."""

LEAF = 128
"""Largest diagonal block that is left to cuSOLVER's Cholesky decomposition."""


def _cholesky_qr(factor: Tensor) -> Tensor:
    n, tiny = factor.shape[-1], torch.finfo(factor.dtype).tiny
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=tiny)
    basis = factor.double()
    basis.diagonal(dim1=-2, dim2=-1).add_((largest.double() * torch.finfo(factor.dtype).eps).unsqueeze(-1))
    for shift in (4096 * n * torch.finfo(torch.float64).eps, 0.0):
        basis = basis / basis.norm(dim=-2, keepdim=True)
        gram = _lower_gram(basis)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        basis = _times_upper(basis, _inverse_cholesky(gram).mT)
    # A matrix counts as orthonormal if QᵀQ maps a few vectors in general position to themselves.
    probes = torch.arange(8 * n, dtype=basis.dtype, device=basis.device).sin_().view(n, 8)
    off = (basis.mT @ (basis @ probes) - probes).norm(dim=-2).amax(-1) / probes.norm(dim=-2).amax()
    is_orthonormal = (off < 1e-6)[:, None, None]  # false for NaN
    return torch.where(is_orthonormal, basis, torch.nan).to(factor.dtype)


def _strips(n: int) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each quarter of the columns, or of all columns if the matrix is small."""
    width = -(-n // 4) if n >= 8 * LEAF else n
    for first in range(0, n, width):
        yield first, min(n, first + width)


def _lower_gram(basis: Tensor) -> Tensor:
    """Returns AᵀA (blocks, n, n) of ``basis``. Entries above the diagonal blocks may be zero instead."""
    gram = torch.zeros_like(basis)
    for first, end in _strips(basis.shape[-1]):
        gram[:, first:, first:end] = basis[:, :, first:].mT @ basis[:, :, first:end]
    return gram


def _times_upper(basis: Tensor, upper: Tensor) -> Tensor:
    """Returns ``basis @ upper`` (blocks, n, n), where ``upper`` is upper triangular."""
    product = torch.empty_like(basis)
    for first, end in _strips(basis.shape[-1]):
        product[:, :, first:end] = basis[:, :, :end] @ upper[:, :end, first:end]
    return product


def _inverse_cholesky(gram: Tensor) -> Tensor:
    """Returns the inverse of the lower Cholesky factor of ``gram`` (blocks, n, n). Only the lower triangle is read."""
    n = gram.shape[-1]
    if n <= LEAF:
        lower, _ = torch.linalg.cholesky_ex(gram)
        eye = torch.eye(n, dtype=gram.dtype, device=gram.device).expand_as(gram)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return inverse
    half = LEAF * -(-n // (2 * LEAF))
    inverse = torch.zeros_like(gram)
    first = _inverse_cholesky(gram[:, :half, :half])
    coupling = gram[:, half:, :half] @ first.mT
    second = _inverse_cholesky(torch.baddbmm(gram[:, half:, half:], coupling, coupling.mT, alpha=-1))
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, half:, :half] = (second @ coupling @ first).neg_()
    return inverse


def in_panels(matrix: Tensor) -> bool:
    """Whether matrices are processed in panels, which skips products with known zeros."""
    return _in_panels(matrix.shape[-1], matrix.device)


@cache
def _in_panels(n: int, device: torch.device) -> bool:
    panels = device.type == "cpu" and n >= 4 * PANEL
    kernel = "in panels" if panels else "by torch's default kernel"
    logger.debug("QR of (%d, %d) %s: %s", n, n, kernel, processor.instructions(device))
    return panels


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposes square matrices into an orthogonal and an upper triangular one.

    LAPACK forms the orthogonal factor at a third of the speed of a product. On a CPU, large matrices are processed in
    panels, so that nearly all work is products.

    Args:
        matrix: (blocks, n, n).

    Returns:
        Q and R, (blocks, n, n) each, with LAPACK's signs.

    Source:
        Compact WY representation: Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10 (1989); T from VᵀV: Puglisi,
        SIAM J. Sci. Stat. Comput. 13 (1992).
    """
    n = matrix.shape[-1]
    if not in_panels(matrix):
        basis, upper = torch.linalg.qr(matrix)
        return basis, upper
    upper, reflectors = matrix.clone(), []
    for first in range(0, n, PANEL):
        rest = upper[:, first:, first:]
        packed, tau = torch.geqrf(rest[:, :, :PANEL])
        width = tau.shape[-1]
        rest[:, :, :PANEL] = packed.triu()
        v = packed.tril_(-1)
        v.diagonal(dim1=-2, dim2=-1).fill_(1)
        # I - V T Vᵀ is the product of the panel's reflections; a reflection that does nothing has τ = 0.
        coupling = (v.mT @ v).triu_(1).mul_(tau.unsqueeze(-1)) + torch.eye(width, dtype=v.dtype)
        t = torch.linalg.solve_triangular(coupling, torch.diag_embed(tau), upper=True, unitriangular=True)
        rest[:, :, PANEL:].baddbmm_(v, t.mT @ (v.mT @ rest[:, :, PANEL:]), alpha=-1)
        reflectors.append((first, v, t))
    basis = torch.zeros_like(matrix)
    basis.diagonal(dim1=-2, dim2=-1).fill_(1)
    for first, v, t in reversed(reflectors):
        rest = basis[:, first:, first:]
        rest.baddbmm_(v, t @ (v.mT @ rest), alpha=-1)
    return basis, upper


PANEL = 128
"""Columns that LAPACK decomposes at once in :func:`qr`."""
