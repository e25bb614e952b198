"""Textbook Shampoo and KL-Shampoo in float64: slow loops, one matrix at a time.

Companion of soap.py: written from the equations of the papers, and sharing no code with the rest of the package.

Sources:
    Shampoo: Gupta, Koren and Singer, arXiv:1802.09568, Algorithms 1 and 2.
    Blocks, grafting, stale roots, start step: Anil et al., arXiv:2002.09018.
    KL-Shampoo: Lin et al., arXiv:2509.03378.
    Shampoo as Adafactor in the eigenbasis: Vyas et al., arXiv:2409.11321, Claim 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_soap.reference.soap import (
    TINY,
    block_grid,
    float64_copies,
    gram,
    merged_shape,
    mode_product,
    refresh_is_due,
    unfold,
)

# ---------------------------------------------------------------------------------------------------------------------
# Inverse roots
# ---------------------------------------------------------------------------------------------------------------------


def inverse_power(eigenvalues: Tensor, exponent: float, ridge: float = 0.0, cutoff: float = 0.0) -> Tensor:
    """(lambda + ridge lambda_max)^exponent for an exponent < 0.

    Negative eigenvalues are rounding noise and count as zero. An eigenvalue that is zero even with the ridge maps to
    zero, as in the pseudo-inverse, and so does one below `cutoff` lambda_max.
    """
    eigenvalues = eigenvalues.clamp(min=0)
    damped = eigenvalues + ridge * eigenvalues.max()
    kept = (damped > 0) & (eigenvalues >= cutoff * eigenvalues.max())
    return torch.where(kept, damped**exponent, torch.zeros_like(damped))


def matrix_power(matrix: Tensor, exponent: float, ridge: float = 0.0, cutoff: float = 0.0) -> Tensor:
    """(A + ridge lambda_max I)^exponent of a symmetric positive semi-definite A, for an exponent < 0."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    power: Tensor = eigenvectors @ torch.diag(inverse_power(eigenvalues, exponent, ridge, cutoff)) @ eigenvectors.T
    return power


def inverse_root(matrix: Tensor, p: float, ridge: float = 0.0) -> Tensor:
    """(A + ridge lambda_max I)^(-1/p); p need not be an integer."""
    return matrix_power(matrix, -1 / p, ridge)


# ---------------------------------------------------------------------------------------------------------------------
# Shampoo
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ShampooBlock:
    """One block. A mode's statistic is a matrix, or its diagonal as a vector if the mode is too long."""

    statistics: list[Tensor]
    roots: list[Tensor] | None = None  # as last computed


@dataclass
class ShampooParameter:
    """State of one parameter. `t` counts its gradients from the first non-zero one, which is t = 1."""

    shape: tuple[int, ...]
    slices: list[tuple[slice, ...]]
    blocks: list[ShampooBlock]
    t: int = 0
    momentum: Tensor | None = None
    filtered: Tensor | float = 0.0
    graft: dict[str, Tensor] = field(default_factory=dict)


