"""Textbook changes of the weights in float64: weight decay for some entries, and steps in proportion to the norm.

Sources:
    Cautious weight decay: Chen et al., arXiv:2510.12402.
    Hyperball: arXiv:2606.16899.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step(
    weight: Tensor,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    cautious: bool = False,
    decay_last: bool = False,
    norm: str | None = None,
) -> Tensor:
    """The weights of one matrix or vector after a step against `direction`."""
    weight, direction = weight.to(torch.float64), direction.to(torch.float64)
    radius, length = frobenius(weight), frobenius(direction)
    if norm is not None:
        direction = radius * direction / length if length > 0 else direction
    if norm == "hyperball":
        moved = weight - lr * direction
        return radius * moved / frobenius(moved)
    if cautious:
        decayed = torch.zeros_like(weight)
        for entry in range(weight.numel()):
            if direction.view(-1)[entry] * weight.view(-1)[entry] >= 0:
                decayed.view(-1)[entry] = weight.view(-1)[entry]
        return weight - lr * weight_decay * decayed - lr * direction
    if decay_last:
        return (1 - lr * weight_decay) * (weight - lr * direction)
    return (1 - lr * weight_decay) * weight - lr * direction


def frobenius(matrix: Tensor) -> float:
    return math.sqrt(math.fsum(entry * entry for entry in matrix.flatten().tolist()))
