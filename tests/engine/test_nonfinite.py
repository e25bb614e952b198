"""Steps under a verdict that only the device knows: the host goes on, and what must not count is put back.

On GPUs this is how steps are taken. Here the CPU plays the device, which hears of nothing a step earlier either.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family import Row, rows, trained
from helpers import assert_same, gradient, parameters, snapshot, train
from torch.nn import Parameter

from hf_soap import MARS, SOAP
from hf_soap.engine.nonfinite import ASYNC_DEVICES


@pytest.fixture
def deferring() -> Iterator[None]:
    ASYNC_DEVICES.add("cpu")
    yield
    ASYNC_DEVICES.remove("cpu")


def spoil(params: list[Parameter], step: int, bad: float) -> None:
    for place, param in enumerate(params):
        param.grad = gradient(param, place, step)
    params[-1].grad[1, 2] = bad  # type: ignore[index]


@rows
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_a_step_that_must_not_count_leaves_no_trace(row: Row, bad: float, deferring: None) -> None:
    params, optimizer = trained(row, steps=4)
    before, counts = snapshot(optimizer, params), optimizer.skipped_steps
    spoil(params, 4, bad)
    optimizer.step()
    assert optimizer.skipped_steps == counts + 1
    assert_same(snapshot(optimizer, params), before)


@rows
def test_the_host_hears_of_it_before_the_next_step(row: Row, deferring: None) -> None:
    """Counts, due refreshes and bias corrections are those of a run that never saw the bad gradients."""
    params, optimizer = trained(row, steps=3)
    for _ in range(2):
        spoil(params, 3, torch.nan)
        optimizer.step()
    train(optimizer, params, range(3, 9))
    others, other = trained(row, steps=3)
    train(other, others, range(3, 9))
    assert_same(snapshot(optimizer, params), snapshot(other, others))
    assert optimizer.skipped_steps == 2


@rows
def test_the_first_gradients_may_be_bad(row: Row, deferring: None) -> None:
    params = parameters()
    optimizer = row(params)
    spoil(params, 0, torch.nan)
    optimizer.step()
    train(optimizer, params, range(5))
    others, other = trained(row, steps=5)
    assert_same(snapshot(optimizer, params), snapshot(other, others))


@rows
def test_it_is_the_same_run_to_rounding(row: Row) -> None:
    """In float64: in float32 some processors round a nearly singular factor's root to 0.3 % of difference."""
    params, optimizer = trained(row, dtype=torch.float64)
    ASYNC_DEVICES.add("cpu")
    try:
        others, other = trained(row, dtype=torch.float64)
    finally:
        ASYNC_DEVICES.remove("cpu")
    for one, two in zip(params, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
    assert other.skipped_steps == optimizer.skipped_steps == 0


@pytest.mark.parametrize("read", ["state_dict", "deepcopy", "load_state_dict"])
def test_state_is_read_behind_the_verdict(read: str, deferring: None) -> None:
    params, optimizer = trained(SOAP, steps=4)
    step = int(optimizer.state[params[-1]]["step"])
    spoil(params, 4, torch.nan)
    optimizer.step()
    if read == "state_dict":
        saved = optimizer.state_dict()
        # An empty parameter has no gradient to count.
        assert {int(entry["step"]) for entry in saved["state"].values() if entry["exp_avg"].numel()} == {step}
    elif read == "deepcopy":
        copied = copy.deepcopy(optimizer)
        assert {int(entry["step"]) for param, entry in copied.state.items() if param.numel()} == {step}
    else:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert int(optimizer.state[params[-1]]["step"]) == step


def test_rounded_state_is_put_back(deferring: None) -> None:
    params, optimizer = trained(SOAP, steps=4, state_dtype="bfloat16", pack_factors=True)
    before = snapshot(optimizer, params)
    spoil(params, 4, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(snapshot(optimizer, params), before)


def test_exact_mars_keeps_the_weights_it_had(deferring: None) -> None:
    param = Parameter(torch.ones(4, 4))
    optimizer = MARS([param], exact=True)
    for bad in (1.0, 1.0, torch.nan):
        before = copy.deepcopy(optimizer.state_dict())
        param.grad = torch.full((4, 4), bad)
        with optimizer.at_previous_weights():
            param.grad = torch.full((4, 4), 1.0)
        optimizer.step()
    after = optimizer.state_dict()
    for role, value in before["state"][0].items():
        assert torch.equal(after["state"][0][role], value), role


def test_a_first_step_that_did_not_count_leaves_exact_mars_no_weights(deferring: None) -> None:
    """The host had counted it already, and the second backward pass went to weights of zero."""
    param = Parameter(torch.ones(4, 4))
    optimizer = MARS([param], exact=True)
    param.grad = torch.full((4, 4), torch.nan)
    with optimizer.at_previous_weights():
        param.grad = torch.ones(4, 4)
    optimizer.step()
    param.grad = torch.ones(4, 4)
    with optimizer.at_previous_weights():
        assert torch.equal(param, torch.ones(4, 4))
    assert not optimizer.has_previous_weights


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"kl": True}, {"one_sided": True, "factorized": True}, {"stagger": True}])
def test_no_step_waits_for_the_device_once_all_is_seeded(options: dict[str, Any]) -> None:
    params = [Parameter(torch.randn(64, 48, device="cuda")), Parameter(torch.randn(48, device="cuda"))]
    optimizer = SOAP(params, precondition_frequency=2, **options)
    grads = [[torch.randn_like(param) for param in params] for _ in range(8)]
    for step, given in enumerate(grads):
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 0