class ReferenceShampoo:
    """Shampoo with the techniques of Scalable Shampoo.

    Choices where the sources do not say:
        - The current gradient enters the statistics, then the roots (if due), then the direction.
        - Gradients that are all zero before the first non-zero one change nothing, not even t.
        - Roots are computed when first needed, and again whenever t is a multiple of `precondition_frequency`. They
          are used from t = `start_step` on; before that, only the grafted rule runs (plain SGD without one).
        - The order k in the exponent -1/(2k) counts every dimension of the tensor (after `merge_dims`), including
          those of size 1 and those that only keep a diagonal. Vectors keep a diagonal, as in AdaGrad, unless
          `precondition_1d`.
        - `beta` None sums the statistics. With a beta, they are debiased only with `correct_bias`.
        - `max_precond_dim` applies to the block. Blocks are not padded here: zero rows and columns decouple from the
          rest, and change neither the largest eigenvalue nor the result.
        - Grafting rescales the direction of the whole tensor to the norm of the grafted rule's step. That rule sees
          the same filtered gradient and takes its second moment from the raw one; Adam's is debiased.
        - `beta1` filters the gradient that is preconditioned (debiased, arXiv:2309.06497); 0 does not filter.
        - A tensor without a factor matrix (a vector) follows the grafted rule, if there is one.
        - Momentum is a heavy ball on the (grafted) direction, M <- mu M + D, and weight decay is decoupled:
          W <- W - lr (M + lambda W).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float = 1e-3,
        beta: float | None = None,
        exponent: float | None = None,
        eps: float = 1e-12,
        cutoff: float = 0.0,
        correct_bias: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        graft: str | None = None,
        graft_beta2: float = 0.999,
        graft_eps: float = 1e-8,
        start_step: int = 0,
        precondition_frequency: int = 1,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        block_size: int | None = None,
        stagger: bool = False,
        refresh_growth: float = 0.0,
        beta1: float = 0.0,
    ) -> None:
        self.weights = float64_copies(weights)
        self.lr = lr
        self.beta1 = beta1
        self.beta = beta
        self.exponent = exponent
        self.eps = eps
        self.cutoff = cutoff
        self.correct_bias = correct_bias
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.graft = graft
        self.graft_beta2 = graft_beta2
        self.graft_eps = graft_eps
        self.start_step = start_step
        self.precondition_frequency = precondition_frequency
        self.max_precond_dim = max_precond_dim
        self.merge_dims = merge_dims
        self.precondition_1d = precondition_1d
        self.block_size = block_size
        self.stagger = stagger
        self.refresh_growth = refresh_growth
        self.state = [self._initial_state(weight) for weight in self.weights]

    def _initial_state(self, weight: Tensor) -> ShampooParameter:
        shape = tuple(weight.shape) or (1,)
        if self.merge_dims:
            shape = merged_shape(shape, self.max_precond_dim)
        _, slices = block_grid(shape, self.block_size)
        whole_matrix = weight.dim() > 1 or self.precondition_1d
        blocks = []
        for cut in slices:
            sizes = [piece.stop - piece.start for piece in cut]
            statistics = [
                torch.zeros((size, size) if whole_matrix and size <= self.max_precond_dim else (size,)).double()
                for size in sizes
            ]
            blocks.append(ShampooBlock(statistics))
        return ShampooParameter(shape, slices, blocks)

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        """One step. A parameter whose gradient is None does not change.

        Source: arXiv:1802.09568, Algorithm 1 (matrices) and 2 (tensors).
        """
        lr = self.lr if lr is None else lr
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            if state.t == 0 and not grad.any():
                continue
            state.t += 1
            grad = grad.detach().to(torch.float64).reshape(state.shape)
            state.filtered = self.beta1 * state.filtered + (1 - self.beta1) * grad
            filtered = state.filtered / (1 - self.beta1**state.t)
            grafted = self._grafted_step(state, grad, filtered)
            diagonal_only = all(statistic.dim() == 1 for statistic in state.blocks[0].statistics)

            for block, cut in zip(state.blocks, state.slices, strict=True):
                self._accumulate(block, grad[cut])

            if state.t < self.start_step or (diagonal_only and self.graft is not None):
                direction = grafted
            else:
                offset = index if self.stagger else 0
                due = refresh_is_due(state.t, offset, self.precondition_frequency, self.refresh_growth)
                direction = torch.zeros_like(grad)
                for block, cut in zip(state.blocks, state.slices, strict=True):
                    if due or block.roots is None:
                        block.roots = self._roots(block, state)
                    direction[cut] = self._precondition(self._with_current_diagonals(block, state), filtered[cut])
                if self.graft is not None:
                    direction = direction * grafted.norm() / direction.norm().clamp(min=TINY)

            if self.momentum > 0:
                previous = torch.zeros_like(grad) if state.momentum is None else state.momentum
                state.momentum = self.momentum * previous + direction
                direction = state.momentum

            weight = self.weights[index]
            self.weights[index] = weight - lr * (direction.reshape(weight.shape) + self.weight_decay * weight)

    def _accumulate(self, block: ShampooBlock, grad: Tensor) -> None:
        """L <- L + GG^T, or L <- beta L + (1 - beta) GG^T; only the diagonal of GG^T where a mode is too long."""
        for mode, statistic in enumerate(block.statistics):
            new = gram(grad, mode) if statistic.dim() == 2 else unfold(grad, mode).square().sum(dim=1)
            if self.beta is None:
                block.statistics[mode] = statistic + new
            else:
                block.statistics[mode] = self.beta * statistic + (1 - self.beta) * new

    def _roots(self, block: ShampooBlock, state: ShampooParameter) -> list[Tensor]:
        """L^(-1/4), R^(-1/4), and L_i^(-1/2k) for a tensor of order k."""
        exponent = -1 / (2 * len(state.shape)) if self.exponent is None else self.exponent
        roots = []
        for statistic in block.statistics:
            if self.beta is not None and self.correct_bias:
                statistic = statistic / (1 - self.beta**state.t)
            if statistic.dim() == 2:
                roots.append(matrix_power(statistic, exponent, self.eps, self.cutoff))
            else:
                roots.append(inverse_power(statistic, exponent, self.eps, self.cutoff))
        return roots

    def _with_current_diagonals(self, block: ShampooBlock, state: ShampooParameter) -> list[Tensor]:
        """Roots of matrices as last computed, and roots of the current diagonals, which cost nothing."""
        assert block.roots is not None
        current = self._roots(block, state)
        return [old if old.dim() == 2 else new for old, new in zip(block.roots, current, strict=True)]

    def _precondition(self, roots: Sequence[Tensor], grad: Tensor) -> Tensor:
        """L^(-1/4) G R^(-1/4)."""
        for mode, root in enumerate(roots):
            if root.dim() == 2:
                grad = mode_product(grad, root, mode)
            else:
                grad = (grad.movedim(mode, -1) * root).movedim(-1, mode)
        return grad

    def _grafted_step(self, state: ShampooParameter, grad: Tensor, filtered: Tensor) -> Tensor:
        """The step of the grafted rule, whose length is used.

        Source: grafting, arXiv:2002.11803; in Shampoo, arXiv:2002.09018.
        """
        if self.graft is None or self.graft == "sgd":
            return filtered
        beta2 = self.graft_beta2
        v = state.graft.get("v", torch.zeros_like(grad))
        if self.graft == "adagrad":
            v = v + grad * grad
            step = filtered / (v.sqrt() + self.graft_eps)
        elif self.graft == "rmsprop":
            v = beta2 * v + (1 - beta2) * grad * grad
            step = filtered / (v.sqrt() + self.graft_eps)
        elif self.graft == "adam":
            v = beta2 * v + (1 - beta2) * grad * grad
            v_hat = v / (1 - beta2**state.t)
            step = filtered / (v_hat.sqrt() + self.graft_eps)
        else:
            raise ValueError(f"graft must be sgd, adagrad, rmsprop, adam or None, got {self.graft!r}")
        state.graft = {"v": v}
        return step


# ---------------------------------------------------------------------------------------------------------------------
# KL-Shampoo
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class KLShampooParameter:
    """Factors, and their eigendecompositions as last computed. `t` counts updates."""

    t: int = 0
    factors: list[Tensor] = field(default_factory=list)  # empty until seeded
    eigenvalues: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)


class ReferenceKLShampoo:
    """KL-Shampoo: each factor is estimated from gradients whitened by the other one, and the exponent is -1/2.

        L <- beta L + (1 - beta) G R^-1 G^T / n
        R <- beta R + (1 - beta) G^T L^-1 G / m
        W <- W - lr (L^-1/2 G R^-1/2 + lambda W)

    Choices where the source does not say:
        - The first non-zero gradient does not change the weights. It seeds multiples of the identity whose product is
          the mean of its squares, the nearest such multiples in KL divergence. Factors of a single gradient are
          singular.
        - A direction is at most as long as fresh factors allow: its mean square is at most 1/(beta (1 - beta)), with
          another beta for each further mode.
        - If a statistic would more than double a factor's trace, only the k-th root of that growth enters, with k
          modes: all factors share a sudden growth of the gradients.
        - Both factors use the other one from before this step. The current gradient enters the factors, then the
          eigendecompositions (if t is a multiple of `precondition_frequency` or not above it), then the direction.
        - The inverses in the statistics and the inverse square roots in the direction come from the same, last
          computed eigendecompositions, whose eigenvalues are raised to at least `eps_kl` times the largest.
        - For a tensor of any order, every other mode is whitened, and the statistic is divided by its size.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float = 1e-3,
        beta: float = 0.95,
        eps_kl: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int = 1,
    ) -> None:
        self.weights = float64_copies(weights)
        self.lr = lr
        self.beta = beta
        self.eps_kl = eps_kl
        self.weight_decay = weight_decay
        self.precondition_frequency = precondition_frequency
        self.state = [KLShampooParameter() for _ in self.weights]

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        """One step. A parameter whose gradient is None does not change.

        Source: arXiv:2509.03378.
        """
        lr = self.lr if lr is None else lr
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            grad = grad.detach().to(torch.float64)
            modes = range(grad.dim())

            if not state.factors:
                if grad.any():
                    scale = grad.square().mean() ** (1 / grad.dim())
                    state.factors = [scale * torch.eye(size, dtype=torch.float64) for size in grad.shape]
                    self._decompose(state)
                continue

            state.t += 1
            statistics = []
            for mode in modes:
                whitened = grad
                for other in modes:
                    if other != mode:
                        whitened = mode_product(whitened, self._power(state, other, -1.0), other)
                others = grad.numel() // grad.shape[mode]
                statistics.append(unfold(grad, mode) @ unfold(whitened, mode).T / others)
            for factor, statistic in zip(state.factors, statistics, strict=True):
                growth = (1 - self.beta) * statistic.trace() / factor.trace()
                leap = max(1.0, growth.item()) ** (1 / len(modes) - 1)
                factor.mul_(self.beta).add_(statistic, alpha=(1 - self.beta) * leap)
            if state.t <= self.precondition_frequency or state.t % self.precondition_frequency == 0:
                self._decompose(state)

            direction = grad
            for mode in modes:
                direction = mode_product(direction, self._power(state, mode, -0.5), mode)
            longest = (self.beta ** (grad.dim() - 1) * (1 - self.beta)) ** -0.5
            direction = direction * min(1.0, longest / direction.square().mean().sqrt().item())
            weight = self.weights[index]
            self.weights[index] = weight - lr * (direction + self.weight_decay * weight)

    def _decompose(self, state: KLShampooParameter) -> None:
        decompositions = [torch.linalg.eigh(factor) for factor in state.factors]
        state.bases = [eigenvectors for _, eigenvectors in decompositions]
        state.eigenvalues = [
            eigenvalues.clamp(min=max(self.eps_kl * eigenvalues.max().item(), TINY))
            for eigenvalues, _ in decompositions
        ]

    def _power(self, state: KLShampooParameter, mode: int, exponent: float) -> Tensor:
        basis = state.bases[mode]
        return basis @ torch.diag(state.eigenvalues[mode] ** exponent) @ basis.T


