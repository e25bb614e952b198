"""Eigenbases of Kronecker factors, refreshed by batched decompositions. Tensors are (..., n, n)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_soap.linalg.matrices import eye_like, one_by_one, safe_scale, symmetrize


def refresh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """One orthogonal iteration on a factor that is kept in its own eigenbasis.

    With L = Q L̂ Qᵀ, the textbook refresh qr(L Q) = qr(Q L̂) has the orthogonal part Q·qr(L̂). It is therefore enough
    to decompose L̂ = Q̃R̃, which is nearly diagonal. R̃Q̃ is the factor in the new basis.

    Args:
        factor: L̂ (blocks, n, n), symmetric, with its diagonal in descending order.

    Returns:
        The rotation Q̃ (blocks, n, n), to be applied as Q ← Q Q̃, and the refreshed factor Q̃ᵀ L̂ Q̃; NaN where the
        decomposition failed.

    Source:
        SOAP, arXiv:2409.11321, algorithm 4, restated in the rotated frame.
    """
    if _solves_by_products(factor):
        rotation = cholesky_qr(factor)
        return rotation, symmetrize(rotation.mT @ (factor @ rotation))
    try:
        rotation, upper = qr(factor)
    except torch.linalg.LinAlgError:
        rotation, upper = one_by_one(lambda one: tuple(part[0] for part in qr(one[None])), factor, (2, 2))
    return rotation, _symmetric_product(upper, rotation)


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
    found = basis.to(factor.dtype)
    # A matrix counts as orthonormal if QᵀQ maps a few vectors in general position to themselves.
    probes = torch.arange(8 * n, dtype=factor.dtype, device=factor.device).sin_().view(n, 8)
    off = (found.mT @ (found @ probes) - probes).norm(dim=-2).amax(-1) / probes.norm(dim=-2).amax()
    sound = (off < 1e-5)[:, None, None]  # false for NaN
    return torch.where(sound, found, torch.nan)


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


FAST_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs that multiply float64 at half the rate of float32 or better."""


def _solves_by_products(factor: Tensor) -> bool:
    if factor.device.type != "cuda" or factor.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(factor.device) in FAST_FLOAT64


def _symmetric_product(upper: Tensor, basis: Tensor) -> Tensor:
    """Returns ``upper @ basis`` (blocks, n, n), where ``upper`` is triangular and the product is symmetric."""
    n = upper.shape[-1]
    if not _in_panels(upper):
        return symmetrize(upper @ basis)
    product, width = torch.empty_like(upper), n // 4
    for first in range(0, n, width):
        strip = torch.bmm(upper[:, first : first + width, first:], basis[:, first:, first:])
        square, right = strip[:, :, :width], strip[:, :, width:]
        product[:, first : first + width, first : first + width] = symmetrize(square)
        product[:, first : first + width, first + width :] = right
        product[:, first + width :, first : first + width] = right.mT
    return product


def _in_panels(matrix: Tensor) -> bool:
    """Whether matrices are processed in panels, which skips products with known zeros."""
    return matrix.device.type == "cpu" and matrix.shape[-1] >= 4 * PANEL


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
    if not _in_panels(matrix):
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
    basis = eye_like(matrix).repeat(matrix.shape[0], 1, 1)
    for first, v, t in reversed(reflectors):
        rest = basis[:, first:, first:]
        rest.baddbmm_(v, t @ (v.mT @ rest), alpha=-1)
    return basis, upper


PANEL = 128
"""Columns that LAPACK decomposes at once in :func:`qr`."""


def sorted_refresh(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the diagonals of factors and calls :func:`refresh`.

    Args:
        factor: L̂ (blocks, n, n), symmetric.

    Returns:
        The order (blocks, n) that sorts the diagonals, largest first, and the results of :func:`refresh` for the
        sorted factors.
    """
    order = factor.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = factor.gather(-2, order.unsqueeze(-1).expand_as(factor))
    return order, *refresh(rows.gather(-1, order.unsqueeze(-2).expand_as(factor)))


def orthonormalize(basis: Tensor) -> Tensor:
    """One Newton–Schulz step towards the nearest orthonormal basis, Q(3I − QᵀQ)/2.

    A product of thousands of rotations loses orthonormality to rounding. One step squares the error. Singular values
    near √3 would become 0 and larger ones would grow, so a basis that may have such values is scaled first.

    Args:
        basis: (..., n, n), already orthonormal to about 1e-2.

    Returns:
        (..., n, n).
    """
    basis = basis / safe_scale(basis)
    gram = basis.mT @ basis
    # The largest row sum bounds the largest eigenvalue. It is near 1 for a nearly orthonormal basis.
    reach = gram.abs().sum(-1).amax(-1)[..., None, None]
    reach = torch.where(reach > 2, reach, 1.0)
    gram.div_(reach).mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1.5)
    return (basis @ gram).div_(reach.sqrt())


def off_diagonal_share(factor: Tensor) -> Tensor:
    """Returns ‖A − diag A‖_F / ‖A‖_F of each matrix (..., n, n): 0 for an exact eigenbasis and for A = 0."""
    scaled = factor / safe_scale(factor)
    total = scaled.square().sum((-2, -1))
    # Subtracting two sums would leave their rounding error: 3e-4 in the share of a diagonal float32 matrix.
    scaled.diagonal(dim1=-2, dim2=-1).zero_()
    return (scaled.square().sum((-2, -1)) / total.clamp_(min=torch.finfo(factor.dtype).tiny)).sqrt_()
