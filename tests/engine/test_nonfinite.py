"""Steps that are skipped for a gradient with NaN or Inf leave no trace."""

import copy

import pytest
import torch
from family import Row, rows, trained
from helpers import assert_same, gradient, parameters, snapshot, train
from torch.nn import Parameter

from hf_soap import MARS, SOAP


def spoil(params: list[Parameter], step: int, bad: float) -> None:
    for place, param in enumerate(params):
        param.grad = gradient(param, place, step)
    params[-1].grad[1, 2] = bad  # type: ignore[index]


@rows
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_a_step_that_must_not_count_leaves_no_trace(row: Row, bad: float) -> None:
    params, optimizer = trained(row, steps=4)
    before, counts = snapshot(optimizer, params), optimizer.skipped_steps
    spoil(params, 4, bad)
    optimizer.step()
    assert optimizer.skipped_steps == counts + 1
    assert_same(snapshot(optimizer, params), before)


@rows
def test_counts_and_refreshes_are_those_of_a_run_without_it(row: Row) -> None:
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
def test_the_first_gradients_may_be_bad(row: Row) -> None:
    params = parameters()
    optimizer = row(params)
    spoil(params, 0, torch.nan)
    optimizer.step()
    train(optimizer, params, range(5))
    others, other = trained(row, steps=5)
    assert_same(snapshot(optimizer, params), snapshot(other, others))


def test_rounded_state_is_put_back() -> None:
    params, optimizer = trained(SOAP, steps=4, state_dtype="bfloat16", pack_factors=True)
    before = snapshot(optimizer, params)
    spoil(params, 4, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(snapshot(optimizer, params), before)


def test_exact_mars_keeps_the_weights_it_had() -> None:
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


def test_a_first_step_that_did_not_count_leaves_exact_mars_no_weights() -> None:
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


def test_a_known_norm_spares_the_check() -> None:
    """A norm that is wrong, so that it shows whether the gradients were checked."""
    params, optimizer = trained(SOAP, steps=4, lr=0.0)
    spoil(params, 4, torch.nan)
    optimizer.know_grad_norm(params, 1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    optimizer.step()  # it is known for one step only
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("norm", [torch.tensor(torch.nan), torch.inf, 1e25])
def test_a_norm_that_is_not_finite_spares_nothing(norm: float) -> None:
    params, optimizer = trained(SOAP, steps=4)
    before = snapshot(optimizer, params)
    spoil(params, 4, torch.nan)
    optimizer.know_grad_norm(params, norm)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_that_change_after_their_norm_was_computed_are_checked(in_place: bool) -> None:
    params, optimizer = trained(SOAP, steps=4)
    spoil(params, 4, 0.0)
    optimizer.know_grad_norm(params, 1.0)
    if in_place:
        params[0].grad.div_(0.0)  # type: ignore[union-attr]
    else:
        params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
