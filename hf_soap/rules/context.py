"""What a rule may know about the step that calls it, and what it may ask of that step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hf_soap.rules.layout import Layout

if TYPE_CHECKING:
    from hf_soap.distributed.dtensor import ReplicaGroup

Roots = dict[str, Tensor]
"""Inverse roots, or what they are computed from, by role."""


class BackgroundJobs(Protocol):
    """Computes inverse roots in the background of the training loop."""

    def pending(self, key: Hashable) -> bool:
        """Whether a job was submitted under this key and has not been taken yet."""

    def submit(self, key: Hashable, work: Callable[[Roots], Roots], snapshot: Roots) -> None:
        """Starts ``work(snapshot)`` under a key. The snapshot must not be changed afterwards."""

    def take(self, key: Hashable, *, wait: bool) -> Roots | None:
        """Returns the roots of a finished job and removes it; None if there is no finished job."""


class FailureCount(Protocol):
    """Counts decompositions that fail."""

    def note(self, finite: Tensor) -> None:
        """Records for a batch of decompositions whether each result is finite, (blocks,), bool."""


class RuleMetrics:
    """Measurements that rules and the step loop report for the tensors of one rule. This base class ignores them."""

    watches = False
    """Whether this step measures how far it moves the weights."""

    def watching(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Measures in the steps that are due how far the code in the context moves the weights."""
        return nullcontext()

    def refreshing(self, device: torch.device) -> AbstractContextManager[None]:
        """Times a refresh of bases or roots."""
        return nullcontext()

    def rotated(self, rotation: Tensor, factor: Tensor) -> None:
        """Records a refresh of bases.

        Args:
            rotation: Q̃ (blocks, n, n), whose column j is the new vector j in terms of the old ones.
            factor: The factors in the new basis, (blocks, n, n).
        """

    def replaced(self, old: Tensor, new: Tensor) -> None:
        """Records new inverse roots (blocks, n, n) that replace old ones."""


NO_METRICS = RuleMetrics()


@dataclass(frozen=True)
class StepContext:
    """What one call of a rule may know and ask. A call concerns adjacent tensors of a bucket: either all at their
    first gradient, or none.

    Attributes:
        layout: Layout of each of the tensors.
        t: 1-based number of this update, for each tensor.
        index: Place of each tensor in the whole optimizer, which staggers refreshes.
        background: Runs work in the background of the training loop.
        replicas: Ranks with equal state that split decompositions among them.
        metrics: Records refreshes and updates.
        failures: Counts decompositions that fail.
        later: Leave refreshes to a later call of the rule's ``refresh``.
    """

    layout: Layout
    t: tuple[int, ...]
    index: tuple[int, ...]
    background: BackgroundJobs | None = None
    replicas: ReplicaGroup | None = None
    metrics: RuleMetrics = NO_METRICS
    failures: FailureCount | None = None
    later: bool = False

    def decompose(self, compute: Callable[[Tensor], tuple[Tensor, ...]], batch: Tensor) -> tuple[Tensor, ...]:
        """Returns ``compute(batch)``. All replicas have the matrices, and each of them computes a share.

        The results are contiguous, like those from other ranks: products with other memory layouts round differently.
        """
        if self.replicas is not None:
            return self.replicas.share(compute, batch, turn=self.index[0])
        return tuple(part.contiguous() for part in compute(batch))

    def finite_mask(self, *results: Tensor) -> Tensor:
        """Returns for which matrices all results (blocks, ...) are finite, (blocks, 1, 1), and counts the others."""
        finite = torch.stack([_all_finite(result) for result in results]).all(0)
        if self.failures is not None:
            self.failures.note(finite)
        return finite.view(-1, 1, 1)

    def per_block(self, of: Callable[[int], float], like: Tensor) -> float | Tensor:
        """Evaluates a function of each tensor's ``t``, in a shape that broadcasts against (blocks, d_1, ..., d_k)."""
        values = {t: of(t) for t in set(self.t)}
        if len(values) == 1:
            return values[self.t[0]]
        column = torch.tensor([values[t] for t in self.t], dtype=like.dtype, device="cpu")
        column = column.to(like.device, non_blocking=True)
        spread: Tensor = column.repeat_interleave(self.layout.blocks).view(-1, *[1] * (like.dim() - 1))
        return spread

    def tensor_square_sum(self, blocks: Tensor) -> Tensor:
        """Returns squared norms of tensors, to broadcast against ``blocks``. Padding must be zero (see ``trim``)."""
        return _square_sum(blocks, self.layout.blocks)

    def matrix_square_sum(self, blocks: Tensor) -> Tensor:
        """Like :meth:`tensor_square_sum`, but for each matrix of tensors that are stacks of matrices."""
        return _square_sum(blocks, self.layout.blocks // self.layout.stack)

    def subbatches(self, flags: Iterable[bool]) -> Iterator[tuple[slice, StepContext]]:
        """Yields each run of adjacent tensors whose flag is set: the slice of its blocks, and its context."""
        for first, last in adjacent(flags):
            blocks = slice(first * self.layout.blocks, last * self.layout.blocks)
            yield blocks, replace(self, t=self.t[first:last], index=self.index[first:last])


def _all_finite(blocks: Tensor) -> Tensor:
    """Returns whether all entries of each block (blocks, ..., n) are finite, (blocks,), bool.

    A product with small numbers is finite if and only if they are. It takes a tenth of the time of a look at each.
    """
    small = blocks.new_full((blocks.shape[-1],), 2.0**-24)  # sums of fewer than 2^24 entries cannot overflow
    return (blocks @ small).isfinite().view(len(blocks), -1).all(1)


def _square_sum(blocks: Tensor, together: int) -> Tensor:
    total = blocks.square().flatten(1).sum(1).view(-1, together).sum(1)
    return total.repeat_interleave(together).view(-1, *[1] * (blocks.dim() - 1))


def adjacent(flags: Iterable[bool], longest: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of every run of set flags, none longer than ``longest``."""
    first: int | None = None
    place = -1
    for place, flag in enumerate(flags):
        if flag and first is None:
            first = place
        elif first is not None and (not flag or place - first == longest):
            yield first, place
            first = place if flag else None
    if first is not None:
        yield first, place + 1
