"""Batched inverse roots of Kronecker factors, and orthogonalization by Newton–Schulz."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_soap.linalg.decompositions import eigenbasis
from hf_soap.linalg.matrices import eye_like, power, safe_scale, symmetrize


def newton_schulz(matrix: Tensor, *, eps: float, steps: int = 5) -> Tensor:
    """Brings the singular values of matrices close to 1 and keeps their singular vectors.

    Args:
        matrix: (..., rows, cols).
        eps: Added to the Frobenius norm.
        steps: Iterations; five bring all but the tiniest singular values into about [0.7, 1.2].

    Returns:
        (..., rows, cols), a new tensor.

    Source:
        The quintic iteration of Muon (K. Jordan, 2024) as used by MARS-Shampoo, arXiv:2411.10438.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide: Tensor = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    scale = safe_scale(wide)
    x: Tensor = wide / scale
    # torch computes number / tensor as number * (1 / tensor), which may overflow where the quotient does not.
    norm = x.flatten(-2).norm(dim=-1)[..., None, None] + torch.full_like(scale, eps) / scale
    x = x / norm.clamp_(min=torch.finfo(x.dtype).tiny)  # zeros stay zeros even without eps
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if matrix.shape[-2] > matrix.shape[-1] else x


def inverse_root(
    matrix: Tensor, *, exponent: float, ridge: float, method: str = "eigh", cutoff: float = 0.0
) -> Tensor:
    """Computes (A + ridge·λ_max·I)^exponent of symmetric positive semi-definite matrices.

    Args:
        matrix: A, (..., n, n), float32 or float64.
        exponent: Below 0; for ``"newton"`` -1/exponent must be a whole number.
        ridge: Relative to the largest eigenvalue. An eigenvalue that it leaves at 0 is mapped to 0, as in the
            pseudo-inverse, so that a zero matrix has the root 0. Without a ridge, ``"eigh"`` takes eigenvalues below
            the rounding error of the largest one as 0.
        method: ``"eigh"``, or ``"newton"`` for the coupled Newton iteration; matrices on which that does not converge
            are solved by eigh.
        cutoff: Eigenvalues below this share of the largest are mapped to 0, before any ridge; only for ``"eigh"``.

    Returns:
        (..., n, n), symmetric; NaN for a matrix that is not finite.
    """
    if method == "newton":
        root, converged = coupled_newton(matrix, order=round(-1 / exponent), ridge=ridge)
        if bool(converged.all()):
            return root
        failed = ~converged
        root[failed] = inverse_root(matrix[failed], exponent=exponent, ridge=ridge)
        return root
    scale = safe_scale(matrix)
    values, basis = eigenbasis(matrix / scale)
    values, unit = values.clamp(min=0.0), scale.squeeze(-1)
    if not ridge:  # smaller values are rounding errors of eigh, which gave roots of 1e22 for zero rows
        cutoff = max(cutoff, torch.finfo(values.dtype).eps)
    values = (values + ridge * values[..., :1]) * (values >= cutoff * values[..., :1])
    powers = torch.where(values > 0, power(values, exponent), 0.0 * values) * power(unit, exponent)  # NaN stays NaN
    return symmetrize((basis * powers.unsqueeze(-2)) @ basis.mT)


