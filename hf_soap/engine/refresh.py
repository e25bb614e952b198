"""Refreshes that run during the next forward and backward pass."""

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
        context: Context that their rule got.
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
    """What steps leave to be refreshed: at once, or while the device runs the next forward and backward pass.

    Attributes:
        noted: Tensors that the current step has updated.
        in_progress: What is being refreshed on another stream, and the stream that it was launched from.
    """

    def __init__(self) -> None:
        self.noted: list[Updated] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.in_progress: list[tuple[Updated, torch.cuda.Stream]] = []

    def finish(self) -> None:
        """Refreshes what is due of the noted tensors."""
        for one in self.noted:
            if any(one.bucket.plan.rule.due(one.context)):
                with self._on_side_stream(one):
                    one.refresh()

    def join(self) -> None:
        """Makes the device wait for the refreshes in progress; the host does not wait."""
        for updated, launched_from in self.in_progress:
            device = updated.bucket.params[0].device
            for stream in (launched_from, torch.cuda.current_stream(device)):
                stream.wait_stream(self._streams[device])
        self.in_progress = []

    def _on_side_stream(self, updated: Updated) -> AbstractContextManager[object]:
        """On a GPU, runs refreshes that may overlap on a separate stream, after all work launched so far."""
        bucket = updated.bucket
        device = bucket.params[0].device
        if device.type != "cuda" or not bucket.plan.overlaps:
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        stream.wait_stream(current)
        for stack in bucket.stacks.values():
            stack.record_stream(stream)  # if the optimizer is dropped now, their memory must not be reused yet
        self.in_progress.append((updated, current))
        return torch.cuda.stream(stream)