# ---------------------------------------------------------------------------------------------------------------------
# Shampoo with power 1/2 is Adafactor in the eigenbasis
# ---------------------------------------------------------------------------------------------------------------------


def idealized_shampoo(sample: Sequence[Tensor], grad: Tensor) -> Tensor:
    """L = E[GG^T], R = E[G^T G], H = L (x) R / trace(L); returns H^(-1/2) g = sqrt(trace(L)) L^(-1/2) G R^(-1/2).

    Args:
        sample: The gradients that the expectation runs over.
        grad: The gradient to precondition.

    Source: arXiv:2409.11321, Algorithm 1.
    """
    left = torch.stack([g @ g.T for g in sample]).mean(dim=0)
    right = torch.stack([g.T @ g for g in sample]).mean(dim=0)
    return left.trace().sqrt() * inverse_root(left, 2) @ grad @ inverse_root(right, 2)


def idealized_adafactor_in_eigenbasis(sample: Sequence[Tensor], grad: Tensor) -> Tensor:
    """Rotate into the eigenbases of E[GG^T] and E[G^T G], divide by Adafactor's sqrt(V), rotate back.

    A_i = E[sum_j G'_ij^2], C_j = E[sum_i G'_ij^2], V = A C^T / sum(A).

    Source: arXiv:2409.11321, Algorithm 2.
    """
    q_left = torch.linalg.eigh(torch.stack([g @ g.T for g in sample]).mean(dim=0)).eigenvectors
    q_right = torch.linalg.eigh(torch.stack([g.T @ g for g in sample]).mean(dim=0)).eigenvectors
    squares = torch.stack([(q_left.T @ g @ q_right) ** 2 for g in sample]).mean(dim=0)
    rows = squares.sum(dim=1)
    cols = squares.sum(dim=0)
    second_moment = torch.outer(rows, cols) / rows.sum()
    direction: Tensor = q_left @ ((q_left.T @ grad @ q_right) / second_moment.sqrt()) @ q_right.T
    return direction
