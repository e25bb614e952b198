"""How many gradients each tensor has taken: known to the host, or to the device alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soap.graphs import capturing, refuse_in_graph
from hf_soap.storage import COUNT


class Counts:
    """Counts of a batch of tensors.

    A captured step is replayed without the host, so that its counts are raised on the device. The host then goes by
    what it believes: that every step counts. It asks where something depends on it.

    Attributes:
        tensor: (tensors,), float64; the optimizer's state has views of it.
        on_device: Whether it is beside the state, and not on the host.
        refreshed: The update of each tensor that it was due for its last refresh behind, where the device counts.
    """

    def __init__(self, tensors: int, device: torch.device, *, on_device: bool) -> None:
        self.on_device = on_device
        self.tensor = torch.zeros(tensors, dtype=COUNT, device=device if on_device else "cpu")
        self.refreshed = [0] * tensors
        self._believed: list[int] = []

    def believed(self) -> Sequence[int]:
        """Returns the counts as the host believes them to be, which on the host is what they are."""
        return self._believed if self.on_device and self._believed else self.ask()

    def ask(self) -> Sequence[int]:
        """Returns the counts, for which the host waits for the device where they are there."""
        refuse_in_graph("does not know yet which tensors were stepped")
        self._believed = [int(count) for count in self.tensor.tolist()]
        return self._believed

    def advance(self, first: int, last: int, usable: Tensor | None) -> Tensor:
        """Counts a step of the tensors first..last-1 and returns their counts.

        Args:
            first: The first of them.
            last: One after the last.
            usable: Whether the step counts, where only the device knows; counts on the host are taken back later.
        """
        counts = self.tensor[first:last]
        counts.add_(1 if usable is None or not self.on_device else usable)
        if self.on_device and not capturing():
            self.expect(first, last)
        return counts

    def expect(self, first: int, last: int) -> None:
        """Has the host believe that a step counted; whether a first one did, it asks."""
        believed = self._believed[first:last]
        self._believed[first:last] = [count + 1 for count in believed]
        if not all(believed):
            self._believed = []

    def restart(self, first: int, last: int) -> None:
        """Counts the tensors first..last-1 from zero."""
        self.tensor[first:last].zero_()
        self.refreshed[first:last] = [0] * (last - first)
        self._believed = []
