"""Decompositions that failed: the previous basis or root stays in use, and no step waits for the count."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SYNCHRONOUS = {"cpu"}
"""Kinds of devices whose results the host has at once; it does not wait for others to learn what failed."""


class Failures:
    """Counts matrices whose eigenbasis or root could not be computed, on their device where the host does not wait.

    The first one is logged, then each time that their number has grown tenfold.
    """

    def __init__(self) -> None:
        self._count = 0
        self._logged = 0
        self._waiting: dict[torch.device, Tensor] = {}

    def note(self, finite: Tensor) -> None:
        """Counts the failures of a batch of decompositions.

        Args:
            finite: Whether each came out finite, (blocks,), bool.
        """
        failed = (~finite).sum()
        if finite.device.type not in SYNCHRONOUS:
            # In place: on another stream, the old sum would be free for others before it was read.
            self._waiting.setdefault(finite.device, torch.zeros_like(failed)).add_(failed)
        elif number := int(failed):
            self.add(number, "what came out is not finite")

    def add(self, number: int, reason: object) -> None:
        """Counts failures that the host knows of."""
        self._count += number
        if self._count >= max(1, 10 * self._logged):
            self._logged = self._count
            logger.warning(
                "%s so far; the previous basis or root stays in use, and the identity where there is none yet: %s",
                "1 decomposition has failed"
                if self._count == 1
                else f"{self._count} decompositions of factors have failed",
                reason,
            )

    def count(self) -> int:
        """Returns their number, for which the host waits for the devices."""
        for failed in self._waiting.values():
            if number := int(failed):
                self.add(number, "what came out is not finite")
        self._waiting.clear()
        return self._count
