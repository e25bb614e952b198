"""Textbook SOAP in float64: slow loops, one matrix at a time, written to be read together with the paper.

The package computes the same trajectories in another way (batches of blocks, factors in their own eigenbasis). Here
the factors stay in the original space and accumulate the raw gradient, and the momentum is rotated back with the old
basis and forward with the new one. The package shares no code with this file, so that agreement is evidence.

Sources:
    SOAP: Vyas et al., arXiv:2409.11321, Algorithm 3, with the order of operations of the authors' implementation.
    KL correction: Lin et al., arXiv:2509.03378.
    Adafactor's factored second moment: Shazeer and Stern, arXiv:1804.04235, Algorithm 1.
    Blocks: Anil et al., arXiv:2002.09018, where large tensors are partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

TINY = 1e-30


# ---------------------------------------------------------------------------------------------------------------------
# Tensors, their unfoldings and their blocks
# ---------------------------------------------------------------------------------------------------------------------


def float64_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(torch.float64, copy=True) for tensor in tensors]


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The matrix (d_mode, product of the other dimensions) whose rows run along `mode`."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply `matrix` onto one mode: AG for mode 0 of a matrix, GA^T for mode 1."""
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def gram(tensor: Tensor, mode: int) -> Tensor:
    """GG^T for mode 0, G^T G for mode 1, and the unfolding's Gram matrix in general."""
    unfolded = unfold(tensor, mode)
    return unfolded @ unfolded.T


