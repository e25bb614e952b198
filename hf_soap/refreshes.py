"""Refreshes that come behind the step: beside the next forward pass, or after a replay of a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from hf_soap.blocks import Chunk, adjacent
from hf_soap.buckets import Bucket
from hf_soap.graphs import capturing


@dataclass(frozen=True)
class Updated:
    """Adjacent tensors of a bucket that a step has updated.

    Attributes:
        bucket: Their bucket.
        first: The first of them.
        last: One after the last.
        chunk: What their rule was told.
    """

    bucket: Bucket
    first: int
    last: int
    chunk: Chunk

    @property
    def is_due(self) -> bool:
        """Whether something is to be refreshed behind this update."""
        return any(self.bucket.plan.rule.due(self.chunk))

    def counted(self) -> Updated:
        """Returns them with the update that the host believes to be the last."""
        plan = self.bucket.plan
        counts = self.bucket.counts.believed()[self.first : self.last]
        t = tuple(count - plan.rule.seeds for count in counts)
        return replace(self, chunk=replace(self.chunk, t=t, counts=None, usable=None))

    def where(self, flags: Sequence[bool]) -> Iterator[Updated]:
        """Yields runs of them whose flag is set; there is one for each tensor of the bucket."""
        for start, end in adjacent(flags[self.first : self.last]):
            chunk = replace(self.chunk, t=self.chunk.t[start:end], index=self.chunk.index[start:end])
            yield Updated(self.bucket, self.first + start, self.first + end, chunk)

    def refresh(self) -> None:
        """Refreshes what is due."""
        bucket, chunk = self.bucket, replace(self.chunk, later=False)
        with bucket.exact_arithmetic(), bucket.stepping() as under_way:
            under_way[:] = self.first, self.last
            with bucket.working(self.first, self.last, chunk) as state:
                bucket.plan.rule.refresh(state, chunk)
            under_way[:] = 0, 0


class Refreshes:
    """What steps leave to be refreshed, at once or beside what the device does until the next step."""

    def __init__(self) -> None:
        self._updated: list[Updated] = []
        self._captured: list[Updated] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: list[Updated] = []

    def note(self, updated: Updated) -> None:
        """Takes note of tensors that a step has updated."""
        self._updated.append(updated)

    def start(self) -> None:
        """Forgets what an unfinished step has noted."""
        self._updated = []

    def finish(self) -> bool:
        """Refreshes what is due behind a step, or remembers a captured one for its replays.

        Returns:
            Whether the host has waited for the device.
        """
        if capturing():
            self._captured = self._updated
            return False
        return self._run(self._updated)

    def replayed(self) -> bool:
        """Refreshes what is due behind a replay of the step that was captured last.

        Returns:
            Whether the host has waited for the device.

        Raises:
            RuntimeError: If no step was captured.
        """
        if not self._captured:
            raise RuntimeError(
                "refresh() got no captured step, wanted one call after each replay of a graph that holds step(); "
                "step() itself refreshes outside of graphs"
            )
        for one in self._captured:
            one.bucket.counts.expect(one.first, one.last)
        return self._run(self._captured)

    def join(self) -> None:
        """Lets the device go on when the refreshes under way are done; the host does not wait."""
        for device, stream in self._streams.items() if self._under_way else ():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._under_way = []

    def _run(self, updated: Iterable[Updated]) -> bool:
        asked = False
        for bucket, parts in groupby(updated, lambda one: one.bucket):
            own = [one.counted() if bucket.counts.on_device else one for one in parts]
            if bucket.counts.on_device and any(one.is_due for one in own):
                # The host believes that every step counted; one that did not may have been the one.
                grown, asked = bucket.counts.ask(), True
                own = [run for one in own for run in one.counted().where(grown)]
            for one in own:
                if one.is_due:
                    with self._aside(one):
                        one.refresh()
        return asked

    def _aside(self, updated: Updated) -> AbstractContextManager[object]:
        """On a GPU, sends refreshes that may overlap to a stream of their own, behind all that was sent so far."""
        bucket = updated.bucket
        device = bucket.params[0].device
        if device.type != "cuda" or not bucket.plan.overlaps:
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        for stack in bucket.stacks.values():
            stack.record_stream(stream)  # whoever drops the optimizer now must not get their memory yet
        self._under_way.append(updated)  # and so the verdict that it reads stays, too
        return torch.cuda.stream(stream)
