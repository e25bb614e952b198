"""Rules that treat every entry alone: AdamW and Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_soap.blocks import Chunk, Layout
from hf_soap.rules.base import MOMENTS, State, zeros


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with ε beside the debiased root of the second moment, from the first gradient on.

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to √(V / (1-β₂ᵗ)).

    Source:
        Adam, arXiv:1412.6980, algorithm 1; the decay of the weights is the step loop's, arXiv:1711.05101.
    """

    beta1: float
    beta2: float
    eps: float

    seeds: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns zero moments."""
        return zeros(layout, tensors, MOMENTS, dtype=dtype, device=device)

    def describe(self, layout: Layout) -> str:
        """Returns AdamW."""
        return "AdamW"

    def seed(self, grad: Tensor, state: State, chunk: Chunk) -> None:
        """Absorbs nothing: Adam's first gradient is a gradient like the others."""

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Returns M̂ / (√V̂ + ε)."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        debias1 = chunk.per_block([1 - self.beta1**t for t in chunk.t], grad)
        debias2 = chunk.per_block([(1 - self.beta2**t) ** 0.5 for t in chunk.t], grad)
        denominator = exp_avg_sq.sqrt().div_(debias2).add_(self.eps).mul_(debias1)
        return exp_avg / denominator


@dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of the first moment.

    Attributes:
        beta1: Decay rate of the first moment.

    Source:
        MARS-Lion, arXiv:2411.10438, section 3.2: Lion with one moment, since the correction stands in for the second
        interpolation of arXiv:2302.06675.
    """

    beta1: float

    seeds: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns a zero first moment."""
        return zeros(layout, tensors, ("exp_avg",), dtype=dtype, device=device)

    def describe(self, layout: Layout) -> str:
        """Returns Lion."""
        return "Lion"

    def seed(self, grad: Tensor, state: State, chunk: Chunk) -> None:
        """Absorbs nothing: the first gradient is a gradient like the others."""

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Returns sign(M)."""
        return state["exp_avg"].lerp_(grad, 1 - self.beta1).sign()
