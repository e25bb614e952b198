"""What the step loop needs to know of an update rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout

State = Mapping[str, Tensor]
"""State of a batch of blocks by role, views of (blocks, ...) that are changed in place."""

MOMENTS = ("exp_avg", "exp_avg_sq")

PREV_PARAM = "prev_param"
"""Role of the weights before the last update."""


class Rule:
    """Arithmetic on batches of blocks, with settings and no state of its own; equal settings make equal rules."""

    @property
    def seeds(self) -> bool:
        """Whether the first non-zero gradient of a tensor goes to :meth:`seed` and updates nothing."""
        return False

    @property
    def waits(self) -> bool:
        """Whether all-zero gradients before the first non-zero one are passed over, uncounted."""
        return self.seeds

    @property
    def refreshes_last(self) -> bool:
        """Whether a refresh is the last thing that :meth:`update` does, so that :meth:`refresh` may do it later."""
        return False

    @property
    def fuses(self) -> bool:
        """Whether :meth:`fused_step` takes a step in fewer passes over memory than :meth:`update` does."""
        return False

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns fresh state by role, each of shape (tensors * blocks, ...)."""
        raise TypeError(f"{type(self).__name__} must define allocate")

    def entrywise(self, layout: Layout) -> bool:
        """Whether all state of this layout has the tensor's own shape and coordinates, so that it can be cut anew."""
        return True

    def elementwise(self, layout: Layout) -> bool:
        """Whether the direction of an entry depends on no other entry, so that any part can be stepped by itself."""
        return False

    @property
    def averages(self) -> bool:
        """Whether a factor averages over the other axes instead of summing over them."""
        return False

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """Returns state in the coordinates of the tensor, so that it can be cut anew; ``state`` stays as it is."""
        return dict(state)

    def rebuild(self, state: State, context: StepContext) -> None:
        """Completes state in place that was cut anew: what depends on the factors is still zero."""

    def describe(self, layout: Layout) -> str:
        """Names in a few words what happens to a tensor of this layout, for tables."""
        return type(self).__name__.removesuffix("Rule")

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Floating point operations of the matrix products and decompositions of a step, averaged over refreshes."""
        return 0.0

    def workspace(self, layout: Layout) -> int:
        """Estimates the entries that the step of one block needs beside gradient and state, while it takes."""
        largest = max((layout.block[side] ** 2 for side in layout.sides), default=0)
        return 6 * math.prod(layout.block) + 4 * largest

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Absorbs the first non-zero gradient (blocks, d_1, ..., d_k) into ``state``, in place."""

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Changes ``state`` in place and returns the direction (blocks, d_1, ..., d_k); ``grad`` stays as it is."""
        raise TypeError(f"{type(self).__name__} must define update")

    def due(self, context: StepContext) -> list[bool]:
        """Says of which tensors :meth:`refresh` has something to do after the update ``context.t``."""
        return [False for _ in context.t]

    def refresh(self, state: State, context: StepContext) -> None:
        """Refreshes in place what is due after an update, if that was left for later."""

    def fused_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        state: Mapping[str, list[Tensor]],
        t: Sequence[int],
        *,
        rates: Sequence[Rate],
        divisors: list[Tensor] | None = None,
    ) -> None:
        """Takes the whole step of :meth:`update` and the weights, where the rule :attr:`fuses` them.

        Args:
            params: Tensors of one block each, of the block's shape and the state's dtype, changed in place.
            grads: Their gradients; used up where there are divisors.
            state: Their state by role, one tensor each, changed in place.
            t: 1-based number of the update of each.
            rates: Learning rate and decoupled weight decay of each; weights decay before the update.
            divisors: What each gradient is divided by first, scalars.
        """
        raise TypeError(f"{type(self).__name__} must define fused_step where it fuses")


def zeros(
    layout: Layout, tensors: int, roles: tuple[str, ...], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Returns zero state of the shape of the blocks, (tensors * blocks, d_1, ..., d_k), for each of ``roles``."""
    shape = (tensors * layout.blocks, *layout.block)
    return {role: torch.zeros(shape, dtype=dtype, device=device) for role in roles}
