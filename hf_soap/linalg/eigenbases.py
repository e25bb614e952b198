"""Eigenbases of Kronecker factors, refreshed by batched decompositions. Tensors are (..., n, n)."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from hf_soap.linalg import processor
from hf_soap.linalg.decompositions import cholesky_qr, in_panels, one_by_one, qr
from hf_soap.linalg.matrices import permute, safe_scale, symmetrize

logger = logging.getLogger(__name__)


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


FAST_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs that multiply float64 at half the rate of float32 or better."""


def _solves_by_products(factor: Tensor) -> bool:
    return factor.device.type == "cuda" and factor.dtype == torch.float32 and _has_fast_float64(factor.device)


@cache
def _has_fast_float64(device: torch.device) -> bool:
    fast = torch.cuda.get_device_capability(device) in FAST_FLOAT64
    kernel = "Cholesky QR in float64" if fast else "Householder QR"
    logger.debug("refreshes of float32 factors by %s: %s", kernel, processor.instructions(device))
    return fast


def _symmetric_product(upper: Tensor, basis: Tensor) -> Tensor:
    """Returns ``upper @ basis`` (blocks, n, n), where ``upper`` is triangular and the product is symmetric."""
    n = upper.shape[-1]
    if not in_panels(upper):
        return symmetrize(upper @ basis)
    product, width = torch.empty_like(upper), n // 4
    for first in range(0, n, width):
        strip = torch.bmm(upper[:, first : first + width, first:], basis[:, first:, first:])
        square, right = strip[:, :, :width], strip[:, :, width:]
        product[:, first : first + width, first : first + width] = symmetrize(square)
        product[:, first : first + width, first + width :] = right
        product[:, first + width :, first : first + width] = right.mT
    return product


def sorted_refresh(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the diagonals of factors and calls :func:`refresh`.

    Args:
        factor: L̂ (blocks, n, n), symmetric.

    Returns:
        The order (blocks, n) that sorts the diagonals, largest first, and the results of :func:`refresh` for the
        sorted factors.
    """
    order = factor.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return order, *refresh(permute(permute(factor, order, 0), order, 1))


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
