"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor

from hf_soap.linalg import decompositions, eigenbases, elementwise, matrices
from hf_soap.linalg.precision import allows_bfloat16, float32_products
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment, square, vector
from hf_soap.rules.context import StepContext, adjacent
from hf_soap.rules.layout import Layout
from hf_soap.rules.schedule import Schedule

ORTHONORMALIZE_EVERY = 50
"""Refreshes between two corrections of a basis. In float32 each refresh adds about 1e-7 to QᵀQ - I."""

KL_FLOOR = 1e-8
"""The KL correction divides by eigenvalues. Those below this share of the largest are raised to it."""


V_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")
"""Roles of the row and column means that may replace V."""


@dataclass(frozen=True, kw_only=True)
class SoapRule(Rule):
    """Runs Adam on the gradient rotated into the eigenbases of its factors. Without a factored side it is Adam.

    The factors are kept in their own eigenbasis, L̂ = Qᵀ L Q. The result is the same, at a lower cost: factors
    accumulate the rotated gradient, which a step has anyway; a refresh decomposes a nearly diagonal matrix; the
    eigenvalues are on the diagonal.

    Attributes:
        beta1: Decay rate of the first moment, which is kept in the rotated space.
        beta2: Decay rate of the second moment.
        shampoo_beta: Decay rate of the factors.
        eps: Added to √V.
        precondition_frequency: Updates between two refreshes of a basis.
        normalize_grads: Divide the direction of each tensor by its root mean square.
        correct_bias: Multiply the direction by √(1-β₂ᵗ)/(1-β₁ᵗ).
        stagger: Shift the refreshes of tensor i by i updates, so that they do not all fall on the same step.
        refresh_growth: Share of the updates so far after which the next refresh comes, if that is earlier; 0 is off.
        factorized: Keep V of a factored matrix as the product of row and column means.
        kl: Whiten the gradient by the other factors before it enters a factor.
        include_current: Factor and basis include the current gradient before it is rotated, not only afterwards.
        refresh_tol: Skip the refresh of a basis while ‖L̂ - diag L̂‖ ≤ refresh_tol·‖L̂‖.
        orthonormalize_every: Refreshes between two corrections of a basis.
        rotate_second_moment: At a refresh by the rotation R, set V ← (R∘R)ᵀV along the side; otherwise permute V.
        matmul_dtype: Arithmetic of the rotations of gradient and direction. All other products are exact.
            ``"bfloat16"`` is float32 where :func:`~hf_soap.linalg.precision.allows_bfloat16` is false.

    Source:
        SOAP, arXiv:2409.11321, algorithm 3, with the conventions of its official implementation; factorized V there
        and in Adafactor, arXiv:1804.04235; KL, arXiv:2509.03378; refresh_tol, arXiv:2506.03595.
    """

    roles = ("exp_avg", "exp_avg_sq", "factor", "basis", *V_FACTORS)

    beta1: float
    beta2: float
    shampoo_beta: float
    eps: float
    precondition_frequency: int
    normalize_grads: bool = False
    correct_bias: bool = True
    stagger: bool = False
    refresh_growth: float = 0.0
    factorized: bool = False
    kl: bool = False
    include_current: bool = False
    refresh_tol: float = 0.0
    orthonormalize_every: int = ORTHONORMALIZE_EVERY
    rotate_second_moment: bool = False
    matmul_dtype: Literal["float32", "tf32", "bfloat16"] = "float32"

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares both moments, and a factor and a basis for each side; V may be kept as row and column means."""
        specs = {"exp_avg": moment(layout)}
        if self.factorizes(layout):
            specs |= {role: vector(layout, mode, is_mean=True) for mode, role in enumerate(V_FACTORS)}
        else:
            specs["exp_avg_sq"] = moment(layout)
        for side in layout.sides:
            specs[f"factor_{side}"] = square("factor", layout, side, is_mean=self.kl, in_own_basis=True)
            specs[f"basis_{side}"] = square("basis", layout, side)
        return specs

    def traits(self, layout: Layout) -> Traits:
        """The first gradient only seeds the bases, and a refresh comes last."""
        return Traits(
            first_grad_seeds=True,
            skips_leading_zero_grads=True,
            # With include_current, it comes before the rotation of the gradient.
            refreshes_last=not self.include_current,
            is_elementwise=not layout.sides and not self.normalize_grads,
        )

    def factorizes(self, layout: Layout) -> bool:
        """Whether V is kept as a product, which only matrices with a factored side allow."""
        return self.factorized and len(layout.block) == 2 and bool(layout.sides)

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """Rotates momentum and factors back. The second moment cannot be rotated: each block's mean is kept."""
        restated, exp_avg = dict(state), state["exp_avg"]
        for side in layout.sides:
            basis = state[f"basis_{side}"]
            restated[f"factor_{side}"] = basis @ state[f"factor_{side}"] @ basis.mT
            exp_avg = matrices.mode_product(exp_avg, basis.mT, side)
        mean = state["exp_avg_sq"].flatten(1) if "exp_avg_sq" in state else state[V_FACTORS[0]]
        mean = mean.mean(1, keepdim=True)
        if layout.sides:
            restated["exp_avg_sq"] = mean.view(-1, *(1 for _ in layout.block)).expand_as(exp_avg).clone()
            for role, size in zip(V_FACTORS, layout.block, strict=False):
                restated[role] = mean.repeat(1, size)
        elif len(layout.block) == 2:  # with factors, V may be kept as a product
            restated |= {role: state["exp_avg_sq"].mean(2 - axis) for axis, role in enumerate(V_FACTORS)}
        return {**restated, "exp_avg": exp_avg}

    def rebuild(self, state: State, context: StepContext) -> None:
        """Computes the bases, rotates the momentum, and distributes V in proportion to the eigenvalues.

        Source:
            In the eigenbasis V is close to a product of eigenvalues: arXiv:2409.11321, claim 1.
        """
        if context.layout.sides and "exp_avg_sq" in state:
            # Places in the tensor have no meaning in the eigenbasis, so each block keeps its mean.
            exp_avg_sq = state["exp_avg_sq"]
            entries = context.layout.entries().repeat(len(exp_avg_sq) // context.layout.blocks).to(exp_avg_sq)
            mean = exp_avg_sq.flatten(1).sum(1) / entries.clamp_(min=1)
            exp_avg_sq.copy_(mean.view(-1, *[1] * (exp_avg_sq.dim() - 1)).expand_as(exp_avg_sq))
        for side in context.layout.sides:
            factor, exp_avg = state[f"factor_{side}"], state["exp_avg"]
            basis = self._diagonalize_(factor, context)
            values = factor.diagonal(dim1=-2, dim2=-1)
            state[f"basis_{side}"].copy_(basis)
            exp_avg.copy_(matrices.mode_product(exp_avg, basis, side))
            values = values.clamp(min=0)
            share = values / values.mean(-1, keepdim=True).clamp_(min=torch.finfo(values.dtype).tiny)
            if "exp_avg_sq" in state:
                state["exp_avg_sq"].mul_(elementwise.along(share, side, exp_avg.dim()))
            else:
                state[V_FACTORS[side]].mul_(share)

    def describe(self, layout: Layout) -> str:
        """Returns SOAP with its number of factored sides, or Adam."""
        sides = len(layout.sides)
        name = "KL-SOAP" if self.kl else "SOAP"
        return f"{name}, {sides} side{'s' if sides > 1 else ''}" if sides else "Adam"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Per side: two rotations and a Gram matrix; per refresh: QR, two products and rotations of moments."""
        numel, sides = math.prod(layout.block), [layout.block[side] for side in layout.sides]
        step = 0.0 if refreshes_only else sum(6.0 * numel * n for n in sides)
        moments = 1 + (self.rotate_second_moment and not self.factorizes(layout))
        refresh = sum((8 / 3 + 2 + 2) * n**3 + 2 * moments * numel * n for n in sides)
        return layout.blocks * (step + refresh / self.precondition_frequency)

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Computes factors and bases from the first gradient."""
        if self.kl:
            self._accumulate(grad, state, context.layout)
        for side in context.layout.sides:
            factor = state[f"factor_{side}"]
            if not self.kl:
                matrices.add_gram_(factor, grad, side, beta=0.0, alpha=1 - self.shampoo_beta)
            state[f"basis_{side}"].copy_(self._diagonalize_(factor, context))

    def _start_kl(self, grad: Tensor, state: State, layout: Layout) -> None:
        """Starts factors of zero as equal multiples of the identity, whose product is the mean square of the gradient.

        A factor of the first gradient alone would be singular, and what its inverse does to the second gradient would
        outweigh hundreds of later ones. A block starts at its own first gradient, which for an expert may come late.
        """
        if not layout.sides:
            return
        is_zero = state[f"factor_{layout.sides[0]}"].diagonal(dim1=-2, dim2=-1).sum(-1) == 0
        rms = torch.linalg.vector_norm(grad.flatten(1), dim=1).div_(grad[0].numel() ** 0.5)
        start = rms.pow_(2 / len(layout.sides)).mul_(is_zero).unsqueeze(-1)
        for side in layout.sides:
            state[f"factor_{side}"].diagonal(dim1=-2, dim2=-1).add_(start)

    @staticmethod
    def _diagonalize_(factor: Tensor, context: StepContext) -> Tensor:
        """Brings factors into their eigenbases and returns the bases; the identity where the decomposition failed."""
        values, basis = context.decompose(decompositions.eigenbasis, factor)
        finite = context.finite_mask(values, basis)
        factor.copy_(torch.where(finite, torch.diag_embed(values), factor))
        return torch.where(finite, basis, matrices.eye_like(basis))

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Rotates, takes the Adam direction and rotates back. Then accumulates, and refreshes if due."""
        own = self._bases(state, context.layout)
        rotated = self._rotate(grad, own, context.layout)
        if self.include_current:
            self._accumulate(rotated, state, context.layout)
            self.refresh(state, context)
            own = self._bases(state, context.layout)
            for blocks, _ in context.subbatches(self.due(context)):
                rotated[blocks] = self._rotate(grad[blocks], _part(own, blocks), context.layout)

        direction = self._adam_direction(rotated, state, context.layout)
        direction = self._rotate(direction, own, context.layout, back=True)
        del own  # frees rounded copies before a refresh
        if self.normalize_grads:
            square_sum = context.matrix_square_sum(context.layout.trim(direction))
            rms = square_sum.div_(context.layout.matrix_numel).sqrt_().add_(1e-30)
            # Squares of smaller values vanish, which turned a direction of 1e-22 into one of 1e8.
            direction.div_(rms.clamp_(min=torch.finfo(rms.dtype).tiny ** 0.5))
        if self.correct_bias:
            direction.mul_(context.per_block(lambda t: (1 - self.beta2**t) ** 0.5 / (1 - self.beta1**t), direction))

        if not self.include_current:
            # Accumulate after use: a gradient must not shape the basis it is rotated into.
            self._accumulate(rotated, state, context.layout)
            if not context.later:
                self.refresh(state, context)
        return direction

    @cached_property
    def schedule(self) -> Schedule:
        """When bases are refreshed."""
        return Schedule(self.precondition_frequency, self.stagger, self.refresh_growth)

    def due(self, context: StepContext) -> list[bool]:
        """As the schedule says, for each tensor with a factored side."""
        numbers = self.schedule.numbers(context)
        return [bool(context.layout.sides) and number is not None for number in numbers]

    def refresh(self, state: State, context: StepContext) -> None:
        """Refreshes the bases that are due, and rotates factors and moments with them."""
        for blocks, due in context.subbatches(self.due(context)):
            with context.metrics.refreshing(state["exp_avg"].device):
                self._refresh(_part(state, blocks), due)

    def _bases(self, state: State, layout: Layout) -> dict[int, Tensor]:
        """Returns the bases by side, in the dtype of a step's rotations."""
        own = {side: state[f"basis_{side}"] for side in layout.sides}
        if self.matmul_dtype != "bfloat16" or not own or not allows_bfloat16(state["exp_avg"].device):
            return own
        return {side: basis.bfloat16() for side, basis in own.items()}

    def _rotate(self, tensor: Tensor, own: Mapping[int, Tensor], layout: Layout, *, back: bool = False) -> Tensor:
        """Rotates into the eigenbases, or back."""
        reduced = self.matmul_dtype == "tf32" and bool(own)
        arithmetic = float32_products(layout.block, tensor.device, reduced=True) if reduced else nullcontext()
        rotated = tensor
        with arithmetic:
            for side, basis in own.items():
                rotated = matrices.mode_product(rotated.to(basis.dtype), basis.mT if back else basis, side)
        return rotated.to(tensor.dtype)

    def _adam_direction(self, rotated: Tensor, state: State, layout: Layout) -> Tensor:
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        if self.factorizes(layout):
            row, column = (state[role] for role in V_FACTORS)
            return elementwise.factorized_adam_direction(rotated, state["exp_avg"], row, column, eps=self.eps, **betas)
        # Without factors, a tensor may be cut differently on other numbers of ranks, and the result must be the same.
        fuses = layout.sides and elementwise.fuses_evenly(layout.block, rotated.device)
        adam_direction = elementwise.fused_adam_direction if fuses else elementwise.adam_direction
        return adam_direction(rotated, state["exp_avg"], state["exp_avg_sq"], eps=self.eps, **betas)

    def _accumulate(self, rotated: Tensor, state: State, layout: Layout) -> None:
        beta = self.shampoo_beta
        if self.kl:
            self._start_kl(rotated, state, layout)
        scales = {side: self._inverse_root_eigenvalues(state[f"factor_{side}"]) for side in layout.sides if self.kl}
        for side in layout.sides:
            factor, whitened, alpha = state[f"factor_{side}"], rotated, 1 - beta
            if self.kl:
                alpha /= rotated[0].numel() // layout.block[side]
                for other, scale in scales.items():
                    if other != side:
                        whitened = elementwise.squarable(whitened * elementwise.along(scale, other, rotated.dim()))
                whitened = elementwise.without_overshoot(whitened, factor, alpha, len(scales))
            matrices.add_gram_(factor, whitened, side, beta=beta, alpha=alpha)

    def _inverse_root_eigenvalues(self, factor: Tensor) -> Tensor:
        values = factor.diagonal(dim1=-2, dim2=-1)
        floor = values.amax(-1, keepdim=True).mul(KL_FLOOR).clamp_(min=torch.finfo(values.dtype).tiny)
        return values.maximum(floor).rsqrt()

    def _refresh(self, state: State, context: StepContext) -> None:
        refreshes = self.schedule.numbers(context)
        for side in context.layout.sides:
            if self.refresh_tol:
                stale = eigenbases.off_diagonal_share(state[f"factor_{side}"]) > self.refresh_tol
                for first, last in adjacent(stale.tolist()):
                    self._refresh_side(_part(state, slice(first, last)), side, context)
            else:
                self._refresh_side(state, side, context)
            basis = state[f"basis_{side}"]
            for blocks, _ in context.subbatches(
                n is not None and n % self.orthonormalize_every == 0 for n in refreshes
            ):
                basis[blocks].copy_(eigenbases.orthonormalize(basis[blocks]))

    def _refresh_side(self, state: State, side: int, context: StepContext) -> None:
        factor, basis, exp_avg = state[f"factor_{side}"], state[f"basis_{side}"], state["exp_avg"]
        order, rotation, refreshed = context.decompose(eigenbases.sorted_refresh, factor)
        finite, unmoved = context.finite_mask(rotation, refreshed), torch.arange(order.shape[-1], device=order.device)
        order = torch.where(finite.squeeze(-1), order, unmoved)
        rotation = rotation.masked_fill_(~finite, 0)
        rotation.diagonal(dim1=-2, dim2=-1).add_(~finite.squeeze(-1))  # where it failed, the identity
        torch.where(finite, refreshed, factor, out=factor)
        context.metrics.rotated(rotation, factor)
        # Undo the sort in the rows of the rotation, so that Q and M need not be sorted in a separate pass.
        rotation = matrices.permute(rotation, order.argsort(), 0)
        basis.copy_(basis @ rotation)
        exp_avg.copy_(matrices.mode_product(exp_avg, rotation, side))
        # The second moments belong to the columns: they are mixed as the columns are, or permuted with them.
        second, mode = (state["exp_avg_sq"], side) if "exp_avg_sq" in state else (state[V_FACTORS[side]], 0)
        if self.rotate_second_moment:
            second.copy_(_mixed(second, rotation, mode))
        else:
            second.copy_(matrices.permute(second, order, mode))


Key = TypeVar("Key", str, int)


def _mixed(second: Tensor, rotation: Tensor, mode: int) -> Tensor:
    """Returns (R∘R)ᵀV along a mode, where V is a second moment or the means along that mode."""
    squares = rotation.square()
    if second.dim() == 2:  # a batched product with a vector sums in another order than a single one
        return (squares * second.unsqueeze(-1)).sum(1)
    return matrices.mode_product(second, squares, mode)


def _part(tensors: Mapping[Key, Tensor], blocks: slice) -> dict[Key, Tensor]:
    return {key: value[blocks] for key, value in tensors.items()}
