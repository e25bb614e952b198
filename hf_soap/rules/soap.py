"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_soap import linalg, updates
from hf_soap.blocks import Chunk, Layout
from hf_soap.rules.base import MOMENTS, State, zeros

ORTHONORMALIZE_EVERY = 100
"""Refreshes between two corrections of a basis: 5,000 float32 refreshes leave it 1.7e-5 off orthonormality."""


@dataclass(frozen=True, kw_only=True)
class Soap:
    """Adam in the eigenbasis of Shampoo's factors; with no factored side, Adam.

    The factors are kept in their own eigenbasis, L̂ = Qᵀ L Q. That is the same method, cheaper: they accumulate from
    the projected gradient that the step has anyway, a refresh decomposes a nearly diagonal matrix, and the
    eigenvalues can be read off the diagonal.

    Attributes:
        beta1: Decay rate of the first moment, which lives in the rotated space.
        beta2: Decay rate of the second moment.
        shampoo_beta: Decay rate of the factors.
        eps: Added to √V.
        precondition_frequency: Updates between two refreshes of a basis.
        normalize_grads: Divide the direction of each tensor by its root mean square.
        correct_bias: Multiply the direction by √(1-β₂ᵗ)/(1-β₁ᵗ).
        stagger: Shift the refreshes of tensor i by i updates, so that they do not all fall on the same step.

    Source:
        SOAP, arXiv:2409.11321, algorithm 3, with the conventions of its official implementation.
    """

    beta1: float
    beta2: float
    shampoo_beta: float
    eps: float
    precondition_frequency: int
    normalize_grads: bool = False
    correct_bias: bool = True
    stagger: bool = False

    seeds: ClassVar[bool] = True

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns zero moments and factors, and bases to be filled by :meth:`seed`."""
        blocks = tensors * layout.blocks
        state = zeros(layout, tensors, MOMENTS, dtype=dtype, device=device)
        for side in layout.sides:
            n = layout.block[side]
            state[f"factor_{side}"] = torch.zeros(blocks, n, n, dtype=dtype, device=device)
            state[f"basis_{side}"] = torch.zeros(blocks, n, n, dtype=dtype, device=device)
        return state

    def describe(self, layout: Layout) -> str:
        """Returns SOAP with its number of factored sides, or Adam."""
        sides = len(layout.sides)
        return f"SOAP, {sides} side{'s' if sides > 1 else ''}" if sides else "Adam"

    def seed(self, grad: Tensor, state: State, chunk: Chunk) -> None:
        """Sets factors and bases from the first gradient; no gradient shapes the basis it is rotated into."""
        for side in chunk.layout.sides:
            factor = state[f"factor_{side}"]
            linalg.add_gram_(factor, grad, side, beta=0.0, alpha=1 - self.shampoo_beta)
            values, basis = linalg.eigenbasis(factor)
            state[f"basis_{side}"].copy_(basis)
            factor.copy_(torch.diag_embed(values))

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Rotates, takes the Adam direction, rotates back; then accumulates, and refreshes the bases that are due."""
        sides = chunk.layout.sides
        for side in sides:
            grad = linalg.mode_product(grad, state[f"basis_{side}"], side)
        direction = updates.adam_direction(
            grad, state["exp_avg"], state["exp_avg_sq"], beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )
        for side in sides:
            direction = linalg.mode_product(direction, state[f"basis_{side}"].mT, side)
        if self.normalize_grads:
            square_sum = chunk.tensor_square_sum(chunk.layout.trim(direction))
            direction.div_(square_sum.div_(chunk.layout.numel).sqrt_().add_(1e-30))
        if self.correct_bias:
            scales = [updates.bias_correction(t, beta1=self.beta1, beta2=self.beta2) for t in chunk.t]
            direction.mul_(chunk.per_block(scales, direction))

        # Accumulate after use: a gradient must not shape the basis it is rotated into.
        for side in sides:
            beta = self.shampoo_beta
            linalg.add_gram_(state[f"factor_{side}"], grad, side, beta=beta, alpha=1 - beta)
        if sides:
            for blocks, due in chunk.runs(self._due(chunk)):
                self._refresh({role: value[blocks] for role, value in state.items()}, due)
        return direction

    def _due(self, chunk: Chunk) -> list[bool]:
        return [self._age(t, i) % self.precondition_frequency == 0 for t, i in zip(chunk.t, chunk.index, strict=True)]

    def _age(self, t: int, index: int) -> int:
        return t + index if self.stagger else t

    def _refresh(self, state: State, chunk: Chunk) -> None:
        refreshes = [self._age(t, i) // self.precondition_frequency for t, i in zip(chunk.t, chunk.index, strict=True)]
        for side in chunk.layout.sides:
            factor, basis = state[f"factor_{side}"], state[f"basis_{side}"]
            order = factor.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
            rows = torch.take_along_dim(factor, order.unsqueeze(-1), -2)
            rotation, refreshed = linalg.refresh(torch.take_along_dim(rows, order.unsqueeze(-2), -1))
            factor.copy_(refreshed)
            # Rows of the rotation go back to where the columns came from: the sort costs Q and M no pass of their own.
            rotation = torch.empty_like(rotation).scatter_(-2, order.unsqueeze(-1).expand_as(rotation), rotation)
            basis.copy_(basis @ rotation)
            state["exp_avg"].copy_(linalg.mode_product(state["exp_avg"], rotation, side))
            # The second moments belong to columns: unless they are permuted with them, the sort scrambles them.
            along = order.view(order.shape[0], *[-1 if mode == side else 1 for mode in range(len(chunk.layout.block))])
            state["exp_avg_sq"].copy_(torch.take_along_dim(state["exp_avg_sq"], along, side + 1))
            for blocks, _ in chunk.runs(n % ORTHONORMALIZE_EVERY == 0 for n in refreshes):
                basis[blocks].copy_(linalg.orthonormalize(basis[blocks]))
