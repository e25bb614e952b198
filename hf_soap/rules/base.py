"""What a rule is: its state, its traits, its update; and a rule that stands before another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout

State = Mapping[str, Tensor]
"""State of a batch of blocks by role, views of (blocks, ...) that are changed in place."""

Kind = Literal["moment", "factor", "basis", "root", "vector"]

PREV_PARAM = "prev_param"
"""Role of the weights before the last update."""

LAYOUT = "layout"
"""Role of the numbers that say how a tensor was cut, in a state dict only."""

OWN_ROLES = {"step", LAYOUT, PREV_PARAM}
"""Names of all state that is the family's; each rule adds its own."""


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a rule's state. How it is stored, packed, resharded, counted and measured follows from this.

    Attributes:
        kind: ``"moment"`` has the shape of the block. ``"factor"`` is a symmetric matrix of a mode that the gradients
            add to; resharding puts it together from its parts. ``"basis"`` and ``"root"`` are matrices that
            :meth:`Rule.rebuild` computes from factors; a root is symmetric. ``"vector"`` has an entry for each index
            of a mode, and is resharded as a factor is.
        shape: Shape of one block of it.
        mode: The mode of the block that a factor, basis, root or vector belongs to.
        may_round: Whether it may be kept in bfloat16.
        is_mean: Whether a factor or vector averages over the other modes instead of summing over them.
        in_own_basis: Whether a factor is kept in the coordinates of its basis, where it is nearly diagonal.
    """

    kind: Kind
    shape: tuple[int, ...]
    mode: int | None = None
    may_round: bool = True
    is_mean: bool = False
    in_own_basis: bool = False

    @property
    def is_symmetric(self) -> bool:
        """Whether one triangle says all."""
        return self.kind in ("factor", "root")


def moment(layout: Layout, *, may_round: bool = True) -> StateSpec:
    """Returns the spec of a tensor of the shape of the block."""
    return StateSpec("moment", layout.block, may_round=may_round)


def square(kind: Kind, layout: Layout, mode: int, **options: bool) -> StateSpec:
    """Returns the spec of a factor, basis or root of a mode; options as of :class:`StateSpec`."""
    return StateSpec(kind, (layout.block[mode], layout.block[mode]), mode, **options)


def vector(layout: Layout, mode: int, *, is_mean: bool) -> StateSpec:
    """Returns the spec of a vector along a mode, which is never rounded: it is small."""
    return StateSpec("vector", (layout.block[mode],), mode, may_round=False, is_mean=is_mean)


@dataclass(frozen=True)
class Traits:
    """What the step loop must know of a rule on one layout.

    Attributes:
        first_grad_seeds: The first non-zero gradient of a tensor goes to :meth:`Rule.seed` and updates nothing.
        skips_leading_zero_grads: All-zero gradients before the first non-zero one are skipped, uncounted.
        refreshes_last: A refresh is the last thing that :meth:`Rule.update` does, so that :meth:`Rule.refresh` may do
            it later.
        has_fused_step: :meth:`Rule.fused_step` takes a step in fewer passes over memory than the update does.
        is_elementwise: The direction of an entry depends on no other entry, so that any part can be stepped by itself.
    """

    first_grad_seeds: bool = False
    skips_leading_zero_grads: bool = False
    refreshes_last: bool = False
    has_fused_step: bool = False
    is_elementwise: bool = False


class Rule(ABC):
    """Arithmetic on batches of blocks, with settings and no state of its own; equal settings make equal rules.

    Attributes:
        roles: All names that its state may have, without the number of a mode.
    """

    roles: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        OWN_ROLES.update(cls.roles)

    @abstractmethod
    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the state of a tensor of this layout by role: a name of :attr:`roles`, or that and ``_MODE``."""

    @abstractmethod
    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Changes ``state`` in place and returns the direction (blocks, d_1, ..., d_k); ``grad`` stays as it is."""

    def traits(self, layout: Layout) -> Traits:
        """Returns what the step loop must know."""
        return Traits()

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Absorbs the first non-zero gradient (blocks, d_1, ..., d_k) into ``state``, where that seeds.

        Args:
            grad: The gradient.
            state: Zeros, changed in place.
            context: The step.
        """
        raise TypeError(f"{type(self).__name__} must define seed, since its first gradient seeds")

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """Returns state in the coordinates of the tensor, so that it can be cut anew; ``state`` stays as it is."""
        return dict(state)

    def rebuild(self, state: State, context: StepContext) -> None:
        """Completes state in place that was cut anew: bases and roots are still zero."""
        if zero := [role for role, spec in self.state_spec(context.layout).items() if spec.kind in ("basis", "root")]:
            raise TypeError(f"{type(self).__name__} must define rebuild, since it keeps {', '.join(zero)}")

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

    def due(self, context: StepContext) -> list[bool]:
        """Says of which tensors :meth:`refresh` has something to do after the update ``context.t``."""
        return [False for _ in context.t]

    def refresh(self, state: State, context: StepContext) -> None:
        """Refreshes in place what is due after an update, where :meth:`update` left it for later."""
        raise TypeError(f"{type(self).__name__} must define refresh, since its traits say that refreshes_last")

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
        """Takes the whole step of :meth:`update` and the weights, where :class:`Traits` say that there is one.

        Args:
            params: Tensors of one block each, of the block's shape and the state's dtype, changed in place.
            grads: Their gradients; used up where there are divisors.
            state: Their state by role, one tensor each, changed in place.
            t: 1-based number of the update of each.
            rates: Learning rate and decoupled weight decay of each; weights decay before the update.
            divisors: What each gradient is divided by first, scalars.
        """
        raise TypeError(f"{type(self).__name__} must define fused_step, since its traits say that it has one")


class WrappingRule(Rule):
    """A rule that stands before another, such as a correction of the gradient: all is the inner rule's but the update.

    Subclasses define ``update``, and ``seed`` where the gradient that seeds is to be changed, too. They add state to
    what :meth:`state_spec` returns.

    Attributes:
        inner: The other rule.
    """

    inner: Rule

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """As the inner rule."""
        return self.inner.state_spec(layout)

    def traits(self, layout: Layout) -> Traits:
        """As the inner rule."""
        return self.inner.traits(layout)

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """As the inner rule; what is added has the tensor's coordinates already."""
        return self.inner.restate(state, layout)

    def rebuild(self, state: State, context: StepContext) -> None:
        """As the inner rule."""
        self.inner.rebuild(state, context)

    def describe(self, layout: Layout) -> str:
        """Returns the inner rule with the name of this one before it."""
        return f"{super().describe(layout)} {self.inner.describe(layout)}"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """As the inner rule."""
        return self.inner.work(layout, refreshes_only=refreshes_only)

    def workspace(self, layout: Layout) -> int:
        """As the inner rule, and a gradient of its own."""
        return self.inner.workspace(layout) + math.prod(layout.block)

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """As the inner rule."""
        self.inner.seed(grad, state, context)

    def due(self, context: StepContext) -> list[bool]:
        """As the inner rule."""
        return self.inner.due(context)

    def refresh(self, state: State, context: StepContext) -> None:
        """As the inner rule."""
        self.inner.refresh(state, context)
