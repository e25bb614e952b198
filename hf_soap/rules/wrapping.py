"""A rule around another one."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from hf_soap.rules.base import Rule, State, StateSpec, Traits
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout


class WrappingRule(Rule):
    """A rule that changes the gradient which another rule, its inner rule, gets, or the direction which that returns.

    Subclasses define ``update``, and also ``seed`` if they change the gradient that seeds. They add their state to
    that of :meth:`state_spec`. Everything else is the inner rule's, except for two traits: a subclass that defines a
    fused step, or treats each entry alone, says so in ``traits``.

    Attributes:
        inner: The inner rule.
    """

    inner: Rule

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """As the inner rule."""
        return self.inner.state_spec(layout)

    def traits(self, layout: Layout) -> Traits:
        """As the inner rule, but without its fused step, and not elementwise."""
        return replace(self.inner.traits(layout), has_fused_step=False, is_elementwise=False)

    def restate(self, state: State, layout: Layout) -> dict[str, Tensor]:
        """As the inner rule; added state has the tensor's coordinates already."""
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
        """As the inner rule, plus one gradient."""
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
