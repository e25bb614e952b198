"""What an optimizer does with one tensor: the rule, the layout, and what the step adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_soap.rules.base import PREV_PARAM, Rule
from hf_soap.rules.layout import Layout
from hf_soap.rules.storage import Storage


@dataclass(frozen=True)
class Plan:
    """What happens to one tensor.

    Attributes:
        rule: Where its direction comes from.
        layout: How it is cut.
        auxiliary: Whether it follows the learning rate and decay for vectors, where the optimizer has such.
        decay_last: Decay the weights after the update, as SOAP's implementation does; else both at once.
        keep_weights: Keep the weights before the last update in the state, for exact MARS.
        storage: How its state is kept between steps.
        maximize: Ascend: the gradient counts with the other sign.
        splits_refreshes: Split refreshes among ranks that hold equal state.
        overlaps: Refresh beside the next forward and backward pass, on a stream of its own.
    """

    rule: Rule
    layout: Layout
    auxiliary: bool = False
    decay_last: bool = False
    keep_weights: bool = False
    storage: Storage = Storage()
    maximize: bool = False
    splits_refreshes: bool = False
    overlaps: bool = False

    @cached_property
    def refreshes_later(self) -> bool:
        """Whether refreshes come after the step: not where that would round state once more."""
        return self.overlaps and self.state_format.is_identity and bool(self.layout.sides) and self.rule.refreshes_last

    @property
    def entrywise(self) -> bool:
        """Whether all state has the tensor's own shape and coordinates, so that it can be cut anew."""
        return self.rule.entrywise(self.layout)

    @cached_property
    def state_format(self) -> Storage:
        """How state is kept: what can be cut anew has no scales for its blocks, and no matrices to be packed."""
        if not self.entrywise:
            return self.storage
        return Storage("float32" if self.storage.format == "float32" else "bfloat16")

    def allocate(self, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns fresh state by role for a number of tensors, (tensors * blocks, ...) each, as it is kept."""
        if self.state_format.is_identity:
            return self.computed(tensors, dtype=dtype, device=device)
        return self.state_format.allocate(self.computed(tensors, dtype=dtype, device=torch.device("meta")), device)

    def computed(self, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """As :meth:`allocate`, as the rule computes with it."""
        state = self.rule.allocate(self.layout, tensors, dtype=dtype, device=device)
        if self.keep_weights:
            shape = (tensors * self.layout.blocks, *self.layout.block)
            state[PREV_PARAM] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def work(self, *, refreshes_only: bool = False) -> float:
        """Floating point operations of the matrix products and decompositions of a step, averaged over refreshes."""
        return self.rule.work(self.layout, refreshes_only=refreshes_only)
