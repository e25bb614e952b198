"""Textbook AdamW, Lion and MARS in float64: slow loops, one matrix at a time.

Companion of soap.py: written from the equations of the papers, and sharing no code with the rest of the package.

Sources:
    MARS: Yuan et al., arXiv:2411.10438 (AdamW, Lion and Shampoo instances). MARS-M: arXiv:2510.21800.
    AdamW: Loshchilov and Hutter, arXiv:1711.05101. Lion: Chen et al., arXiv:2302.06675.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_soap.reference.soap import float64_copies

# ---------------------------------------------------------------------------------------------------------------------
# AdamW and Lion
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """State of Adam and Lion for one parameter."""

    m: Tensor
    v: Tensor
    t: int = 0


def zero_moments(weights: Sequence[Tensor]) -> list[Moments]:
    return [Moments(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]


def adam_direction(state: Moments, grad: Tensor, *, betas: tuple[float, float], eps: float) -> Tensor:
    """Advance m and v by `grad`; return m / ((sqrt(v) / sqrt(1 - beta2^t) + eps) (1 - beta1^t))."""
    beta1, beta2 = betas
    state.m = beta1 * state.m + (1 - beta1) * grad
    state.v = beta2 * state.v + (1 - beta2) * grad * grad
    denominator = state.v.sqrt() / math.sqrt(1 - beta2**state.t) + eps
    return state.m / (denominator * (1 - beta1**state.t))


class ReferenceAdamW:
    """AdamW: W <- W - lr (direction + lambda W).

    Source: arXiv:1711.05101, Algorithm 2.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.weights = float64_copies(weights)
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.state = zero_moments(self.weights)

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            state.t += 1
            direction = adam_direction(state, grad.detach().to(torch.float64), betas=self.betas, eps=self.eps)
            weight = self.weights[index]
            self.weights[index] = weight - lr * (direction + self.weight_decay * weight)


