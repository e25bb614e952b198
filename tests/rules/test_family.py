"""Shampoo, MARS and KL-Shampoo against their textbook loops in float64, and the cases with known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem, largest_difference
from torch import Tensor

from hf_soap import MARS, SOAP, Shampoo, SoapMuon
from hf_soap.linalg import inverse_roots
from hf_soap.reference.mars import ReferenceMARS, ReferenceMarsInFront
from hf_soap.reference.shampoo import (
    ReferenceKLShampoo,
    ReferenceShampoo,
    idealized_adafactor_in_eigenbasis,
    idealized_shampoo,
)
from hf_soap.reference.soap import ReferenceSOAP
from hf_soap.reference.soap_muon import ReferenceSoapMuon

STEPS = 40
TOLERANCE = 1e-10
RIDGE = 1e-6
RENAMED = ("betas", "ridge", "statistics", "start_step", "root_method", "root_cutoff")
SQUARES = [(25, 25), (11, 11), (25, 25), (9,)]
ANY = [(12, 8), (8, 12), (9,), (6, 3, 5), (12, 8)]


def shampoo_pair(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of our Shampoo, and the same for the reference, which names some of them differently."""
    ours = {"lr": 1e-2, "weight_decay": 0.01, "ridge": RIDGE, "betas": (0.0, 0.95), "graft": None, **options}
    theirs = {key: value for key, value in ours.items() if key not in RENAMED}
    summed = ours.get("statistics") == "sum"
    start = ours.get("start_step", ours.get("precondition_frequency", 10) if ours["graft"] else 1)
    beta1, beta2 = ours["betas"]
    theirs |= {
        "eps": ours["ridge"],
        "cutoff": ours.get("root_cutoff", 0.0),
        "beta1": beta1,
        "graft_beta2": beta2,
        "beta": None if summed else beta2,
    }
    theirs |= {"start_step": start, "precondition_frequency": ours.get("precondition_frequency", 10)}
    return ours, {"correct_bias": not summed, **theirs}


@pytest.mark.parametrize("frequency", [1, 4, 10])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        pytest.param(ANY, {"statistics": "sum", "start_step": 1, "lr": 0.1}, id="original"),
        pytest.param(ANY, {}, id="ema"),
        pytest.param(ANY, {"correct_bias": False, "betas": (0.0, 0.8)}, id="ema, biased"),
        pytest.param(SQUARES, {"exponent": -0.5, "lr": 0.1}, id="exponent"),
        pytest.param(ANY, {"max_precond_dim": 8}, id="diagonal axes"),
        pytest.param(ANY, {"precondition_1d": True}, id="vectors"),
        pytest.param([(6, 3, 5, 5)], {"merge_dims": True, "max_precond_dim": 20}, id="merged"),
        pytest.param([(20, 30), (13, 24)], {"block_size": 8, "graft": "adam"}, id="blocks"),
        pytest.param(ANY, {"graft": "sgd", "lr": 0.1}, id="sgd graft"),
        pytest.param(ANY, {"graft": "adagrad", "lr": 0.05}, id="adagrad graft"),
        pytest.param(ANY, {"graft": "rmsprop"}, id="rmsprop graft"),
        pytest.param(ANY, {"graft": "adam", "betas": (0.9, 0.95)}, id="adam graft, filtered"),
        pytest.param(ANY, {"momentum": 0.9, "betas": (0.9, 0.95), "graft": "rmsprop"}, id="momentum"),
        pytest.param(ANY, {"start_step": 7, "graft": "adam"}, id="late start"),
        pytest.param([(16, 16), (16, 16), (16, 16)], {"stagger": True, "graft": "adam"}, id="staggered"),
        pytest.param(ANY, {"refresh_growth": 0.2, "start_step": 3, "graft": "adam"}, id="growing"),
        pytest.param(SQUARES, {"root_method": "newton", "ridge": 0.0}, id="newton"),
        pytest.param(ANY, {"exponent": -1 / 3, "ridge": 0.0, "root_cutoff": 1e-3}, id="pseudo-inverse"),
        pytest.param(ANY, {"max_precond_dim": 8, "root_cutoff": 0.5}, id="pseudo-inverse of diagonals"),
    ],
)
def test_shampoo_equals_the_textbook(shapes: list[tuple[int, ...]], options: dict[str, Any], frequency: int) -> None:
    ours, theirs = shampoo_pair(precondition_frequency=frequency, **options)
    # Newton stops at an accuracy of its own, and without a ridge both methods solve the same equation.
    tolerance = 1e-6 if options.get("root_method") == "newton" else TOLERANCE
    assert (
        largest_difference(shapes, lambda p: Shampoo(p, **ours), lambda w: ReferenceShampoo(w, **theirs), steps=STEPS)
        < tolerance
    )


