"""Refreshes that run beside the next forward and backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from hf_soap.engine.buckets import Bucket
from hf_soap.rules.context import StepContext


@dataclass(frozen=True)
class Updated:
    """Adjacent tensors of a bucket that a step has updated.

    Attributes:
        bucket: Their bucket.
        first: The first of them.
        last: One after the last.
        context: What their rule was told.
    """

    bucket: Bucket
    first: int
    last: int
    context: StepContext

    def refresh(self) -> None:
        """Refreshes what is due."""
        bucket, context = self.bucket, replace(self.context, later=False)
        with bucket.exact_arithmetic(), bucket.stepping() as under_way:
            under_way[:] = self.first, self.last
            with bucket.working(self.first, self.last, context) as state:
                bucket.plan.rule.refresh(state, context)
            under_way[:] = 0, 0


class Refreshes:
    """What steps leave to be refreshed, at once or beside what the device does until the next step."""

    def __init__(self) -> None:
        self._updated: list[Updated] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: list[tuple[Updated, torch.cuda.Stream]] = []

    def note(self, updated: Updated) -> None:
        """Takes note of tensors that a step has updated."""
        self._updated.append(updated)

    def start(self) -> None:
        """Forgets what an unfinished step has noted."""
        self._updated = []

    def finish(self) -> None:
        """Refreshes what is due after the step."""
        for one in self._updated:
            if any(one.bucket.plan.rule.due(one.context)):
                with self._aside(one):
                    one.refresh()

    def join(self) -> None:
        """Lets the device go on when the refreshes under way are done; the host does not wait."""
        for updated, launched_from in self._under_way:
            device = updated.bucket.params[0].device
            for stream in (launched_from, torch.cuda.current_stream(device)):
                stream.wait_stream(self._streams[device])
        self._under_way = []

    def _aside(self, updated: Updated) -> AbstractContextManager[object]:
        """On a GPU, sends refreshes that may overlap to a stream of their own, after all that was sent so far."""
        bucket = updated.bucket
        device = bucket.params[0].device
        if device.type != "cuda" or not bucket.plan.overlaps:
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        stream.wait_stream(current)
        for stack in bucket.stacks.values():
            stack.record_stream(stream)  # whoever drops the optimizer now must not get their memory yet
        self._under_way.append((updated, current))  # and so the finite check that it reads stays, too
        return torch.cuda.stream(stream)
