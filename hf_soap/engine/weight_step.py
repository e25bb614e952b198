"""How a direction changes the weights of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_soap.linalg import elementwise, norms


@dataclass(frozen=True)
class WeightStep:
    """How a direction u changes the weights W of a tensor.

    Attributes:
        decay_last: Decay the weights after the update, as SOAP's implementation does; else both at once.
        cautious: Decay only the entries of W that u does not enlarge, from the weights before the update.
        norm: ``"relative"`` takes a step of the length lr·‖W‖_F; ``"hyperball"`` then scales the weights back to
            ‖W‖_F, and does not decay them.
        stacked: Whether the tensor is a stack of matrices along its first dimension, each with its own norm.
        summed: Whether several ranks have parts of the tensor, and must sum what they know of its norms.

    Source:
        Cautious weight decay, arXiv:2510.12402; hyperball, arXiv:2606.16899.
    """

    decay_last: bool = False
    cautious: bool = False
    norm: Literal["relative", "hyperball"] | None = None
    stacked: bool = False
    summed: bool = False

    @property
    def is_relative(self) -> bool:
        """Whether the step depends on the norm of the weights."""
        return self.norm is not None

    @property
    def fuses(self) -> bool:
        """Whether it is the step that fused kernels take."""
        return not (self.decay_last or self.cautious or self.is_relative)

    def matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views what has a norm of its own, in order."""
        return [matrix for tensor in tensors for matrix in (tensor.unbind() if self.stacked else (tensor,))]

    def inner_products(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
        """Returns :func:`hf_soap.linalg.norms.inner_products` of the matrices of each tensor, (matrices, 3) each."""
        exact = [weight.to(direction.dtype) for weight, direction in zip(weights, directions, strict=True)]
        products = norms.inner_products(self.matrices(exact), self.matrices(directions))
        return list(products.split([len(self.matrices([weight])) for weight in weights]))

    def apply_(
        self,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor],
        rates: Sequence[elementwise.Rate],
        *,
        products: list[Tensor] | None = None,
    ) -> None:
        """Takes the step, rounding low-precision weights once.

        Args:
            weights: Changed in place.
            directions: Of the same shapes, used up.
            rates: Learning rate and decay of each.
            products: The inner products of each whole tensor, if these are parts.
        """
        exact = [weight.to(direction.dtype) for weight, direction in zip(weights, directions, strict=True)]
        for run, rate in elementwise.equal_rates(rates):
            if self.is_relative:
                known = self.inner_products(exact[run], directions[run]) if products is None else products[run]
                self._relative_step_(exact[run], directions[run], rate, known)
            else:
                self._step_(exact[run], directions[run], rate)
        for weight, value in zip(weights, exact, strict=True):
            if weight is not value:
                weight.copy_(value)

    def _relative_step_(
        self,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor],
        rate: elementwise.Rate,
        products: list[Tensor],
    ) -> None:
        lr, weight_decay = rate
        scales, grown = norms.relative_scales(torch.cat(products), lr)
        torch._foreach_mul_(self.matrices(directions), list(scales.unbind()))
        self._step_(weights, directions, (lr, 0.0 if self.norm == "hyperball" else weight_decay))
        if self.norm == "hyperball":
            torch._foreach_div_(self.matrices(weights), list(grown.unbind()))

    def _step_(self, weights: Sequence[Tensor], directions: Sequence[Tensor], rate: elementwise.Rate) -> None:
        lr, weight_decay = rate
        if self.cautious and weight_decay:
            elementwise.decay_cautiously_(weights, directions, lr=lr, weight_decay=weight_decay)
            weight_decay = 0.0
        elementwise.take_step_(weights, directions, lr=lr, weight_decay=weight_decay, decay_last=self.decay_last)
