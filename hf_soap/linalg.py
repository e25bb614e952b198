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


def refresh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """One orthogonal iteration on a factor that is kept in its own eigenbasis.

    With L = Q L̂ Qᵀ, the textbook refresh qr(L Q) = qr(Q L̂) has the orthogonal part Q·qr(L̂), so that the
    decomposition of the small-norm-off-diagonal L̂ says all, and R̃Q̃ is the factor in the new basis.

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
    """The orthogonal factor of a QR decomposition by products, Cholesky and triangular solves, on no host's account.

    On GPUs Householder's reflections, one after the other, are what a refresh waits for. Here columns are scaled, the
    Gram matrix is float64 and shifted at first, and two more passes remove what condition numbers of 1e8 leave.
    Directions that a factor knows nothing of are held apart by float32's spacing at the largest eigenvalue.

    Args:
        factor: (blocks, n, n), float32, symmetric positive semi-definite up to rounding.

    Returns:
        Q, (blocks, n, n), with the signs of a positive diagonal of R; NaN for a matrix that is not finite.

    Source:
        Shifted CholeskyQR3: Fukaya et al., arXiv:1809.11085.
    """
    eye = torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(factor.dtype).tiny)
    shift = largest.double() * torch.finfo(factor.dtype).eps
    basis = factor.double() + shift[..., None, None] * eye
    for gram_shift in (16 * factor.shape[-1] * torch.finfo(torch.float64).eps, 0.0, 0.0):
        basis = basis / basis.norm(dim=-2, keepdim=True)
        lower, _ = torch.linalg.cholesky_ex(basis.mT @ basis + gram_shift * eye)
        basis = torch.linalg.solve_triangular(lower.mT, basis, upper=True, left=False)
    sound = (basis.mT @ basis - eye).abs().amax((-2, -1), keepdim=True) < 1e-6  # false for NaN
    return torch.where(sound, basis, torch.nan).to(factor.dtype)


FAST_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs that multiply float64 at half the rate of float32 or better."""


def _solves_by_products(factor: Tensor) -> bool:
    if factor.device.type != "cuda" or factor.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(factor.device) in FAST_FLOAT64


def _symmetric_product(upper: Tensor, basis: Tensor) -> Tensor:
    """Returns the product of an upper triangular matrix and another, (blocks, n, n), that is known to be symmetric."""
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
    """Whether matrices are worked through in panels, so that what is known to be zero is not multiplied."""
    return matrix.device.type == "cpu" and matrix.shape[-1] >= 4 * PANEL


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposes square matrices into an orthogonal and an upper triangular one.

    LAPACK forms the orthogonal factor at a third of the speed of a product. On a CPU, matrices that are large enough
    are worked through in panels, so that nearly all work is products.

    Args:
        matrix: (blocks, n, n).

    Returns:
        Q and R, (blocks, n, n) each; signs are LAPACK's.

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
    """:func:`refresh` of factors whose diagonals may be in any order.

    Args:
        factor: L̂ (blocks, n, n), symmetric.

    Returns:
        The order (blocks, n) that sorts the diagonals, largest first, and what :func:`refresh` returns for that.
    """
    order = factor.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = factor.gather(-2, order.unsqueeze(-1).expand_as(factor))
    return order, *refresh(rows.gather(-1, order.unsqueeze(-2).expand_as(factor)))


def orthonormalize(basis: Tensor) -> Tensor:
    """One Newton–Schulz step towards the nearest orthonormal basis, Q(3I − QᵀQ)/2.

    Products of thousands of rotations drift off orthonormality by rounding alone; one step squares the error away.

    Args:
        basis: (..., n, n), already orthonormal to about 1e-2.

    Returns:
        (..., n, n).
    """
    gram = basis.mT @ basis
    gram.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1.5)
    return basis @ gram


def off_diagonal_share(factor: Tensor) -> Tensor:
    """Returns ‖A − diag A‖_F / ‖A‖_F of each matrix (..., n, n): 0 for an exact eigenbasis, nan-free at A = 0."""
    total = factor.square().sum((-2, -1))
    diagonal = factor.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    tiny = torch.finfo(factor.dtype).tiny
    return ((total - diagonal).clamp_(min=0.0) / total.clamp_(min=tiny)).sqrt_()


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
