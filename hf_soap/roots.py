"""Inverse roots of Kronecker factors, and what else brings singular values to where they belong, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_soap.linalg import eigenbasis, eye_like, symmetrize


def newton_schulz(matrix: Tensor, *, eps: float, steps: int = 5) -> Tensor:
    """Brings the singular values of matrices near 1 and leaves their singular vectors.

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
    x: Tensor = wide / (wide.flatten(-2).norm(dim=-1)[..., None, None] + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if matrix.shape[-2] > matrix.shape[-1] else x


def inverse_root(matrix: Tensor, *, exponent: float, ridge: float, method: str = "eigh") -> Tensor:
    """Computes (A + ridge·λ_max·I)^exponent of symmetric positive semi-definite matrices.

    Args:
        matrix: A, (..., n, n), float32 or float64.
        exponent: Below 0; for ``"newton"`` -1/exponent must be a whole number.
        ridge: Relative to the largest eigenvalue. An eigenvalue that it leaves at 0 is mapped to 0, as in the
            pseudo-inverse, so that a zero matrix has the root 0.
        method: ``"eigh"``, or ``"newton"`` for the coupled Newton iteration; matrices on which that does not converge
            are solved by eigh.

    Returns:
        (..., n, n), symmetric; NaN where eigh fails in float64 too.
    """
    if method == "newton":
        root, converged = coupled_newton(matrix, order=round(-1 / exponent), ridge=ridge)
        if bool(converged.all()):
            return root
        failed = ~converged
        root[failed] = inverse_root(matrix[failed], exponent=exponent, ridge=ridge)
        return root
    values, basis = eigenbasis(matrix)
    values = values.clamp(min=0.0)
    values = values + ridge * values[..., :1]
    powers = torch.where(values > 0, values**exponent, 0.0 * values)  # NaN stays NaN
    return symmetrize((basis * powers.unsqueeze(-2)) @ basis.mT)


def coupled_newton(
    matrix: Tensor, *, order: int, ridge: float, tolerance: float | None = None, iterations: int = 40
) -> tuple[Tensor, Tensor]:
    """Computes (A + ridge·λ_max·I)^(-1/order) by matrix products only.

    X ← X T and M ← Tᵖ M with T = ((p+1) I - M)/p, from M = zA and X = z^(1/p) I, z = (p+1)/(2 λ_max): M goes to I
    and X to the root as long as X commutes with A. A stale root does not commute with A, and the iteration that
    starts from one gives it back with M = I, so that every call starts from the identity.

    Args:
        matrix: A, (..., n, n), symmetric positive semi-definite, float32 or float64.
        order: p, at least 1.
        ridge: Relative to the largest eigenvalue.
        tolerance: Bound on the largest entry of M - I at which a matrix counts as solved; None takes 1e-5 in float32
            and 1e-10 in float64.
        iterations: Give up after so many.

    Returns:
        The roots (..., n, n) and whether each converged, (...,), bool.

    Source:
        Schur-Newton, Guo and Higham, SIAM J. Matrix Anal. Appl. 28 (2006), equation 3.6; used in arXiv:2002.09018.
    """
    tolerance = tolerance or (1e-10 if matrix.dtype == torch.float64 else 1e-5)
    largest = spectral_norm(matrix)[..., None, None]
    eye = eye_like(matrix)
    damped = matrix + ridge * largest * eye
    z = (order + 1) / (2 * largest.clamp(min=torch.finfo(matrix.dtype).tiny) * (1 + ridge))
    m = damped * z
    x = eye * z ** (1 / order)
    error = (m - eye).abs().amax((-2, -1))
    for _ in range(iterations):
        if not bool((error > tolerance).any()):
            break
        t = ((order + 1) * eye - m) / order
        new_x, new_m = x @ t, torch.linalg.matrix_power(t, order) @ m
        new_error = (new_m - eye).abs().amax((-2, -1))
        # Past its best accuracy rounding makes an iterate worse: each matrix keeps its best.
        better = (new_error < error) | (error > 0.5)
        keep = better[..., None, None]
        x, m, error = torch.where(keep, new_x, x), torch.where(keep, new_m, m), torch.where(better, new_error, error)
        if not bool(better.any()):
            break
    # The best accuracy of an ill-conditioned matrix lies above the tolerance, and is good enough for a root.
    good_enough = 1e-3 if matrix.dtype == torch.float32 else 1e-6
    return symmetrize(x), (error <= max(tolerance, good_enough)) & x.isfinite().flatten(-2).all(-1)


def spectral_norm(matrix: Tensor, iterations: int = 30) -> Tensor:
    """Estimates the largest eigenvalue of positive semi-definite matrices by power iteration.

    Args:
        matrix: (..., n, n).
        iterations: Products with a vector.

    Returns:
        (...,): from below, and within a few percent unless the start is nearly orthogonal to the eigenvector.

    Source:
        Scaling by it instead of the Frobenius norm saves Newton iterations: DASH, arXiv:2602.02016.
    """
    # A start that no symmetry of the matrix makes orthogonal to the eigenvector, the same on every rank and run.
    n = matrix.shape[-1]
    vector = torch.arange(1, n + 1, dtype=matrix.dtype, device=matrix.device).sin_().add_(1.5)
    vector = (matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * vector).unsqueeze(-1)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        vector = matrix @ (vector / vector.norm(dim=-2, keepdim=True).clamp_(min=tiny))
    norm: Tensor = vector.norm(dim=-2).squeeze(-1)
    return norm
