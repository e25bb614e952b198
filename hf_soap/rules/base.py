"""The interface of rules: state, traits and update. Also a rule that wraps another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout

State = Mapping[str, Tensor]
"""State of a batch of blocks by role: views (blocks, ...) that are changed in place."""

Kind = Literal["moment", "factor", "basis", "root", "vector"]

PREV_PARAM = "prev_param"
"""Role of the weights before the last update."""

AVERAGE, RAW_PARAM = AVERAGES = "average_param", "raw_param"
"""Roles of the average of a parameter's weights, and of its raw weights while it holds the average.

They are not a rule's: they have the shape of this rank's part of the parameter, even if another rank preconditions it.
"""

AVERAGED, AT_AVERAGE = "n_averaged", "at_average"
"""Entries of a param group: how many weights its averages are of, and whether its parameters hold the averages."""

LAYOUT = "layout"
"""Role of the numbers that say how a tensor was cut. It occurs only in a state dict."""

OWN_ROLES = {"step", LAYOUT, PREV_PARAM}
"""Names of all state that belongs to this package. Each rule adds its own."""


@dataclass(frozen=True)
class StateSpec:
    """Describes one tensor of a rule's state, which decides how it is stored, packed, resharded and counted.

    Attributes:
        kind: ``"moment"`` has the shape of the block. ``"factor"`` is a symmetric matrix of a mode to which the
            gradients add; resharding assembles it from its parts. ``"basis"`` and ``"root"`` are matrices that
            :meth:`Rule.rebuild` computes from factors; a root is symmetric. ``"vector"`` has an entry for each index
            of a mode, and is resharded like a factor.
        shape: Its shape for one block.
        mode: The mode of the block that a factor, basis, root or vector belongs to.
        may_round: Whether it may be stored in bfloat16.
        is_mean: Whether a factor or vector averages over the other modes instead of summing over them.
        in_own_basis: Whether a factor is stored in the coordinates of its basis, in which it is nearly diagonal.
    """

    kind: Kind
    shape: tuple[int, ...]
    mode: int | None = None
    may_round: bool = True
    is_mean: bool = False
    in_own_basis: bool = False

    @property
    def is_symmetric(self) -> bool:
        """Whether one triangle determines the matrix."""
        return self.kind in ("factor", "root")


def moment(layout: Layout, *, may_round: bool = True) -> StateSpec:
    """Returns the spec of a tensor with the shape of the block."""
    return StateSpec("moment", layout.block, may_round=may_round)


def square(kind: Kind, layout: Layout, mode: int, **options: bool) -> StateSpec:
    """Returns the spec of a factor, basis or root of a mode, with options of :class:`StateSpec`."""
    return StateSpec(kind, (layout.block[mode], layout.block[mode]), mode, **options)


def vector(layout: Layout, mode: int, *, is_mean: bool) -> StateSpec:
    """Returns the spec of a vector along a mode. It is small, and therefore never rounded."""
    return StateSpec("vector", (layout.block[mode],), mode, may_round=False, is_mean=is_mean)


@dataclass(frozen=True)
class Traits:
    """What the step loop must know about a rule on one layout.

    Attributes:
        first_grad_seeds: The first non-zero gradient of a tensor goes to :meth:`Rule.seed` and changes no weight.
        skips_leading_zero_grads: All-zero gradients before the first non-zero one are skipped and not counted.
        refreshes_last: A refresh is the last thing that :meth:`Rule.update` does, so that :meth:`Rule.refresh` can do
            it later.
        has_fused_step: :meth:`Rule.fused_step` takes a step in fewer passes over memory than the update does.
        is_elementwise: The direction of an entry depends on no other entry, so that any part can be stepped alone.
        is_spectral: The spectral norm of a matrix's direction depends on its shape only, as with Newton-Schulz. In
            other directions the entries have a size that does not depend on the shape, as with Adam.
    """

    first_grad_seeds: bool = False
    skips_leading_zero_grads: bool = False
    refreshes_last: bool = False
    has_fused_step: bool = False
    is_elementwise: bool = False
    is_spectral: bool = False


class Rule(ABC):
    """Arithmetic on batches of blocks. A rule holds settings and no state; rules with equal settings are equal.

    Attributes:
        roles: All names that its state may have, without the mode's number.
    """

    roles: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        OWN_ROLES.update(cls.roles)

    @abstractmethod
    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the state for a layout by role: a name from :attr:`roles`, possibly with ``_MODE`` appended."""

    @abstractmethod
    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Changes ``state`` in place and returns the direction (blocks, d_1, ..., d_k); ``grad`` is not changed."""

    def traits(self, layout: Layout) -> Traits:
        """Returns the traits of this rule on a layout."""
        return Traits()

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Absorbs the first non-zero gradient into ``state``, if the traits say ``first_grad_seeds``.

        Args:
            grad: The gradient, (blocks, d_1, ..., d_k).
            state: Zeros, changed in place.
            context: The step.
        """
        raise TypeError(f"{type(self).__name__} must define seed, since its traits say first_grad_seeds")

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """Returns state in the coordinates of the tensor, for resharding; ``state`` is not changed."""
        return dict(state)

    def rebuild(self, state: State, context: StepContext) -> None:
        """Completes resharded state in place: its bases and roots are still zero."""
        if zero := [role for role, spec in self.state_spec(context.layout).items() if spec.kind in ("basis", "root")]:
            raise TypeError(f"{type(self).__name__} must define rebuild, since its state includes {', '.join(zero)}")

    def describe(self, layout: Layout) -> str:
        """Describes in a few words, for tables, how tensors of this layout are updated."""
        return type(self).__name__.removesuffix("Rule")

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Returns the floating point operations of a step's products and decompositions, averaged over refreshes."""
        return 0.0

    def workspace(self, layout: Layout) -> int:
        """Estimates the temporary entries that a step of one block needs in addition to gradient and state."""
        largest = max((layout.block[side] ** 2 for side in layout.sides), default=0)
        return 6 * math.prod(layout.block) + 4 * largest

    def due(self, context: StepContext) -> list[bool]:
        """Returns for each tensor whether :meth:`refresh` has work to do after the update ``context.t``."""
        return [False for _ in context.t]

    def refresh(self, state: State, context: StepContext) -> None:
        """Refreshes in place what is due after an update, if :meth:`update` deferred it."""
        raise TypeError(f"{type(self).__name__} must define refresh, since its traits say refreshes_last")

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
        """Takes a whole step, including the change of the weights, if the traits say ``has_fused_step``.

        Args:
            params: Tensors of one block each, of the block's shape and the state's dtype, changed in place.
            grads: Their gradients; overwritten if there are divisors.
            state: Their state by role, one tensor each, changed in place.
            t: 1-based number of the update of each.
            rates: Learning rate and decoupled weight decay of each; weights decay before the update.
            divisors: Scalars by which the gradients are divided first.
        """
        raise TypeError(f"{type(self).__name__} must define fused_step, since its traits say has_fused_step")
