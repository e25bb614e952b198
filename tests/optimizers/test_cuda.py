"""The family on a GPU: the numbers of the CPU, resumed bit for bit, and no step that waits for the device."""

import copy
from typing import Any

import pytest
import torch
from family import STEPS, TABLE, Row
from helpers import FULL_RANK, assert_same, gradient, parameters, snapshot, through_a_file
from torch import Tensor
from torch.nn import Parameter

pytestmark = pytest.mark.cuda

rows = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in TABLE.items()])
CUDA = torch.device("cuda")
WAITING = {"background", "shampoo", "original", "newton", "diagonals", "kl-shampoo", "current"}
"""Rows that wait for the device when they refresh: torch's eigh does so by itself, Newton's method and ``refresh_tol``
ask whether they are done."""

RANK_DEFICIENT = {"1-D", "merged"}
"""Rows whose factors have no more ranks than there were steps: rounding alone says what the rest of the basis is."""


def on(device: torch.device, **options: Any) -> list[Parameter]:
    return [Parameter(param.detach().to(device)) for param in parameters(**options)]


def train(optimizer: Any, params: list[Parameter], steps: range) -> None:
    """Takes the steps with gradients that are drawn on the CPU, so that they are the same on every device."""
    for step in steps:
        for place, param in enumerate(params):
            param.grad = gradient(param.detach().cpu(), place, step).to(param.device)
        optimizer.step()


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in TABLE.items() if name not in RANK_DEFICIENT]
)
def test_a_gpu_computes_what_a_cpu_does(row: Row) -> None:
    found = []
    for device in (torch.device("cpu"), CUDA):
        params = on(device, shapes=FULL_RANK, dtype=torch.float64)
        train(row(params), params, range(STEPS))
        found.append([param.detach().cpu() for param in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@rows
def test_a_resumed_run_on_a_gpu_goes_on_bit_for_bit(row: Row) -> None:
    params = on(CUDA)
    optimizer = row(params)
    train(optimizer, params, range(STEPS))
    copies = [Parameter(param.detach().clone()) for param in params]
    resumed = row(copies)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, its in ((optimizer, params), (resumed, copies)):
        train(each, its, range(STEPS, 2 * STEPS))
    assert_same(snapshot(resumed, copies), snapshot(optimizer, params))


@rows
def test_state_saved_on_a_gpu_goes_on_on_a_cpu(row: Row) -> None:
    params = on(CUDA, shapes=FULL_RANK, dtype=torch.float64)
    optimizer = row(params)
    train(optimizer, params, range(STEPS))
    copies = [Parameter(param.detach().cpu()) for param in params]
    resumed = row(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((optimizer, params), (resumed, copies)):
        train(each, its, range(STEPS, STEPS + 4))
    for one, other in zip(params, copies, strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in TABLE.items() if name not in WAITING])
def test_no_step_waits_for_the_device(row: Row) -> None:
    """One wait in a step leaves the device without work until the host has queued the next."""
    params = on(CUDA)
    optimizer = row(params, nonfinite="off")  # the check itself waits
    grads = [[torch.randn_like(param) for param in params] for _ in range(2 * STEPS)]
    for step, given in enumerate(grads):
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        torch.cuda.set_sync_debug_mode("error" if step >= STEPS else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@rows
def test_a_gradient_that_is_not_finite_changes_nothing(row: Row) -> None:
    params, others = on(CUDA), on(CUDA)
    optimizer, undisturbed = row(params), row(others)
    for step in range(STEPS):
        if step in (0, 3, 4):
            for param in params:
                param.grad = torch.full_like(param, torch.nan if step == 3 else torch.inf)
            optimizer.step()
        for each, its in ((optimizer, params), (undisturbed, others)):
            train(each, its, range(step, step + 1))
    assert optimizer.skipped_steps == 3
    assert_same(snapshot(optimizer, params), snapshot(undisturbed, others))


SQUARE = [(512, 512), (768, 768), (512,)]
"""Factors of others would miss ranks in the first steps."""


@pytest.mark.parametrize("name", ["soap", "shampoo", "mars-soap"])
def test_large_matrices_stay_close_to_float64(name: str) -> None:
    """Sizes at which other kernels run than on tiny ones.

    Rounding moves SOAP by 1 to 2 % of its way on a CPU and by 4 % on an H100: bases of noise have close eigenvalues.
    """

    def run(dtype: torch.dtype) -> list[Tensor]:
        params = on(CUDA, shapes=SQUARE, dtype=dtype)
        generator = torch.Generator(CUDA).manual_seed(0)
        optimizer = TABLE[name](params, lr=1e-3)
        for _ in range(STEPS):
            for param in params:
                noise = torch.randn(param.shape, generator=generator, device=CUDA, dtype=torch.float64)
                param.grad = noise.to(dtype)
            optimizer.step()
        return [param.detach().double() for param in params]

    start = [param.detach().double() for param in on(CUDA, shapes=SQUARE)]
    for first, one, other in zip(start, run(torch.float32), run(torch.float64), strict=True):
        moved = (other - first).norm()
        assert moved > 0
        assert (one - other).norm() < 0.1 * moved