class ReferenceLion:
    """Lion: W <- W - lr (sign(beta1 m + (1 - beta1) g) + lambda W), then m <- beta2 m + (1 - beta2) g.

    Source: arXiv:2302.06675, Algorithm 2.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        self.weights = float64_copies(weights)
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.state = zero_moments(self.weights)

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        beta1, beta2 = self.betas
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            grad = grad.detach().to(torch.float64)
            direction = (beta1 * state.m + (1 - beta1) * grad).sign()
            weight = self.weights[index]
            self.weights[index] = weight - lr * (direction + self.weight_decay * weight)
            state.m = beta2 * state.m + (1 - beta2) * grad


# ---------------------------------------------------------------------------------------------------------------------
# MARS
# ---------------------------------------------------------------------------------------------------------------------


def mars_correction(grad: Tensor, previous_grad: Tensor, *, beta1: float, gamma: float, clip: bool = True) -> Tensor:
    """The gradient of MARS, c = g + gamma beta1 / (1 - beta1) (g - g'), clipped to norm 1: c / max(1, ||c||_2).

    Source: arXiv:2411.10438, equations of c_t and of its clipping.
    """
    corrected = grad + gamma * beta1 / (1 - beta1) * (grad - previous_grad)
    if clip:
        corrected = corrected / max(1.0, corrected.norm().item())
    return corrected


class MarsCorrection:
    """The correction of one parameter's gradients, and the stored g'.

    In approximate MARS, g' is the gradient of the previous step. In exact MARS, the caller passes g', the current
    minibatch's gradient at the previous weights. At a parameter's first gradient g' = 0 in both.
    """

    def __init__(self, *, beta1: float, gamma: float, clip: bool, exact: bool) -> None:
        self.beta1 = beta1
        self.gamma = gamma
        self.clip = clip
        self.exact = exact
        self.previous_grad: Tensor | None = None

    def __call__(self, grad: Tensor, at_previous_weights: Tensor | None) -> Tensor:
        if self.previous_grad is None:
            previous_grad = torch.zeros_like(grad)
        elif not self.exact:
            previous_grad = self.previous_grad
        elif at_previous_weights is not None:
            previous_grad = at_previous_weights.detach().to(torch.float64)
        else:
            raise ValueError("exact MARS needs the gradient at the previous weights from the second step on")
        self.previous_grad = grad.clone()
        return mars_correction(grad, previous_grad, beta1=self.beta1, gamma=self.gamma, clip=self.clip)


def newton_schulz_5(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """Five quintic Newton-Schulz steps towards UV^T, in the dtype of `matrix`.

    Source: arXiv:2411.10438, MARS-Shampoo; coefficients from Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix / (matrix.norm() + eps)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        big_a = x @ x.T
        big_b = big_a @ x
        x = a * x + b * big_b + c * big_a @ big_b
    return x.T if tall else x


class ReferenceMARS:
    """MARS-AdamW, MARS-Lion, MARS-Shampoo and MARS-M ("adamw", "lion", "shampoo", "m").

    They update two-dimensional parameters. Others follow plain AdamW with lr_1d, betas_1d and weight_decay_1d, unless
    `optimize_1d`.

    Choices where the sources do not say:
        - A step counts for a parameter if it has a gradient, even a zero one.
        - "Newton-Schulz of m" divides by the norm plus `ns_eps`, which is `eps` unless given, and stays in float64.
        - `as_1d` lists parameters (by index) that are treated like vectors: embeddings and head in MARS-M.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        rule: str = "adamw",
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        clip: bool = True,
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        ns_eps: float | None = None,
        as_1d: Collection[int] = (),
    ) -> None:
        self.weights = float64_copies(weights)
        self.rule = rule
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.optimize_1d = optimize_1d
        self.lr_1d = lr_1d
        self.betas_1d = betas_1d
        self.weight_decay_1d = weight_decay_1d
        self.ns_eps = eps if ns_eps is None else ns_eps
        self.as_1d = as_1d
        self.state = zero_moments(self.weights)
        self.corrections = [MarsCorrection(beta1=betas[0], gamma=gamma, clip=clip, exact=exact) for _ in self.weights]

    def step(
        self,
        grads: Sequence[Tensor | None],
        lr: float | None = None,
        previous_grads: Sequence[Tensor | None] | None = None,
    ) -> None:
        """One step.

        Args:
            grads: Gradients at the current weights.
            lr: The scheduled learning rate; lr_1d changes in proportion.
            previous_grads: Exact MARS only: the same minibatch's gradients at the previous weights.
        """
        lr = self.lr if lr is None else lr
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            state = self.state[index]
            weight = self.weights[index]
            grad = grad.detach().to(torch.float64)
            state.t += 1
            two_dimensional = weight.dim() == 2 and index not in self.as_1d

            if not two_dimensional and not self.optimize_1d:
                lr_1d = lr * (self.lr_1d / self.lr)
                direction = adam_direction(state, grad, betas=self.betas_1d, eps=self.eps)
                self.weights[index] = weight - lr_1d * (direction + self.weight_decay_1d * weight)
                continue

            corrected = self.corrections[index](grad, previous_grads[index] if previous_grads else None)
            direction = self._direction(state, corrected, two_dimensional)
            self.weights[index] = weight - lr * (direction + self.weight_decay * weight)

    def _direction(self, state: Moments, corrected: Tensor, two_dimensional: bool) -> Tensor:
        """The rule's direction from c~.

        Source: arXiv:2411.10438 (MARS-AdamW, MARS-Lion, MARS-Shampoo); arXiv:2510.21800 (MARS-M).
        """
        if self.rule == "adamw" or (self.rule in ("shampoo", "m") and not two_dimensional):
            return adam_direction(state, corrected, betas=self.betas, eps=self.eps)
        beta1 = self.betas[0]
        state.m = beta1 * state.m + (1 - beta1) * corrected
        if self.rule == "lion":
            return state.m.sign()
        rows, cols = corrected.shape
        if self.rule == "shampoo":
            return math.sqrt(max(1.0, rows / cols)) * newton_schulz_5(state.m / (1 - beta1), self.ns_eps)
        if self.rule == "m":
            return 0.2 * math.sqrt(max(rows, cols)) * newton_schulz_5(state.m, self.ns_eps)
        raise ValueError(f"rule must be adamw, lion, shampoo or m, got {self.rule!r}")


class SteppedByGradients(Protocol):
    """The interface of every reference here."""

    weights: list[Tensor]

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None: ...


class ReferenceMarsInFront:
    """The MARS correction before any other reference: MARS-SOAP when `inner` is a ReferenceSOAP.

    `inner` receives c~ instead of g, so SOAP also seeds from c~ and accumulates c~. Every tensor is corrected; with
    `optimize_1d` False, only two-dimensional ones.
    """

    def __init__(
        self,
        inner: SteppedByGradients,
        *,
        beta1: float,
        gamma: float = 0.025,
        clip: bool = True,
        exact: bool = False,
        optimize_1d: bool = True,
    ) -> None:
        self.inner = inner
        self.optimize_1d = optimize_1d
        self.corrections = [MarsCorrection(beta1=beta1, gamma=gamma, clip=clip, exact=exact) for _ in inner.weights]

    @property
    def weights(self) -> list[Tensor]:
        return self.inner.weights

    def step(
        self,
        grads: Sequence[Tensor | None],
        lr: float | None = None,
        previous_grads: Sequence[Tensor | None] | None = None,
    ) -> None:
        corrected: list[Tensor | None] = []
        for index, grad in enumerate(grads):
            if grad is None or (grad.dim() != 2 and not self.optimize_1d):
                corrected.append(grad)
                continue
            grad = grad.detach().to(torch.float64)
            corrected.append(self.corrections[index](grad, previous_grads[index] if previous_grads else None))
        self.inner.step(corrected, lr=lr)