@pytest.mark.parametrize("frequency", [1, 5])
def test_kl_shampoo_equals_the_textbook(frequency: int) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "precondition_frequency": frequency}
    difference = largest_difference(
        [(25, 25), (16, 16)],
        lambda p: Shampoo(p, betas=(0.0, 0.95), kl=True, graft=None, ridge=0.0, eps=0.0, **settings),
        lambda w: ReferenceKLShampoo(w, beta=0.95, eps_kl=1e-30, **settings),
        steps=STEPS,
    )
    assert difference < 1e-9


@pytest.mark.parametrize("optimize_1d", [False, True])
@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo", "m"])
def test_mars_equals_the_textbook(variant: str, optimize_1d: bool) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.02, "lr_1d": 4e-3, "optimize_1d": optimize_1d}
    difference = largest_difference(
        ANY,
        lambda p: MARS(p, variant=variant, weight_decay_1d=0.1, **settings),
        lambda w: ReferenceMARS(w, rule=variant, **settings),
        steps=STEPS,
    )
    assert difference < TOLERANCE


def test_mars_in_front_of_soap_equals_the_textbook() -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.95, 0.98), "precondition_frequency": 5}
    settings["refresh_growth"] = 0.2
    difference = largest_difference(
        SQUARES,
        lambda p: MARS(p, variant="soap", optimize_1d=True, gamma=0.05, **settings),
        lambda w: ReferenceMarsInFront(ReferenceSOAP(w, **settings), beta1=0.95, gamma=0.05),
        steps=STEPS,
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        pytest.param([(25, 25), (11, 11), (25, 25)], {}, id="square"),
        pytest.param([(12, 30), (30, 12)], {"one_sided": True, "kl": True}, id="one side"),
        pytest.param([(20, 30), (30, 30)], {"block_size": 10, "precondition_frequency": 5}, id="blocks"),
        pytest.param([(30, 12)], {"max_precond_dim": 12, "weight_decay": 0.1}, id="long side"),
    ],
)
def test_newton_schulz_after_soap_equals_the_textbook(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "refresh_growth": 0.2, **options}
    difference = largest_difference(
        shapes,
        lambda p: SoapMuon(p, **settings),
        lambda w: ReferenceSoapMuon(w, **settings),
        steps=STEPS,
    )
    assert difference < TOLERANCE


def test_newton_schulz_after_soap_follows_the_equation() -> None:
    """The second gradient is the first that moves a matrix, and by about equal singular values."""
    weight = torch.nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))
    optimizer = SoapMuon([weight], lr=0.1, weight_decay=0.0)
    problem = Problem((9, 4))
    for _ in range(2):
        assert not weight.any()
        (weight.grad,) = problem.gradients([weight.detach()])
        optimizer.step()
    values = torch.linalg.svdvals(weight.detach()) / (0.1 * 9**0.5 / 4**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1), (6, 2, 3, 3), ()])
def test_soap_muon_leaves_what_is_not_a_matrix_to_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = (torch.nn.Parameter(Problem(shape).weights[0]) for _ in range(2))
    optimizer = SoapMuon([ours], lr=0.02, lr_1d=0.003, betas_1d=(0.8, 0.9), weight_decay_1d=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.003, betas=(0.8, 0.9), weight_decay=0.1)
    problem = Problem(shape)
    for _ in range(5):
        (ours.grad,) = problem.gradients([ours.detach()])
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


