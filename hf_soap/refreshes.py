"""Refreshes that come behind the step: beside the next forward pass, or after a replay of a CUDA graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
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
        self._capture_goes_on = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: list[tuple[Updated, torch.cuda.Stream]] = []

    def note(self, updated: Updated) -> None:
        """Takes note of tensors that a step has updated."""
        self._updated.append(updated)

    def start(self) -> None:
        """Forgets what an unfinished step has noted."""
        self._updated = []

    def finish(self) -> None:
        """Refreshes what is due behind a step, or remembers a captured one for its replays."""
        if not capturing():
            self._capture_goes_on = False
            self._run(self._updated)
            return
        self._captured = (self._captured if self._capture_goes_on else []) + self._updated
        self._capture_goes_on = True

    def replayed(self, alive: Collection[Bucket]) -> None:
        """Refreshes what is due behind a replay of the steps that were captured last.

        Args:
            alive: The buckets that the optimizer has.

        Raises:
            RuntimeError: If there are none, or the optimizer has put their state elsewhere since.
        """
        self._capture_goes_on = False
        if not self._captured or not all(one.bucket in alive for one in self._captured):
            got = "no captured step" if not self._captured else "a captured step whose state is elsewhere by now"
            raise RuntimeError(
                f"after_replay() got {got}, wanted one call after each replay of a graph that holds step(); capture "
                "(again) after loading state, and after changes of parameters or of which of them are trained"
            )
        for one in self._captured:
            one.bucket.counts.expect(one.first, one.last)
        self._run(self._captured)

    def join(self) -> None:
        """Lets the device go on when the refreshes under way are done; the host does not wait."""
        for updated, launched_from in self._under_way:
            device = updated.bucket.params[0].device
            for stream in (launched_from, torch.cuda.current_stream(device)):
                stream.wait_stream(self._streams[device])
        self._under_way = []

    def _run(self, updated: Iterable[Updated]) -> None:
        for bucket, parts in groupby(updated, lambda one: one.bucket):
            for one in _due_on_device(bucket, list(parts)) if bucket.counts.on_device else parts:
                if any(bucket.plan.rule.due(one.chunk)):
                    with self._aside(one):
                        one.refresh()

    def _aside(self, updated: Updated) -> AbstractContextManager[object]:
        """On a GPU, sends refreshes that may overlap to a stream of their own, behind all that was sent so far."""
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
        self._under_way.append((updated, current))  # and so the verdict that it reads stays, too
        return torch.cuda.stream(stream)


def _due_on_device(bucket: Bucket, parts: Sequence[Updated]) -> Iterator[Updated]:
    """Yields what is to be refreshed, as if behind the update that it was due behind.

    The host believes that every step counted, and may not have heard of every replay: where it finds something due, it
    asks.
    """
    if not bucket.plan.refreshes_later:
        return
    if any(_overdue(bucket, part.first, part.last) for part in parts):
        bucket.counts.ask()
    for part in parts:
        overdue = _overdue(bucket, part.first, part.last)
        flags = [place in overdue for place in range(part.first, part.last)]
        for start, end in adjacent(flags):
            first, last = part.first + start, part.first + end
            t = tuple(overdue[place] for place in range(first, last))
            bucket.counts.refreshed[first:last] = t
            chunk = replace(part.chunk, t=t, index=part.chunk.index[start:end], counts=None, usable=None)
            yield Updated(bucket, first, last, chunk)


def _overdue(bucket: Bucket, first: int, last: int) -> dict[int, int]:
    """Returns by place the updates of the tensors first..last-1 that a refresh should have come behind by now."""
    updates, refreshed = bucket.updates(), bucket.counts.refreshed
    due = {place: bucket.plan.rule.last_due(updates[place], bucket.index[place]) for place in range(first, last)}
    return {place: t for place, t in due.items() if t > refreshed[place]}
