"""Shampoo: gradients times inverse roots of their Kronecker factors, with the techniques of Scalable Shampoo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from hf_soap.linalg import elementwise, inverse_roots, matrices
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment, square, vector
from hf_soap.rules.context import Roots, StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.schedule import RootSchedule, Schedule

Graft = Literal["adam", "adagrad", "rmsprop", "sgd"]


@dataclass(frozen=True, kw_only=True)
class ShampooRule(Rule):
    """Multiplies every axis of the gradient by an inverse root of its factor, and borrows its length by grafting.

    An axis longer than ``max_precond_dim`` keeps only its factor's diagonal. A tensor without any factor follows the
    grafted rule. If nothing is grafted, it is preconditioned by its diagonals.

    Attributes:
        beta1: Decay rate of the gradient's moving average, which is preconditioned; 0 takes the gradient itself.
        beta2: Decay rate of the grafted rule's second moment.
        shampoo_beta: Decay rate of the factors; None sums them.
        eps: Added to the root of the grafted rule's second moment; with ``kl`` to the root of the
            factors' product.
        precondition_frequency: Updates between two computations of the roots.
        exponent: Power of each factor; None takes -1/(2k) for k axes, or -1/2 with ``kl``.
        graft: Rule whose step length each tensor gets.
        root_method: ``"eigh"`` or ``"newton"``.
        ridge: Added to each factor, relative to its largest eigenvalue.
        root_cutoff: Eigenvalues of a factor below this share of its largest are mapped to 0.
        start_step: The first update with preconditioning. Earlier updates follow the grafted rule, or the plain
            gradient.
        momentum: Heavy ball on the direction.
        correct_bias: Debias moving averages.
        one_sided: The layout factors one side of a matrix only, and the other side gets no diagonal either.
        stagger: Shift the computation of the roots of tensor i by i updates.
        refresh_growth: Share of the updates so far after which the next roots come, if that is earlier; 0 is off.
        kl: Whiten the gradient by the other factors before it enters a factor (KL-Shampoo).
        delay: Updates between a snapshot and the use of its roots, which are computed in the background meanwhile. 0
            computes them in the step; None uses roots as soon as they are done.

    Source:
        Shampoo, arXiv:1802.09568; Scalable Shampoo, arXiv:2002.09018; the filtered gradient and grafting as in
        Distributed Shampoo, arXiv:2309.06497; KL-Shampoo, arXiv:2509.03378.
    """

    roles = ("exp_avg", "exp_avg_sq", "momentum", "factor", "root", "snapshot", "diagonal")

    beta1: float
    beta2: float
    shampoo_beta: float | None
    eps: float
    precondition_frequency: int
    exponent: float | None
    graft: Graft | None
    root_method: Literal["eigh", "newton"]
    ridge: float
    start_step: int
    root_cutoff: float = 0.0
    momentum: float = 0.0
    correct_bias: bool = True
    one_sided: bool = False
    stagger: bool = False
    refresh_growth: float = 0.0
    kl: bool = False
    delay: int | None = 0

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares factors, roots and moments, as far as the settings need them."""
        moments = {"exp_avg": self.beta1 > 0, "momentum": self.momentum > 0}
        moments["exp_avg_sq"] = self.graft not in (None, "sgd")
        specs = {role: moment(layout) for role, used in moments.items() if used}
        for side in layout.sides:
            specs[f"factor_{side}"] = square("factor", layout, side, is_mean=self.kl)
            specs[f"root_{side}"] = square("root", layout, side)
            if self.delay:
                specs[f"snapshot_{side}"] = square("factor", layout, side, is_mean=self.kl, may_round=False)
        return specs | {f"diagonal_{axis}": vector(layout, axis, is_mean=self.kl) for axis in self._diagonals(layout)}

    def traits(self, layout: Layout) -> Traits:
        """Leading zero gradients are skipped, since zero factors have no inverse root.

        The first gradient of KL-Shampoo only determines the scale of the factors, which are means over whitened
        entries. So the entries of its directions keep a fixed size.
        """
        return Traits(
            first_grad_seeds=self.kl,
            skips_leading_zero_grads=True,
            is_elementwise=not layout.sides and self.graft is not None,  # only the grafted rule
            is_spectral=bool(layout.sides) and self.graft is None and not self.kl and self._keeps_scale(layout),
        )

    def rebuild(self, state: State, context: StepContext) -> None:
        """Computes the roots again, if they are in use already."""
        for blocks, part in context.subbatches(self.kl or t >= self.root_schedule.first for t in context.t):
            self.compute_roots({role: value[blocks] for role, value in state.items()}, part)

    def describe(self, layout: Layout) -> str:
        """Returns Shampoo with its number of factored sides, or the rule that replaces it."""
        sides = len(layout.sides)
        if not sides:
            return f"Shampoo: {self.graft} alone" if self.graft else "Shampoo, diagonal"
        return f"{'KL-Shampoo' if self.kl else 'Shampoo'}, {sides} side{'s' if sides > 1 else ''}"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Per side: a product and a Gram matrix, with KL a product for each other side; eigh and a product per root.

        Coupled Newton counts as eigh, though it takes several times as much: its iterations depend on the matrix.
        """
        numel, sides = math.prod(layout.block), [layout.block[side] for side in layout.sides]
        products = 4.0 + 2 * self.kl * (len(sides) - 1)
        step = 0.0 if refreshes_only else sum(products * numel * n for n in sides)
        return layout.blocks * (step + sum((9 + 2) * n**3 for n in sides) / self.precondition_frequency)

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Sets factors to multiples of the identity, whose product is the mean square of the first gradient.

        The factors of a single gradient are singular. On each side, their roots would enlarge other directions a
        thousandfold.
        """
        mean = context.matrix_square_sum(grad).div_(context.layout.matrix_numel).view(-1, 1, 1)
        mean.clamp_(min=torch.finfo(mean.dtype).tiny)
        for side in context.layout.sides:
            factor = state[f"factor_{side}"]
            factor.copy_(mean ** (1 / len(context.layout.sides)) * matrices.eye_like(factor))
        self.compute_roots(state, context)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Accumulates the factors, computes the roots that are due, preconditions and grafts."""
        layout = context.layout
        filtered = self._filtered(grad, state, context)
        grafted = self._grafted(filtered, grad, state, context)
        if not layout.sides and self.graft:
            return self._with_momentum(grafted, state)
        self._accumulate(grad, state, layout)
        if layout.sides:
            with context.metrics.refreshing(grad.device):
                self.root_schedule.refresh(self, state, context)
        direction = filtered
        for side in layout.sides:
            direction = matrices.mode_product(direction, state[f"root_{side}"], side)
        for axis in self._diagonals(layout):
            power = self._power(self._debiased(state[f"diagonal_{axis}"].unsqueeze(-1), context).squeeze(-1), layout)
            direction = direction * elementwise.along(power, axis, direction.dim())
        if self.kl:
            direction = self._within_reach(direction, context)
        if self.graft:
            wanted = context.matrix_square_sum(layout.trim(grafted))
            got = context.matrix_square_sum(layout.trim(direction))
            # Roots of zero factors, or of gradients 1e19 times smaller, give no usable direction.
            points = (got > torch.finfo(got.dtype).tiny) & got.isfinite()
            direction = torch.where(points, direction * (wanted.sqrt_() / got.sqrt()), grafted)
        for blocks, _ in context.subbatches(t < self.start_step for t in context.t):
            direction[blocks] = grafted[blocks]
        return self._with_momentum(direction, state)

    def _filtered(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        if not self.beta1:
            return grad.clone()
        average = state["exp_avg"].lerp_(grad, 1 - self.beta1)
        return average / context.per_block(lambda t: 1 - self.beta1**t if self.correct_bias else 1.0, average)

    def _grafted(self, filtered: Tensor, grad: Tensor, state: State, context: StepContext) -> Tensor:
        if self.graft in (None, "sgd"):
            return filtered.clone()
        debias = context.per_block(lambda t: (1 - self.beta2**t) ** 0.5, grad)
        kind, moment = str(self.graft), state["exp_avg_sq"]
        denominator = elementwise.graft_denominator(kind, moment, grad, beta2=self.beta2, eps=self.eps, debias=debias)
        return filtered / denominator

    def _with_momentum(self, direction: Tensor, state: State) -> Tensor:
        return state["momentum"].mul_(self.momentum).add_(direction).clone() if self.momentum else direction

    def _within_reach(self, direction: Tensor, context: StepContext) -> Tensor:
        """Shortens directions that are longer than fresh roots allow: after a spike, the old roots are too large.

        With W = G R^(-1/2) the new factor is at least (1-β) WWᵀ/n, and R is at least β times its old value. The
        squares of the entries of L^(-1/2) G R^(-1/2) then sum to at most mn / (β (1-β)), with another β for each
        further side.
        """
        beta = self.shampoo_beta or 0.0
        share = beta ** (len(context.layout.sides) - 1) * (1 - beta)
        if not share:
            return direction
        rms = (context.matrix_square_sum(context.layout.trim(direction)) / context.layout.matrix_numel).sqrt_()
        scale: Tensor = share**-0.5 / rms.clamp_(min=share**-0.5)
        return direction * scale

    def _accumulate(self, grad: Tensor, state: State, layout: Layout) -> None:
        beta, alpha = (1.0, 1.0) if self.shampoo_beta is None else (self.shampoo_beta, 1 - self.shampoo_beta)
        whitening = {side: state[f"root_{side}"] for side in layout.sides if self.kl}
        for side in layout.sides:
            whitened, weight = grad, alpha
            if self.kl:
                weight /= grad[0].numel() // layout.block[side]
                for other, root in whitening.items():
                    if other != side:
                        whitened = elementwise.squarable(matrices.mode_product(whitened, root, other))
                whitened = elementwise.without_overshoot(whitened, state[f"factor_{side}"], weight, len(whitening))
            matrices.add_gram_(state[f"factor_{side}"], whitened, side, beta=beta, alpha=weight)
        for axis in self._diagonals(layout):
            state[f"diagonal_{axis}"].mul_(beta).add_(matrices.unfold(grad, axis).square().sum(-1), alpha=alpha)

    def _diagonals(self, layout: Layout) -> list[int]:
        """Axes that keep a diagonal: those too long for a factor, and a vector's only one if nothing is grafted."""
        if self.one_sided or self.kl or (not layout.sides and self.graft):
            return []
        return [axis for axis in range(len(layout.block)) if axis not in layout.sides]

    def _exponent(self, layout: Layout) -> float:
        if self.exponent is not None:
            return self.exponent
        return -0.5 if self.kl else self._standard_exponent(layout)

    def _standard_exponent(self, layout: Layout) -> float:
        return -1 / (2 * (len(layout.sides) if self.one_sided else len(layout.view)))

    def _keeps_scale(self, layout: Layout) -> bool:
        """Whether directions do not depend on the size of gradients, which only this exponent cancels."""
        return self._exponent(layout) == self._standard_exponent(layout)

    def _power(self, diagonal: Tensor, layout: Layout) -> Tensor:
        largest = diagonal.amax(-1, keepdim=True)
        damped = diagonal + self.ridge * largest
        kept = (damped > 0) & (diagonal >= self.root_cutoff * largest)
        return torch.where(kept, damped ** self._exponent(layout), 0.0)

    def _debiased(self, factor: Tensor, context: StepContext) -> Tensor:
        if self.shampoo_beta is None or not self.correct_bias or self.kl:
            return factor
        beta = self.shampoo_beta
        return factor / context.per_block(lambda t: 1 - beta**t, factor)

    def snapshot(self, state: State, context: StepContext) -> Roots:
        """Returns the debiased and damped factors, by the role of their root."""
        factors = {f"root_{side}": self._debiased(state[f"factor_{side}"], context) for side in context.layout.sides}
        if self.kl:  # ε acts on the product of the roots as in Adam; without it a zero factor would stay zero
            damping = self.eps ** (2 / len(factors))
            for role, factor in factors.items():
                factors[role] = factor + damping * matrices.eye_like(factor)
        return factors

    def _roots_of(self, factors: Roots, layout: Layout) -> Roots:
        settings: dict[str, Any] = {"ridge": self.ridge, "method": self.root_method, "cutoff": self.root_cutoff}
        exponent = self._exponent(layout)
        return {
            role: inverse_roots.inverse_root(factor, exponent=exponent, **settings) for role, factor in factors.items()
        }

    def compute_roots(self, state: State, context: StepContext) -> None:
        """Computes the roots in the step, split among replicas, and installs them."""
        for role, factor in self.snapshot(state, context).items():
            (root,) = context.decompose(lambda part, r=role: (self._roots_of({r: part}, context.layout)[r],), factor)  # type: ignore[misc]
            self.install({role: root}, state, context)

    @cached_property
    def root_schedule(self) -> RootSchedule:
        """When roots are computed. KL-Shampoo does so at every update up to the first period.

        Its factors whiten each other: while they are inaccurate, both overshoot until the next roots.
        """
        first = self.precondition_frequency if self.kl else max(1, self.start_step)
        schedule = Schedule(self.precondition_frequency, self.stagger, self.refresh_growth)
        return RootSchedule(schedule, first, self.kl, self.delay)

    def background_roots(self, factors: Roots, layout: Layout) -> Roots:
        """Computes roots in float64, for factors that nothing changes meanwhile."""
        # In the background float64 is affordable, and the model's settings for float32 do not affect it.
        exact = self._roots_of({role: factor.double() for role, factor in factors.items()}, layout)
        return {role: root.to(factors[role].dtype) for role, root in exact.items()}

    def install(self, new: Roots | None, state: State, context: StepContext) -> None:
        """Replaces old roots with new ones. The old ones stay where no new root could be computed."""
        for role, root in (new or {}).items():
            old = state[role]
            # A root of zeros has not been computed yet; the identity takes its place.
            kept = torch.where(old.flatten(1).any(1).view(-1, 1, 1), old, matrices.eye_like(old))
            root = torch.where(context.finite_mask(root), root, kept)
            context.metrics.replaced(old, root)
            old.copy_(root)
