"""Pure element-wise pieces of the update rules, on batches of blocks (blocks, d_1, ..., d_k)."""

from __future__ import annotations

from torch import Tensor


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Updates both moments in place and returns M / (√V + ε), without bias correction.

    Args:
        grad: (blocks, d_1, ..., d_k), in the basis that the moments live in.
        exp_avg: First moment, same shape and dtype, changed in place.
        exp_avg_sq: Second moment, same shape and dtype, changed in place.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the root of the second moment as it is, before any bias correction.

    Returns:
        The direction, a new tensor.

    Source:
        Adam, arXiv:1412.6980, with the ε convention of SOAP's official implementation.
    """
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().add_(eps)
    return exp_avg.div(denominator)


def bias_correction(t: int, *, beta1: float, beta2: float) -> float:
    """Returns √(1-β₂ᵗ)/(1-β₁ᵗ), the factor on an uncorrected Adam direction at the 1-based update ``t``."""
    scale: float = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    return scale


def mars_correction(grad: Tensor, prev_grad: Tensor, *, beta1: float, gamma: float) -> Tensor:
    """Returns the variance-reduced gradient c = g + γ·β₁/(1-β₁)·(g - g'), before clipping.

    Args:
        grad: g, any shape.
        prev_grad: g', same shape: zero at a tensor's first step.
        beta1: Decay rate of the first moment that c will enter.
        gamma: Strength of the correction.

    Returns:
        c, a new tensor.

    Source:
        MARS, arXiv:2411.10438, equation 6.
    """
    return grad.lerp(prev_grad, -gamma * beta1 / (1 - beta1))
