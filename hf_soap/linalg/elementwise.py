"""Pure element-wise pieces of the update rules, on batches of blocks (blocks, d_1, ..., d_k)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from hf_soap.linalg import processor

logger = logging.getLogger(__name__)


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
        eps: Added to the root of the second moment before any bias correction.

    Returns:
        The direction, a new tensor.

    Source:
        Adam, arXiv:1412.6980, with the ε convention of SOAP's official implementation.
    """
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().add_(eps)
    return torch.div(exp_avg, denominator, out=denominator)


def fused_adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Computes :func:`adam_direction` in one pass of torch's fused kernel instead of six passes.

    On a CPU, the kernel rounds the entries after the last full vector of 64 bytes differently. Blocks must have no
    such entries (see :func:`fuses_evenly`); otherwise the result depends on where in the batch a block lies.
    """
    # A step from zero weights at a learning rate of -1, so late that the bias corrections are 1.
    direction = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    torch._fused_adamw_(
        [direction],
        [grad.contiguous()],
        [exp_avg],
        [exp_avg_sq],
        [],
        [_very_late(grad.device)],
        amsgrad=False,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    changed_by_kernel((exp_avg, exp_avg_sq))
    return direction


@cache
def fuses_evenly(block: tuple[int, ...], device: torch.device) -> bool:
    """Whether :func:`fused_adam_direction` rounds all entries of blocks of this shape alike."""
    evenly = device.type != "cpu" or math.prod(block) % LANES == 0
    kernel = "the fused kernel" if evenly else "six passes"
    logger.debug("Adam on rotated blocks of %s by %s: %s", block, kernel, processor.instructions(device))
    return evenly


LANES = 16
"""Number of float32 entries in a CPU's longest vector, that of AVX512. Those of other processors divide it."""


def changed_by_kernel(tensors: Sequence[Tensor]) -> None:
    """Increments the versions of tensors, which autograd reads. Torch's fused Adam does not increment them."""
    torch.autograd.graph.increment_version(tensors)


@lru_cache(maxsize=64)
def step_count(number: float, device: torch.device) -> Tensor:
    """Returns a number of updates in the form that torch's fused kernels take. Most tensors of a model share one."""
    return torch.full((), float(number), dtype=torch.float32, device=device)


