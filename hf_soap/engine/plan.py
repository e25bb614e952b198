"""What an optimizer does with one tensor: the rule, the layout, and what the step adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_soap.engine.weight_step import WeightStep
from hf_soap.rules.base import PREV_PARAM, Rule, StateSpec, Traits, moment
from hf_soap.rules.layout import Layout
from hf_soap.rules.storage import Storage


@dataclass(frozen=True)
class Plan:
    """What happens to one tensor.

    Attributes:
        rule: Where its direction comes from.
        layout: How it is cut.
        auxiliary: Whether it follows the learning rate and decay for vectors, where the optimizer has such.
        weight_step: How its direction changes the weights.
        keep_weights: Keep the weights before the last update in the state, for exact MARS.
        storage: How its state is kept between steps.
        maximize: Ascend: the gradient counts with the other sign.
        splits_refreshes: Split refreshes among ranks that hold equal state.
        overlaps: Refresh beside the next forward and backward pass, on a stream of its own.
    """

    rule: Rule
    layout: Layout
    auxiliary: bool = False
    weight_step: WeightStep = WeightStep()
    keep_weights: bool = False
    storage: Storage = Storage()
    maximize: bool = False
    splits_refreshes: bool = False
    overlaps: bool = False

    @cached_property
    def refreshes_later(self) -> bool:
        """Whether refreshes come after the step: not where that would round state once more."""
        factored = bool(self.layout.sides)
        return self.overlaps and self.keeps_as_computed and factored and self.traits.refreshes_last

    @cached_property
    def traits(self) -> Traits:
        """What the step loop must know of the rule."""
        return self.rule.traits(self.layout)

    @cached_property
    def state_spec(self) -> dict[str, StateSpec]:
        """What the state consists of, by role."""
        specs = self.rule.state_spec(self.layout)
        return {**specs, PREV_PARAM: moment(self.layout, may_round=False)} if self.keep_weights else specs

    @cached_property
    def entrywise(self) -> bool:
        """Whether all state has the tensor's own shape and coordinates, so that it can be resharded entry by entry."""
        return all(spec.kind == "moment" for spec in self.state_spec.values())

    @cached_property
    def keeps_as_computed(self) -> bool:
        """Whether state is kept in the form that it is computed in."""
        return self.state_format.is_identity

    @cached_property
    def state_format(self) -> Storage:
        """How state is kept between steps; entrywise state has no matrices to pack."""
        return Storage(self.storage.format) if self.entrywise else self.storage

    def allocate(self, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns fresh state by role for a number of tensors, (tensors * blocks, ...) each, as it is kept."""
        blocks = tensors * self.layout.blocks
        return self.state_format.allocate(self.state_spec, blocks, dtype=dtype, device=device)

    def computed(self, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """As :meth:`allocate`, as the rule computes with it."""
        return Storage().allocate(self.state_spec, tensors * self.layout.blocks, dtype=dtype, device=device)

    @property
    def label(self) -> str:
        """Says in a few words what happens to the tensor, for tables."""
        return self.rule.describe(self.layout)

    def work(self, *, refreshes_only: bool = False) -> float:
        """Floating point operations of the matrix products and decompositions of a step, averaged over refreshes."""
        return self.rule.work(self.layout, refreshes_only=refreshes_only)
