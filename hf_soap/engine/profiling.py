"""What the step loop measures of itself where somebody asked for that."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hf_soap.rules.context import RuleMetrics

Sums = dict[str, float]


class Stopwatch:
    """Adds up time: of the host, or on a CUDA device between events that are read once it has passed them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Adds the time that its block takes on a device."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((begin, end))
        self._collect(wait=False)  # so that their number stays small however rarely somebody reads

    def take(self) -> float:
        """Returns the seconds since the last call."""
        self._collect(wait=True)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _collect(self, *, wait: bool) -> None:
        while self._events and (wait or self._events[0][1].query()):
            begin, end = self._events.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3


class RecordingMetrics(RuleMetrics):
    """Sums since the last reading. They stay on their device, so that no step waits for it.

    Args:
        profiler: Knows which steps are due.
    """

    def __init__(self, profiler: StepProfiler) -> None:
        self._profiler = profiler
        self._refreshes = Stopwatch()
        self._counts: Sums = {}
        self._sums: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def watches(self) -> bool:  # type: ignore[override]
        """Whether this step is due."""
        return self._profiler.due

    def watching(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Measures how far the block moves weights, in the steps that are due."""
        return self._watch(weights) if self.watches else nullcontext()

    @contextmanager
    def _watch(self, weights: Sequence[Tensor]) -> Iterator[None]:
        dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
        before = [weight.clone() for weight in weights]
        lengths = torch._foreach_norm(before, 2, dtype)
        yield
        torch._foreach_sub_(before, list(weights))
        self._add("weight", _square_sum(lengths))
        self._add("update", _square_sum(torch._foreach_norm(before, 2, dtype)))
        self._count("entries", sum(weight.numel() for weight in weights))

    def refreshing(self, device: torch.device) -> AbstractContextManager[None]:
        """Times a refresh of bases or roots."""
        return self._refreshes.running(device)

    def rotated(self, rotation: Tensor, factor: Tensor) -> None:
        """Adds arccos Σ λ_j |Q̃_jj| / Σ λ_j of each basis: an angle between old and new vectors.

        Nothing determines the vectors of a null space, and a refresh turns them at random: they have no eigenvalue to
        count by.
        """
        values = factor.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        cosines = rotation.diagonal(dim1=-2, dim2=-1).abs()
        mean = (values * cosines).sum(-1) / values.sum(-1).clamp_(min=torch.finfo(values.dtype).tiny)
        self._add("rotation", mean.clamp_(max=1.0).acos_().sum())
        self._count("rotations", len(rotation))

    def replaced(self, old: Tensor, new: Tensor) -> None:
        """Adds ‖new - old‖_F / ‖old‖_F of each root; the first ones are zero, and there is nothing to compare."""
        before, moved = (root.flatten(1).norm(dim=1) for root in (old, new - old))
        known = before > 0
        self._add("root_change", torch.where(known, moved / before, 0.0).sum())
        self._add("roots", known.to(before.dtype).sum())

    def take(self) -> Sums:
        """Returns the sums since the last call, by name."""
        sums = {**self._counts, "refresh": self._refreshes.take()}
        alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for (name, device, dtype), value in self._sums.items():
            alike.setdefault((device, dtype), []).append((name, value))
        for pairs in alike.values():
            numbers = torch.stack([value for _, value in pairs]).tolist()
            for (name, _), number in zip(pairs, numbers, strict=True):
                sums[name] = sums.get(name, 0.0) + number
        self._counts.clear()
        self._sums.clear()
        return sums

    def _count(self, name: str, number: int) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + number

    def _add(self, name: str, value: Tensor) -> None:
        key = name, value.device, value.dtype
        if key in self._sums:
            self._sums[key].add_(value)  # in place: it may be read on one stream and raised on another
        else:
            self._sums[key] = value


def _square_sum(norms: Sequence[Tensor]) -> Tensor:
    return norms[0].square() if len(norms) == 1 else torch.stack(list(norms)).square().sum()


class StepProfiler:
    """Measures the optimizer that has it: refreshes in all steps, the change of the weights in those that are due.

    Attributes:
        due: Whether the coming steps measure how far they move the weights.
    """

    def __init__(self) -> None:
        self.due = False
        self._step = Stopwatch()
        self._steps = 0
        self._metrics: dict[str, RecordingMetrics] = {}

    def of(self, rule: str) -> RuleMetrics:
        """Returns what is recorded of a rule."""
        if rule not in self._metrics:
            self._metrics[rule] = RecordingMetrics(self)
        return self._metrics[rule]

    def stepping(self, device: torch.device) -> AbstractContextManager[None]:
        """Times a step."""
        self._steps += 1
        return self._step.running(device)

    def take(self) -> tuple[Sums, dict[str, Sums]]:
        """Returns number and seconds of the steps since the last call, and the sums of each rule."""
        rules = {rule: metrics.take() for rule, metrics in self._metrics.items()}
        steps, self._steps = self._steps, 0
        return {"steps": steps, "step": self._step.take()}, rules