def rotate(tensor: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """G' = Q_L^T G Q_R. A mode without a basis stays as it is."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            tensor = mode_product(tensor, basis.T, mode)
    return tensor


def rotate_back(tensor: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """G = Q_L G' Q_R^T, the inverse of `rotate`."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            tensor = mode_product(tensor, basis, mode)
    return tensor


def merged_shape(shape: Sequence[int], max_precond_dim: int) -> tuple[int, ...]:
    """Merge neighbouring dimensions, greedily from the left, while their product stays within `max_precond_dim`.

    On overflow the running product is emitted and restarts at the dimension that overflowed. If the running product is
    still 1, that dimension itself is emitted. Vectors and matrices keep their shape.
    """
    if len(shape) <= 2:
        return tuple(shape)
    merged: list[int] = []
    running = 1
    for size in shape:
        if running * size <= max_precond_dim:
            running *= size
        elif running > 1:
            merged.append(running)
            running = size
        else:
            merged.append(size)
            running = 1
    if running > 1 or not merged:
        merged.append(running)
    return tuple(merged)


def block_grid(shape: Sequence[int], block_size: int | None) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """Cut every dimension d into c = ceil(d/b) pieces of s = ceil(d/c) entries; the last piece may be shorter.

    Returns:
        The shape of a full block, and the slices of every block in row-major order.
    """
    sizes: list[int] = []
    cuts: list[list[slice]] = []
    for length in shape:
        pieces = 1 if block_size is None else math.ceil(length / block_size)
        size = math.ceil(length / pieces)
        sizes.append(size)
        cuts.append([slice(start, min(start + size, length)) for start in range(0, length, size)])
    return tuple(sizes), list(product(*cuts))


def zero_padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` in the leading corner of a zero tensor of `shape`."""
    padded = torch.zeros(tuple(shape), dtype=tensor.dtype)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


# ---------------------------------------------------------------------------------------------------------------------
# When to refresh
# ---------------------------------------------------------------------------------------------------------------------


def refresh_is_due(t: int, offset: int, every: int, growth: float) -> bool:
    """Whether the interval between two refreshes ends at update t, for a tensor that refreshes `offset` updates early.

    The first interval starts after update 0. One that starts after update s has floor(growth * s) updates, but at
    least 1 and at most `every`. Without growth all have `every` updates.
    """
    start = end = 0
    while end < t:
        start, end = end, end + (min(every, max(1, math.floor(growth * end))) if growth else every)
    return t == end - offset % (end - start)


# ---------------------------------------------------------------------------------------------------------------------
# SOAP
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SoapBlock:
    """State of one block: moments in the rotated space, factors in the original one."""

    exp_avg: Tensor
    exp_avg_sq: Tensor | None  # V, or None if it is kept as row and column means
    means: list[Tensor]  # EMAs of the row means and of the column means of G'*G', if V is None
    factors: list[Tensor | None]  # L, R, ...; None if a mode is not factored
    bases: list[Tensor | None]  # Q_L, Q_R, ...


@dataclass
class SoapParameter:
    """State of one parameter, and how it is cut. `t` counts updates, so it is 1 at the second (non-zero) gradient."""

    shape: tuple[int, ...]  # after merge_dims; a scalar counts as a vector of one entry
    block_shape: tuple[int, ...]
    slices: list[tuple[slice, ...]]
    factored: list[int]  # the factored modes
    factorized: bool  # whether V is kept as a product of rows and columns
    t: int = 0
    seeded: bool = False
    blocks: list[SoapBlock] = field(default_factory=list)  # empty until seeded


class ReferenceSOAP:
    """SOAP with the official conventions, and the variants that the package offers.

    Choices where the sources do not say:
        - Blocks. Each block counts as a separate matrix: `max_precond_dim` and the n and m of the KL
          correction refer to the block's (zero-padded) shape. Tensors of any rank are cut, along every dimension.
          Seeding and t belong to the whole parameter, and `normalize_grads` takes the RMS over the whole tensor.
        - `merge_dims` comes first: a convolution that merges to a matrix is then treated as a matrix, and one that
          merges to a vector keeps its factor (only original vectors need `precondition_1d`).
        - `factorized` and `one_sided` concern matrices and have no effect on tensors of other ranks. A matrix without
          any factored side follows plain Adam, so it keeps the full V. So does (1, n) when one-sided.
        - `include_current`: the seeding gradient still does not change the weights. Later steps accumulate, refresh if
          due, and then use the bases.
        - `refresh_tol`: each factor is tested by itself, only when it is due, and after it has accumulated the
          gradient. A skipped factor is neither sorted nor rotated. 0 never skips.
        - `kl`: both factors use the other one from before this step. A mode without a factor counts as the identity,
          but the statistic is still divided by its size.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        stagger: bool = False,
        refresh_growth: float = 0.0,
        one_sided: bool = False,
        factorized: bool = False,
        block_size: int | None = None,
        square_blocks: bool = False,
        kl: bool = False,
        eps_kl: float = 1e-8,
        include_current: bool = False,
        refresh_tol: float = 0.0,
        rotate_second_moment: bool = False,
    ) -> None:
        self.weights = [weight.detach().to(torch.float64, copy=True) for weight in weights]
        self.lr = lr
        self.betas = betas
        self.shampoo_beta = betas[1] if shampoo_beta is None else shampoo_beta
        self.eps = eps
        self.weight_decay = weight_decay
        self.precondition_frequency = precondition_frequency
        self.max_precond_dim = max_precond_dim
        self.merge_dims = merge_dims
        self.precondition_1d = precondition_1d
        self.normalize_grads = normalize_grads
        self.correct_bias = correct_bias
        self.stagger = stagger
        self.refresh_growth = refresh_growth
        self.one_sided = one_sided
        self.factorized = factorized
        self.block_size = block_size
        self.square_blocks = square_blocks
        self.kl = kl
        self.eps_kl = eps_kl
        self.include_current = include_current
        self.refresh_tol = refresh_tol
        self.rotate_second_moment = rotate_second_moment
        self.state = [self._layout(weight) for weight in self.weights]

    def _layout(self, weight: Tensor) -> SoapParameter:
        """Decide how a parameter is reshaped and cut, and which of its modes get a factor."""
        shape = tuple(weight.shape) or (1,)
        if self.merge_dims:
            shape = merged_shape(shape, self.max_precond_dim)
        longest = min(shape) if self.square_blocks and len(shape) == 2 else self.block_size
        block_shape, slices = block_grid(shape, longest)
        factored = [mode for mode, size in enumerate(block_shape) if 1 < size <= self.max_precond_dim]
        if weight.dim() <= 1 and not self.precondition_1d:
            factored = []
        if self.one_sided and len(block_shape) == 2:
            shorter = 0 if shape[0] <= shape[1] else 1
            factored = [mode for mode in factored if mode == shorter]
        factorized = self.factorized and len(block_shape) == 2 and len(factored) > 0
        return SoapParameter(shape, block_shape, slices, factored, factorized)

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        """One step. A parameter whose gradient is None does not change.

        Source: arXiv:2409.11321, Algorithm 3.
        """
        lr = self.lr if lr is None else lr
        beta1, beta2 = self.betas
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            grad = grad.detach().to(torch.float64).reshape(state.shape)
            pieces = [zero_padded(grad[cut], state.block_shape) for cut in state.slices]

            if not state.seeded:
                # The first non-zero gradient only seeds the bases: no gradient enters the basis that rotates it.
                if grad.any():
                    state.blocks = [self._seed(state, piece) for piece in pieces]
                    state.seeded = True
                continue

            state.t += 1
            offset = index if self.stagger else 0
            due = refresh_is_due(state.t, offset, self.precondition_frequency, self.refresh_growth)

            if self.include_current:
                self._update_preconditioner(state, pieces, due)

            # N = Q_L (M / (sqrt(V) + eps)) Q_R^T, block by block
            update = torch.zeros(state.shape, dtype=torch.float64)
            for block, piece, cut in zip(state.blocks, pieces, state.slices, strict=True):
                real = tuple(slice(0, size) for size in update[cut].shape)
                update[cut] = self._direction(block, piece)[real]
            if self.normalize_grads:
                update = update / (TINY + update.square().mean().sqrt())

            step_size = lr
            if self.correct_bias:
                step_size = lr * math.sqrt(1 - beta2**state.t) / (1 - beta1**state.t)
            weight = self.weights[index]
            weight = weight - step_size * update.reshape(weight.shape)
            weight = weight - lr * self.weight_decay * weight
            self.weights[index] = weight

            if not self.include_current:
                self._update_preconditioner(state, pieces, due)

    def _seed(self, state: SoapParameter, grad: Tensor) -> SoapBlock:
        """Factors (1 - beta) GG^T, and their eigenvectors by descending eigenvalue. Moments start at zero.

        With KL, the factors start before they accumulate the gradient: see `_accumulate`.
        """
        modes = range(grad.dim())
        factors = [(1 - self.shampoo_beta) * gram(grad, mode) if mode in state.factored else None for mode in modes]
        if self.kl:
            start = SoapBlock(
                exp_avg=grad,
                exp_avg_sq=None,
                means=[],
                factors=[None if factor is None else torch.zeros_like(factor) for factor in factors],
                bases=[None if factor is None else torch.eye(len(factor), dtype=grad.dtype) for factor in factors],
            )
            self._accumulate(start, grad)
            factors = start.factors
        # eigh returns eigenvalues in ascending order
        bases = [None if factor is None else torch.linalg.eigh(factor).eigenvectors.flip(1) for factor in factors]
        return SoapBlock(
            exp_avg=torch.zeros_like(grad),
            exp_avg_sq=None if state.factorized else torch.zeros_like(grad),
            means=[torch.zeros(size, dtype=grad.dtype) for size in grad.shape] if state.factorized else [],
            factors=factors,
            bases=bases,
        )

    def _direction(self, block: SoapBlock, grad: Tensor) -> Tensor:
        """Adam in the rotated space, rotated back; eps is added to the square root of V before any bias correction."""
        beta1, beta2 = self.betas
        rotated = rotate(grad, block.bases)
        block.exp_avg = beta1 * block.exp_avg + (1 - beta1) * rotated
        if block.exp_avg_sq is not None:
            block.exp_avg_sq = beta2 * block.exp_avg_sq + (1 - beta2) * rotated * rotated
            second_moment = block.exp_avg_sq
        else:
            # Adafactor, arXiv:1804.04235, Algorithm 1, with means in place of sums: V = r c^T / mean(r)
            for mode, mean in enumerate(block.means):
                block.means[mode] = beta2 * mean + (1 - beta2) * (rotated * rotated).mean(dim=1 - mode)
            row, column = block.means
            second_moment = torch.outer(row, column) / row.mean().clamp(min=TINY)
        return rotate_back(block.exp_avg / (second_moment.sqrt() + self.eps), block.bases)

    def _update_preconditioner(self, state: SoapParameter, pieces: Sequence[Tensor], due: bool) -> None:
        for block, piece in zip(state.blocks, pieces, strict=True):
            self._accumulate(block, piece)
            if due:
                self._refresh(block)

    def _accumulate(self, block: SoapBlock, grad: Tensor) -> None:
        """L <- beta L + (1 - beta) GG^T and so on for every factored mode.

        With KL, factors of zero start as equal multiples of the identity, whose product is the mean square of the
        gradient. A statistic that would more than double the trace of its factor is shortened: where it would grow
        g-fold, it grows by the k-th root of g, for k factors.
        """
        beta = self.shampoo_beta
        factored = [factor for factor in block.factors if factor is not None]
        if self.kl and not any(factor.any() for factor in factored):
            for factor in factored:
                factor.diagonal().fill_(grad.square().mean() ** (1 / len(factored)))
        statistics = [self._kl_gram(block, grad, mode) if self.kl else gram(grad, mode) for mode in range(grad.dim())]
        for mode, old in enumerate(block.factors):
            if old is not None:
                growth = (1 - beta) * statistics[mode].trace().item() / max(old.trace().item(), TINY)
                shortened = max(1.0, growth) ** (1 / len(factored) - 1) if self.kl else 1.0
                block.factors[mode] = beta * old + (1 - beta) * shortened * statistics[mode]

    def _kl_gram(self, block: SoapBlock, grad: Tensor, mode: int) -> Tensor:
        """G R^-1 G^T / n for mode 0, and the same with every other mode whitened for tensors.

        The inverse is taken in the current basis, R^-1 = Q diag(Q^T R Q)^-1 Q^T, with eigenvalues below `eps_kl` times
        the largest one raised to that.

        Source: arXiv:2509.03378, the KL-minimizing update of the Kronecker factors.
        """
        whitened = grad
        for other, (factor, basis) in enumerate(zip(block.factors, block.bases, strict=True)):
            if other == mode or factor is None or basis is None:
                continue
            eigenvalues = (basis.T @ factor @ basis).diag()
            eigenvalues = eigenvalues.clamp(min=max(self.eps_kl * eigenvalues.max().item(), TINY))
            inverse = basis @ torch.diag(1 / eigenvalues) @ basis.T
            whitened = mode_product(whitened, inverse, other)
        others = grad.numel() // grad.shape[mode]
        return unfold(grad, mode) @ unfold(whitened, mode).T / others

    def _refresh(self, block: SoapBlock) -> None:
        """One step of orthogonal iteration, Q <- qr(L Q), on columns sorted by their estimated eigenvalues.

        V is permuted with its columns, or with `rotate_second_moment` mixed by the squares of the rotation from the
        old basis to the new one; M is rotated back and into the new basis.

        Source: arXiv:2409.11321, Algorithm 4 (Eigenvectors).
        """
        momentum = rotate_back(block.exp_avg, block.bases)
        for mode, (factor, basis) in enumerate(zip(block.factors, block.bases, strict=True)):
            if factor is None or basis is None:
                continue
            in_basis = basis.T @ factor @ basis
            off_diagonal = in_basis - torch.diag(in_basis.diag())
            if self.refresh_tol > 0 and off_diagonal.norm() <= self.refresh_tol * in_basis.norm():
                continue
            order = torch.argsort(in_basis.diag(), descending=True, stable=True)
            refreshed = torch.linalg.qr(factor @ basis[:, order]).Q
            identity = torch.eye(len(order), dtype=factor.dtype)
            mixing = (refreshed.T @ basis) ** 2 if self.rotate_second_moment else identity[order]
            if block.exp_avg_sq is not None:
                block.exp_avg_sq = mode_product(block.exp_avg_sq, mixing, mode)
            else:
                block.means[mode] = mixing @ block.means[mode]
            block.bases[mode] = refreshed
        block.exp_avg = rotate(momentum, block.bases)