class Regression:
    """Two layers on fresh minibatches: gradients at any weights, for exact MARS."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(30, 16, 12, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(30, 16, 8, generator=generator, dtype=torch.float64)
        self.weights = [torch.randn(8, 12, generator=generator, dtype=torch.float64) / 4, torch.zeros(8).double()]

    def loss(self, weights: list[Tensor], batch: int) -> Tensor:
        return (torch.tanh(self.inputs[batch] @ weights[0].T + weights[1]) - self.targets[batch]).square().mean()

    def gradients(self, weights: list[Tensor], batch: int) -> list[Tensor]:
        weights = [weight.clone().requires_grad_() for weight in weights]
        return list(torch.autograd.grad(self.loss(weights, batch), weights))


@pytest.mark.parametrize("by", ["context", "closure"])
@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo", "m"])
def test_exact_mars_equals_the_textbook(variant: str, by: str) -> None:
    problem = Regression()
    params = [torch.nn.Parameter(weight.clone()) for weight in problem.weights]
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01, "lr_1d": 4e-3, "exact": True}
    optimizer = MARS(params, variant=variant, weight_decay_1d=0.1, **settings)
    reference = ReferenceMARS(problem.weights, rule=variant, **settings)
    previous: list[Tensor] | None = None
    for batch in range(30):

        def closure(batch: int = batch) -> float:
            optimizer.zero_grad()
            loss = problem.loss(params, batch)
            loss.backward()
            return loss.item()

        if by == "closure":
            optimizer.step(closure)
        else:
            closure()
            with optimizer.at_previous_weights():
                closure()
            optimizer.step()
        current = [weight.clone() for weight in reference.weights]
        behind = problem.gradients(previous, batch) if previous else [None, None]
        reference.step(problem.gradients(current, batch), previous_grads=behind)
        previous = current
        for param, weight in zip(params, reference.weights, strict=True):
            torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-12)


def test_exact_mars_without_its_correction_says_what_to_do() -> None:
    """A plain loop, or the plain Trainer, calls step() only: that would be MARS without variance reduction."""
    param = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MARS([param], exact=True)
    param.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="SoapTrainer"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3, 3))


def test_a_failed_second_pass_leaves_weights_and_gradients_alone() -> None:
    problem = Regression()
    params = [torch.nn.Parameter(weight.clone()) for weight in problem.weights]
    optimizer = MARS(params, exact=True)
    optimizer.step(lambda: backward(problem, params))
    weights, grads = [p.detach().clone() for p in params], problem.gradients([p.detach() for p in params], 1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    with pytest.raises(KeyError, match="second pass"), optimizer.at_previous_weights():
        raise KeyError("second pass" if not torch.equal(params[0].detach(), weights[0]) else "weights not swapped")
    for param, weight, grad in zip(params, weights, grads, strict=True):
        assert torch.equal(param.detach(), weight)
        assert param.grad is not None
        assert torch.equal(param.grad, grad)


def backward(problem: Regression, params: list[torch.nn.Parameter]) -> float:
    for param in params:
        param.grad = None
    loss = problem.loss(params, 0)
    loss.backward()
    return loss.item()


def test_shampoo_knows_the_steps_of_a_scaled_identity() -> None:
    """G = I/√2 twice, summed statistics, exponent -1/4: L = I/2 then I, so the directions are I, then I/√2."""
    param = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = Shampoo(
        [param], lr=1.0, betas=(0.0, 0.95), weight_decay=0.0, statistics="sum", graft=None, ridge=0.0,
        precondition_frequency=1, exponent=-0.25,
    )  # fmt: skip
    wanted = [torch.eye(4).double(), torch.eye(4).double() / 2**0.5]
    for direction in wanted:
        before = param.detach().clone()
        param.grad = torch.eye(4, dtype=torch.float64) / 2**0.5
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), direction, rtol=0, atol=1e-12)


KNOWN = torch.tensor([[1195.0, -944.0, -224.0], [-944.0, 746.0, 177.0], [-224.0, 177.0, 42.0]], dtype=torch.float64)
KNOWN_ROOT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, -3.0], [1.0, -3.0, 18.0]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize(
    ("matrix", "order", "root"),
    [
        pytest.param(KNOWN, 2, KNOWN_ROOT, id="3x3"),
        pytest.param(torch.tensor([1.0, 4.0]).double().diag(), 2, torch.tensor([1, 0.5]).double().diag(), id="2x2"),
    ],
)
def test_known_inverse_roots(matrix: Tensor, order: int, root: Tensor, method: str) -> None:
    got = inverse_roots.inverse_root(matrix, exponent=-1 / order, ridge=0.0, method=method)
    torch.testing.assert_close(got, root, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_pseudo_inverse_root_has_no_part_of_small_eigenvalues(ridge: float) -> None:
    basis = torch.linalg.qr(Problem((4, 4)).weights[0]).Q
    values = torch.tensor([8.0, 1.0, 0.01, 0.0], dtype=torch.float64)
    got = inverse_roots.inverse_root((basis * values) @ basis.T, exponent=-1 / 3, ridge=ridge, cutoff=0.1)
    powers = torch.tensor([(8 + 8 * ridge) ** (-1 / 3), (1 + 8 * ridge) ** (-1 / 3), 0, 0], dtype=torch.float64)
    torch.testing.assert_close(got, (basis * powers) @ basis.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("order", [2, 4, 8])
def test_inverse_roots_of_a_tridiagonal_matrix(order: int, method: str, dtype: torch.dtype) -> None:
    n = 100
    matrix = (2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)).double()
    values, basis = torch.linalg.eigh(matrix)
    root = (basis * values ** (-1 / order)) @ basis.T
    got = inverse_roots.inverse_root(matrix.to(dtype), exponent=-1 / order, ridge=0.0, method=method).double()
    # In float32 an eigenvalue is off by eps·λ_max whatever the method: eps times the condition number, 4133.
    assert float((got - root).norm() / root.norm()) < (1e-4 if dtype == torch.float64 else 5e-4)


def test_newton_solves_a_batch_as_it_solves_each_and_leaves_hard_ones_to_eigh() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(4, 12, 30, generator=generator, dtype=torch.float64)
    batch = halves @ halves.mT
    batch[1] *= 1e-20
    batch[2] = 0.0
    batch[3, :, 0] = batch[3, 0, :] = 0.0  # singular: Newton cannot converge, the pseudo-inverse root exists
    got = inverse_roots.inverse_root(batch, exponent=-0.25, ridge=0.0, method="newton")
    for matrix, root in zip(batch, got, strict=True):
        alone = inverse_roots.inverse_root(matrix, exponent=-0.25, ridge=0.0)
        torch.testing.assert_close(root, alone, rtol=1e-6, atol=1e-6 * float(alone.abs().max() + 1e-30))
    assert not inverse_roots.coupled_newton(batch, order=4, ridge=0.0)[1][3]


def test_shampoo_with_power_one_half_is_adafactor_in_the_eigenbasis() -> None:
    """The SOAP paper's claim 1 (arXiv:2409.11321), with the package's own inverse roots on Shampoo's side."""
    generator = torch.Generator().manual_seed(0)
    sample = [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(40)]
    grad = sample[0]
    left = torch.stack([g @ g.T for g in sample]).mean(0)
    right = torch.stack([g.T @ g for g in sample]).mean(0) / left.trace()
    one, other = (inverse_roots.inverse_root(factor, exponent=-0.5, ridge=0.0) for factor in (left, right))
    direction = one @ grad @ other
    torch.testing.assert_close(direction, idealized_shampoo(sample, grad), rtol=0, atol=1e-10)
    torch.testing.assert_close(direction, idealized_adafactor_in_eigenbasis(sample, grad), rtol=0, atol=1e-10)


