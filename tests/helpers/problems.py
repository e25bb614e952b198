"""Small problems with full-rank gradients, shared by the parity tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Problem:
    """Weights of given shapes and a smooth gradient that depends on them, plus full-rank noise drawn at each call."""

    def __init__(self, *shapes: tuple[int, ...], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(shape, generator=generator, dtype=torch.float64) / 4 for shape in shapes]
        self.targets = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.noise = torch.Generator().manual_seed(seed + 1)

    def gradients(self, weights: list[Tensor]) -> list[Tensor]:
        noise = [torch.randn(w.shape, generator=self.noise, dtype=torch.float64) for w in weights]
        return [
            torch.tanh(w - t) + 0.3 * n + 0.1 * n * w for w, t, n in zip(weights, self.targets, noise, strict=True)
        ]


class Reference(Protocol):
    weights: list[Tensor]

    def step(self, grads: list[Tensor]) -> None: ...


def largest_difference(
    shapes: list[tuple[int, ...]],
    optimizer_of: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    reference_of: Callable[[list[Tensor]], Reference],
    *,
    steps: int,
    after_first: Callable[[torch.optim.Optimizer, list[torch.nn.Parameter], Reference], None] | None = None,
) -> float:
    """Runs both implementations on their own weights and the same noise; returns the largest relative difference."""
    ours, theirs = Problem(*shapes), Problem(*shapes)
    params = [torch.nn.Parameter(w.clone()) for w in ours.weights]
    optimizer, reference = optimizer_of(params), reference_of([w.clone() for w in theirs.weights])
    worst = 0.0
    for step in range(steps):
        for param, grad in zip(params, ours.gradients([p.detach() for p in params]), strict=True):
            param.grad = grad
        optimizer.step()
        reference.step(theirs.gradients(reference.weights))
        if after_first is not None and step == 0:
            after_first(optimizer, params, reference)
        for param, weight in zip(params, reference.weights, strict=True):
            worst = max(worst, float((param.detach() - weight).abs().max() / weight.abs().max()))
    for param, weight in zip(params, ours.weights, strict=True):
        assert float((param.detach() - weight).abs().max()) > 0.05, "says nothing if the weights stay where they were"
    return worst
