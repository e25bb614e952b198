"""Steps in proportion to the norm of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soap.linalg import elementwise


def inner_products(weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Returns ‖W‖², ‖u‖² and ⟨W, u⟩ of each pair, (pairs, 3), float64. Those of parts add up to those of the whole.

    Args:
        weights: W, any shapes, of one dtype and on one device.
        directions: u, alike.
    """
    if not weights:
        return torch.zeros(0, 3, dtype=torch.float64)
    squares = [
        torch.stack(elementwise.norms(each, each[0].dtype)).double().square_() for each in (weights, directions)
    ]
    mixed = [(weight * direction).sum() for weight, direction in zip(weights, directions, strict=True)]
    return torch.stack([*squares, torch.stack(mixed).double()], dim=1)


def relative_scales(products: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """Returns by what a step of the length lr·‖W‖ scales the direction, and the norm of the weights.

    Args:
        products: As returned by :func:`inner_products`, (matrices, 3).
        lr: η, a number or a tensor of one element.

    Returns:
        ‖W‖/‖u‖ and ‖W − η·‖W‖·u/‖u‖‖/‖W‖, (matrices,) each; 0 and 1 if u is zero.
    """
    weight, direction, mixed = products.unbind(1)
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(products.device, products.dtype)
    moves, tiny = direction > 0, torch.finfo(products.dtype).tiny
    cosine = mixed / (weight * direction).sqrt().clamp_(min=tiny)
    grown = (1 - 2 * lr * cosine + lr**2).clamp_(min=tiny).sqrt_()
    return torch.where(moves, (weight / direction).sqrt_(), 0.0), torch.where(moves, grown, 1.0)
