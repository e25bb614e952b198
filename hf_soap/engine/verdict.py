"""Whether the gradients of a step were usable: what a device knows at once, and the host asks for a step later."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DEFERS: set[str] = set()
"""Kinds of devices on which the host does not wait for the finite check, but keeps a copy of all state and goes on."""


@dataclass
class Verdict:
    """The verdict on one step, which is taken and put back on the device where it must not be.

    Attributes:
        usable: Whether the step counts, a scalar of bool on the device.
        counted: Counts of steps that the host has raised in the belief that it does.
    """

    usable: Tensor
    counted: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if self.usable.device.type == "cuda":
            self._read = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
            self._read.copy_(self.usable, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self.usable.device))
        else:
            self._read = self.usable.clone()

    def settle(self) -> bool:
        """Returns the verdict, and takes the counts back if the step was left out."""
        if self._event is not None:
            self._event.synchronize()  # a step old: the device has other work meanwhile
        usable = bool(self._read)
        for count in [] if usable else self.counted:
            count.sub_(1).clamp_(min=0)  # 0 is one whose tensors have started anew since
        return usable