@cache
def _very_late(device: torch.device) -> Tensor:
    """Returns a step count so late that the bias corrections are 1."""
    return torch.full((), math.inf, dtype=torch.float32, device=device)


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


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the Euclidean norm of each tensor, computed in ``dtype``.

    On a CPU, torch computes the norm of a whole tensor in one thread. The norms of its rows keep all threads busy.
    """
    return list(torch._foreach_norm([_rows(tensor, dtype) for tensor in tensors], 2, dtype))


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.numel() < THREADED or tensor.device.type != "cpu":
        return tensor
    if tensor.is_contiguous() and tensor.numel() % ROW == 0:
        tensor = tensor.view(-1, ROW)
    rows: Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype) if tensor.dim() > 1 else tensor
    return rows


THREADED = 2**16
"""Number of entries from which more threads are worth their start-up time."""

ROW = 2048
"""Length of the rows whose norms are taken, if the tensor is contiguous. Shorter rows cost a fifth more."""


def factorized_adam_direction(
    grad: Tensor, exp_avg: Tensor, row: Tensor, column: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """As :func:`adam_direction`, with V of a matrix kept as V_ij = r_i c_j / mean(r).

    Args:
        grad: (blocks, m, n).
        exp_avg: First moment, (blocks, m, n), changed in place.
        row: r, moving average of the mean squares of the rows, (blocks, m), changed in place.
        column: c, the same for the columns, (blocks, n), changed in place.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to √V.

    Returns:
        The direction, a new tensor.

    Source:
        Adafactor, arXiv:1804.04235, algorithm 1, as SOAP's paper uses it, arXiv:2409.11321, section 7.
    """
    exp_avg.lerp_(grad, 1 - beta1)
    square = grad.square()
    row.lerp_(square.mean(2), 1 - beta2)
    column.lerp_(square.mean(1), 1 - beta2)
    scale = row.mean(1, keepdim=True).clamp_(min=torch.finfo(row.dtype).tiny)
    denominator = torch.mul(row.div(scale).unsqueeze(2), column.unsqueeze(1), out=square).sqrt_().add_(eps)
    return torch.div(exp_avg, denominator, out=denominator)


def squarable(tensor: Tensor) -> Tensor:
    """Clamps entries in place so that sums of their squares are finite, even if gradients grow by 10^15 at once."""
    bound = torch.finfo(tensor.dtype).max ** 0.4
    return tensor.clamp_(-bound, bound)


def without_overshoot(whitened: Tensor, factor: Tensor, weight: float, sides: int) -> Tensor:
    """Shortens a whitened gradient that would more than double its factor.

    With KL, factors are whitened by the old values of the others. If gradients suddenly grow a thousandfold, each
    factor would grow by the square of that, and the product of the factors by a higher power, which decays slowly.
    Therefore only a root of the growth enters each factor.

    Args:
        whitened: The gradient, whitened along the other sides, (blocks, d_1, ..., d_k).
        factor: Its factor before it is added, (blocks, n, n).
        weight: Weight of its Gram matrix.
        sides: Number of sides with a factor.
    """
    if sides == 1:  # the exponent would be 0
        return whitened
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_(min=torch.finfo(factor.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(whitened.flatten(1), dim=1)
    growth = norm.square_().mul_(weight) / trace
    scale = growth.clamp_(min=1.0) ** ((1 / sides - 1) / 2)
    return whitened * scale.view(-1, *[1] * (whitened.dim() - 1))


def along(values: Tensor, mode: int, dim: int) -> Tensor:
    """Reshapes (blocks, d_mode) to broadcast along mode ``mode`` of a tensor with ``dim`` dimensions in all."""
    return values.view(values.shape[0], *[values.shape[1] if i == mode + 1 else 1 for i in range(1, dim)])


def graft_denominator(
    kind: str, exp_avg_sq: Tensor, grad: Tensor, *, beta2: float, eps: float, debias: float | Tensor
) -> Tensor:
    """Updates a second moment in place and returns the denominator of the grafted rule.

    Args:
        kind: ``"adagrad"`` (sum of squares), ``"rmsprop"`` (moving average) or ``"adam"`` (debiased moving average).
        exp_avg_sq: Second moment, shape of ``grad``, changed in place.
        grad: The raw gradient.
        beta2: Decay rate of the moving average.
        eps: Added to the root.
        debias: √(1-β₂ᵗ), for Adam.

    Returns:
        The denominator, a new tensor.

    Source:
        Grafting, arXiv:2002.11803; in Shampoo, arXiv:2002.09018 and arXiv:2309.06497.
    """
    if kind == "adagrad":
        return exp_avg_sq.addcmul_(grad, grad).sqrt().add_(eps)
    root = exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sqrt()
    return (root.div_(debias) if kind == "adam" else root).add_(eps)


Rate = tuple[float | Tensor, float]
"""Learning rate, a number or a tensor of one element, and decoupled weight decay of one tensor."""


def equal_rates(rates: Sequence[Rate]) -> Iterator[tuple[slice, Rate]]:
    """Yields each run of adjacent tensors with equal rates, as a slice and the rates."""
    first = 0
    for last in range(1, len(rates) + 1):
        if last < len(rates) and rates[first] is not rates[last]:
            (lr, decay), (other_lr, other_decay) = rates[first], rates[last]
            tensors = isinstance(lr, Tensor) or isinstance(other_lr, Tensor)  # their values may be on the device
            if decay == other_decay and (lr is other_lr if tensors else bool(lr == other_lr)):
                continue
        elif last < len(rates):
            continue
        yield slice(first, last), rates[first]
        first = last


def decay_cautiously_(
    params: Sequence[Tensor], directions: Sequence[Tensor], *, lr: float | Tensor, weight_decay: float
) -> None:
    """Decays the entries that the step does not enlarge, W ← W - lr·weight_decay·1[u⊙W ≥ 0]⊙W, in place.

    Args:
        params: Weights W, any shapes.
        directions: u, of the same shapes and dtypes.
        lr: Learning rate, a number or a tensor of one element.
        weight_decay: Decoupled weight decay.

    Source:
        Cautious weight decay, arXiv:2510.12402, algorithm 1.
    """
    for weight, direction in zip(params, directions, strict=True):
        share = lr.reshape(()).to(weight.device) * weight_decay if isinstance(lr, Tensor) else lr * weight_decay
        agrees = weight.sign().mul_(direction) >= 0  # a product of two small numbers would be zero
        weight.sub_((weight * agrees).mul_(share))


def take_step_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    decay_last: bool = False,
) -> None:
    """Takes the step W ← (1 - lr·weight_decay)·W - lr·direction in place.

    Args:
        params: Weights, any shapes, on one device.
        directions: Of the same shapes and dtypes, used up.
        lr: Learning rate, a number or a tensor of one element.
        weight_decay: Decoupled weight decay, arXiv:1711.05101.
        decay_last: Decay the weights after the update instead of before it, as SOAP's official implementation does.
    """
    weights, steps = list(params), [direction.contiguous() for direction in directions]
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(steps[0].device)  # foreach takes a scalar but not a vector of one entry
    elif all(map(Tensor.is_contiguous, weights)):
        # One pass instead of three. A decay after the update also shrinks the update.
        kept = 1 - lr * weight_decay if decay_last else 1.0
        if kept > 0:
            torch._fused_sgd_(
                weights,
                steps,
                [],
                weight_decay=weight_decay / kept,
                momentum=0.0,
                lr=lr * kept,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
    if weight_decay and not decay_last:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_mul_(steps, lr)
    torch._foreach_sub_(weights, steps)
    if weight_decay and decay_last:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
