"""The step of some tensors of a bucket: from gradients to directions and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.buckets import Bucket, state_dtype
from hf_soap.engine.norms import Norms
from hf_soap.linalg import elementwise
from hf_soap.rules.base import PREV_PARAM
from hf_soap.rules.context import StepContext


def grads_are_finite(grads: Sequence[Tensor]) -> Tensor:
    """Says whether all gradients are finite and small enough for sums of their squares, with a margin of 100.

    Larger ones would make factors and second moments infinite for good.

    Args:
        grads: Any shapes, of one dtype and on one device.

    Returns:
        A scalar of bool on that device.
    """
    dtype = state_dtype(grads[0])
    norms = torch.stack(elementwise.norms(grads, dtype))
    return (norms < SQUARABLE[dtype]).all()  # NaN compares false


SQUARABLE = {dtype: math.sqrt(torch.finfo(dtype).max / 100) for dtype in (torch.float32, torch.float64)}
"""Norms from which sums of squares may overflow, with a margin of 100."""


def split_by_first_grad(
    bucket: Bucket, grads: Sequence[Tensor | None], steps: Sequence[int]
) -> tuple[list[bool], list[bool]]:
    """Says which tensors of a bucket have the gradient that seeds them, and which have one to be updated with.

    Args:
        bucket: The tensors.
        grads: Their gradients.
        steps: How many gradients each has taken.
    """
    traits = bucket.plan.traits
    present = [grad is not None for grad in grads]
    if not traits.skips_leading_zero_grads:
        return [], present
    new = [here and not step for here, step in zip(present, steps, strict=True)]
    if any(new):
        # An all-zero gradient (a LoRA matrix after a zero one, a synthetic step) shapes no preconditioner.
        unseen = [grad for grad, is_new in zip(grads, new, strict=True) if is_new and grad is not None]
        nonzero = iter(torch.stack([grad.count_nonzero() for grad in unseen]).tolist())
        # A rank's part may be zero where another's is not; what needs no factors is then counted alike by all.
        parts = bucket.plan.entrywise and dtensor.is_sharded(bucket.params[0])
        fresh = [is_new and (next(nonzero) > 0 or parts) for is_new in new]
    else:
        fresh = new
    old = [here and not is_new for here, is_new in zip(present, new, strict=True)]
    return (fresh, old) if traits.first_grad_seeds else ([], [a or b for a, b in zip(fresh, old, strict=True)])


def stack_gradients(grads: Sequence[Tensor], bucket: Bucket, context: StepContext) -> Tensor:
    """Returns gradients as one batch of blocks (tensors * blocks, d_1, ..., d_k)."""
    layout = bucket.plan.layout
    if layout.whole and all(grad.shape == layout.view for grad in grads):
        stacked = torch.stack(list(grads)).to(bucket.dtype)
    else:
        cut = [layout.to_blocks(grad) for grad in grads]
        stacked = (cut[0] if len(cut) == 1 else torch.cat(cut)).to(bucket.dtype)
    return stacked


def step_tensors(
    bucket: Bucket,
    first: int,
    last: int,
    grads: list[Tensor],
    context: StepContext,
    rates: Sequence[elementwise.Rate],
    kept: Norms,
) -> None:
    """Updates the tensors first..last-1 of a bucket: by the rule's fused kernels where they apply, else its direction.

    Args:
        bucket: Their parameters and state.
        first: The first of them.
        last: One after the last.
        grads: Their gradients.
        context: What the rule needs to know of them.
        rates: Learning rate and decay of each.
        kept: Takes directions whose step must wait for other ranks.
    """
    plan = bucket.plan
    weights = bucket.weights(first, last)
    if plan.keep_weights:
        before = torch.cat([plan.layout.to_blocks(weight) for weight in weights])
    if bucket.fuses and _are_plain((*weights, *grads), bucket.dtype):
        each = {role: tensors[first:last] for role, tensors in bucket.each.items()}
        with context.metrics.watching(weights):
            plan.rule.fused_step(weights, grads, each, context.t, rates=rates)
    else:
        directions = directions_of(bucket, first, last, grads, context)
        if plan.weight_step.summed:
            kept.keep(bucket.params[first:last], directions)
        else:
            with context.metrics.watching(weights):
                plan.weight_step.apply_(weights, directions, rates)
    if plan.keep_weights:
        bucket.rows(first, last)[PREV_PARAM].copy_(before)


def _are_plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether fused kernels take tensors: a model may have gone to another dtype or memory format since last time."""
    return all(map(Tensor.is_contiguous, tensors)) and {tensor.dtype for tensor in tensors} == {dtype}


def directions_of(
    bucket: Bucket, first: int, last: int, grads: Sequence[Tensor], context: StepContext
) -> list[Tensor]:
    """Updates the state of the tensors first..last-1 of a bucket and returns their directions, in their shapes."""
    plan = bucket.plan
    with bucket.working(first, last, context) as state:
        direction = plan.rule.update(stack_gradients(grads, bucket, context), state, context)
    shapes = bucket.shapes[first:last]
    if plan.layout.whole and all(shape == plan.layout.view for shape in shapes):
        return list(direction.unbind())
    pieces = zip(direction.split(plan.layout.blocks), shapes, strict=True)
    return [plan.layout.from_blocks(piece, shape) for piece, shape in pieces]