def trajectory(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> list[Tensor]:
    problem = Problem(*[tuple(p.shape) for p in params])
    for _ in range(steps):
        for param, grad in zip(params, problem.gradients([p.detach() for p in params]), strict=True):
            param.grad = grad / 100  # keeps MARS's clip inactive
        optimizer.step()
    return [p.detach() for p in params]


def fresh() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(w) for w in Problem((9, 9), (6, 8), (5,)).weights]


def test_mars_without_correction_is_its_base() -> None:
    ours, adam = fresh(), fresh()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    got = trajectory(MARS(ours, gamma=0.0, optimize_1d=True, **settings), ours, 20)
    for weight, wanted in zip(got, trajectory(torch.optim.AdamW(adam, **settings), adam, 20), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-10)
    ours, soap = fresh(), fresh()
    got = trajectory(MARS(ours, variant="soap", gamma=0.0, optimize_1d=True, **settings), ours, 20)
    for weight, wanted in zip(got, trajectory(SOAP(soap, **settings), soap, 20), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-10)


def test_shampoo_before_its_start_step_is_the_grafted_rule() -> None:
    ours, adam = fresh(), fresh()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    got = trajectory(Shampoo(ours, start_step=21, **settings), ours, 20)
    for weight, wanted in zip(got, trajectory(torch.optim.AdamW(adam, **settings), adam, 20), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-10)
    later, adam = fresh(), fresh()
    got = trajectory(Shampoo(later, start_step=20, **settings), later, 20)
    assert not torch.allclose(got[0], trajectory(torch.optim.AdamW(adam, **settings), adam, 20)[0], rtol=0, atol=1e-4)
