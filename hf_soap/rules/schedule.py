"""When bases and roots are refreshed, and how roots that are computed in the background are installed."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from hf_soap.rules.base import State
from hf_soap.rules.context import BackgroundJobs, Roots, StepContext, adjacent
from hf_soap.rules.layout import Layout


@dataclass(frozen=True)
class Schedule:
    """At which updates refreshes are due: a function of the number of the update alone.

    Attributes:
        every: Updates between two refreshes.
        stagger: Refresh tensor number i by i updates earlier, so that not all refreshes fall on the same step.
        growth: If positive, the distance to the next refresh is this share of the updates so far, rounded down, but at
            least 1 and at most ``every``: refreshes are frequent at first.
    """

    every: int
    stagger: bool = False
    growth: float = 0.0

    def numbers(self, context: StepContext) -> list[int | None]:
        """Returns for each tensor the number of the refresh that is due, counted from 1, or None."""
        return [self._number(t, index) for t, index in zip(context.t, context.index, strict=True)]

    def last(self, t: int, index: int) -> int:
        """Returns the latest update up to ``t`` at which a refresh was due, if the distances do not grow."""
        return t - (t + index * self.stagger) % self.every

    @cached_property
    def early(self) -> tuple[int, ...]:
        """The updates, from 0, at which refreshes are due until they are ``every`` updates apart."""
        times = [0]
        while self.growth and (distance := max(1, int(self.growth * times[-1]))) < self.every:
            times.append(times[-1] + distance)
        return tuple(times)

    def _number(self, t: int, index: int) -> int | None:
        """Returns the number of the refresh of a tensor that is due at an update."""
        number, start, end = self._interval(t)
        due = end - (index % (end - start) if self.stagger else 0)
        return number if t == due else None

    def _interval(self, t: int) -> tuple[int, int, int]:
        """Returns the number of the refresh that ends an update's interval, and its bounds, the first excluded."""
        place = bisect_left(self.early, t)
        if 0 < place < len(self.early):
            return place, self.early[place - 1], self.early[place]
        number, rest = divmod(t - 1 - self.early[-1], self.every)
        return len(self.early) + number, t - 1 - rest, t - 1 - rest + self.every


class HasRoots(Protocol):
    """A rule that keeps an inverse root of each factor."""

    def snapshot(self, state: State, context: StepContext) -> Roots:
        """Returns what the roots are computed from, by the role of the root."""

    def compute_roots(self, state: State, context: StepContext) -> None:
        """Computes the roots and installs them."""

    def background_roots(self, factors: Roots, layout: Layout) -> Roots:
        """Computes roots outside the training loop."""

    def install(self, new: Roots | None, state: State, context: StepContext) -> None:
        """Replaces the roots."""


@dataclass(frozen=True)
class RootSchedule:
    """When the roots of a tensor are computed, and where: in the step, or in the background.

    Attributes:
        schedule: The refreshes after the first one.
        first: The update at which roots are first computed, always in the step: there are none to use meanwhile.
        is_dense: Whether they are computed at every update up to the first.
        delay: Updates from a snapshot to the use of its roots; 0 computes in the step, None uses them when they are
            done.
    """

    schedule: Schedule
    first: int
    is_dense: bool
    delay: int | None

    def refresh(self, rule: HasRoots, state: State, context: StepContext) -> None:
        """Computes the roots that are due, or starts and ends their background work.

        Args:
            rule: Whose roots they are.
            state: State of the tensors, changed in place.
            context: The step.
        """
        early = [t <= self.first if self.is_dense else t == self.first for t in context.t]
        numbers = self.schedule.numbers(context)
        due = [t > self.first and number is not None for t, number in zip(context.t, numbers, strict=True)]
        background = context.background
        if self.delay == 0 or background is None:
            early = [one or other for one, other in zip(early, due, strict=True)]
        for blocks, part in context.subbatches(early):
            rule.compute_roots({role: value[blocks] for role, value in state.items()}, part)
        if self.delay != 0 and background is not None:
            for start, end in adjacent([t > self.first for t in context.t], longest=1):
                flags = [start <= place < end for place in range(len(context.t))]
                for blocks, part in context.subbatches(flags):
                    own = {role: value[blocks] for role, value in state.items()}
                    self._refresh_later(rule, own, part, background, is_due=due[start])

    def _refresh_later(
        self, rule: HasRoots, state: State, context: StepContext, background: BackgroundJobs, *, is_due: bool
    ) -> None:
        """Installs the background roots of one tensor, and starts the next background job."""
        t, key = context.t[0], context.index[0]
        if self.delay is None:
            # Waiting when the next roots are due limits their age to two periods.
            rule.install(background.take(key, wait=is_due), state, context)
            if is_due:
                snapshot = {role: value.clone() for role, value in rule.snapshot(state, context).items()}
                background.submit(key, lambda factors: rule.background_roots(factors, context.layout), snapshot)
            return
        age = t - self.schedule.last(t - 1, key)
        if age <= self.delay and t - age > self.first:
            if not background.pending(key):  # a resumed run: the snapshot of the job is in the state
                self._submit_snapshot(rule, state, context, background)
            if age == self.delay:
                rule.install(background.take(key, wait=True), state, context)
        if is_due:
            for role, factor in rule.snapshot(state, context).items():
                state[role.replace("root", "snapshot")].copy_(factor)
            self._submit_snapshot(rule, state, context, background)

    def _submit_snapshot(self, rule: HasRoots, state: State, context: StepContext, background: BackgroundJobs) -> None:
        snapshot = {f"root_{side}": state[f"snapshot_{side}"].clone() for side in context.layout.sides}
        background.submit(context.index[0], lambda factors: rule.background_roots(factors, context.layout), snapshot)