def coupled_newton(
    matrix: Tensor, *, order: int, ridge: float, tolerance: float | None = None, iterations: int = 40
) -> tuple[Tensor, Tensor]:
    """Computes (A + ridge·λ_max·I)^(-1/order) by matrix products only.

    X ← X T and M ← Tᵖ M with T = ((p+1) I - M)/p, from M = zA and X = z^(1/p) I, z = (p+1)/(2 λ_max): M converges to I
    and X to the root as long as X commutes with A. A stale root does not commute with A, and an iteration that starts
    from one returns it with M = I. Every call therefore starts from the identity.

    Args:
        matrix: A, (..., n, n), symmetric positive semi-definite, float32 or float64.
        order: p, at least 1.
        ridge: Relative to the largest eigenvalue.
        tolerance: Bound on the largest entry of M - I at which a matrix counts as solved; None takes 1e-5 in float32
            and 1e-10 in float64.
        iterations: Give up after this many.

    Returns:
        The roots (..., n, n) and whether each converged, (...,), bool.

    Source:
        Schur-Newton, Guo and Higham, SIAM J. Matrix Anal. Appl. 28 (2006), equation 3.6; used in arXiv:2002.09018.
    """
    tolerance = tolerance or (1e-10 if matrix.dtype == torch.float64 else 1e-5)
    scale = safe_scale(matrix)
    matrix = matrix / scale
    largest = spectral_norm(matrix)[..., None, None]
    eye = eye_like(matrix)
    damped = matrix + ridge * largest * eye
    z = (order + 1) / (2 * largest.clamp(min=torch.finfo(matrix.dtype).tiny) * (1 + ridge))
    m = damped * z
    x = eye * power(z, 1 / order)
    error = (m - eye).abs().amax((-2, -1))
    for _ in range(iterations):
        if not bool((error > tolerance).any()):
            break
        t = ((order + 1) * eye - m) / order
        new_x, new_m = x @ t, torch.linalg.matrix_power(t, order) @ m
        new_error = (new_m - eye).abs().amax((-2, -1))
        # Past the best accuracy, rounding makes an iterate worse, so each matrix keeps its best iterate. A solved
        # matrix keeps its result, whatever other matrices are in the batch.
        better = ((new_error < error) | (error > 0.5)) & (error > tolerance)
        keep = better[..., None, None]
        x, m, error = torch.where(keep, new_x, x), torch.where(keep, new_m, m), torch.where(better, new_error, error)
        if not bool(better.any()):
            break
    # An ill-conditioned matrix may never reach the tolerance, and still be accurate enough for a root.
    good_enough = 1e-3 if matrix.dtype == torch.float32 else 1e-6
    root = symmetrize(x)
    # If the norm was estimated far too small, M may be near I for another root of A, one with negative eigenvalues.
    _, indefinite = torch.linalg.cholesky_ex(root)
    converged = (error <= max(tolerance, good_enough)) & (indefinite == 0)
    root = root * power(scale, -1 / order)
    return root, converged & root.isfinite().flatten(-2).all(-1)


def spectral_norm(matrix: Tensor, iterations: int = 30) -> Tensor:
    """Estimates the largest eigenvalue of positive semi-definite matrices by power iteration.

    Args:
        matrix: (..., n, n).
        iterations: Products with a vector.

    Returns:
        (...,), an estimate from below, within a few percent unless the start is nearly orthogonal to the eigenvector.

    Source:
        Scaling by it instead of the Frobenius norm saves Newton iterations: DASH, arXiv:2602.02016.
    """
    if matrix.device.type == "cpu" and matrix.shape[:-2].numel() > 1:
        # A batched product with a vector sums in a different order than a single one, so each matrix is solved alone.
        flat = matrix.reshape(-1, 1, *matrix.shape[-2:])
        return torch.cat([spectral_norm(one, iterations) for one in flat]).view(matrix.shape[:-2])
    # No symmetry of the matrix makes this start orthogonal to the eigenvector. It is the same on every rank and in
    # every run.
    n, scale = matrix.shape[-1], safe_scale(matrix)
    matrix = matrix / scale
    vector = torch.arange(1, n + 1, dtype=matrix.dtype, device=matrix.device).sin_().add_(1.5)
    vector = (matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * vector).unsqueeze(-1)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        vector = matrix @ (vector / vector.norm(dim=-2, keepdim=True).clamp_(min=tiny))
    norm: Tensor = (vector.norm(dim=-2, keepdim=True) * scale)[..., 0, 0]
    return norm
