"""Averages of the weights without a Trainer: their values, the exchange with the raw weights, and checkpoints."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from family import Row, rows, soap
from helpers import assert_same, gradient, parameters, snapshot, through_a_file, train
from torch import Tensor
from torch.nn import Parameter

from hf_soap import MARS, SOAP

STEPS = 9


def copies(params: Sequence[Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def textbook_averages(history: Sequence[Sequence[Tensor]], *, horizon: int, start: int) -> list[list[Tensor]]:
    """The averages after each step, of the weights after each step, both in float64."""
    averages: list[list[Tensor]] = []
    for step, weights in enumerate(history, start=1):
        seen = step - start
        if seen <= 1:
            averages.append([weight.double() for weight in weights])
            continue
        decay = 1 - 1 / min(seen, horizon)
        pairs = zip(averages[-1], weights, strict=True)
        averages.append([decay * average + (1 - decay) * weight.double() for average, weight in pairs])
    return averages


def observed(optimizer: Any, params: Sequence[Parameter]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Weights and averages after each step; one tensor has its first gradient at the fourth, another has none."""
    present = [set(range(STEPS)) for _ in params]
    present[1], present[2] = {*range(3, STEPS)}, set()
    weights, averages = [], []
    for step in range(STEPS):
        train(optimizer, params, [step], present)
        weights.append(copies(params))
        optimizer.eval()
        averages.append(copies(params))
        optimizer.train()
    return weights, averages


@rows
@pytest.mark.parametrize(("horizon", "start"), [(3, 0), (1, 2), (1000, 4)])
def test_averages_are_those_of_a_textbook_loop(row: Row, horizon: int, start: int) -> None:
    params, plain = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    weights, averages = observed(row(params, average_horizon=horizon, average_start=start), params)
    torch.testing.assert_close(
        averages, textbook_averages(weights, horizon=horizon, start=start), rtol=1e-13, atol=1e-13
    )
    assert_same(weights, observed(row(plain), plain)[0])  # training is the same with averages and without


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_of_low_precision_weights_are_float32(dtype: torch.dtype) -> None:
    """An average in bfloat16 would stop where its changes are smaller than the spacing of the numbers."""
    params = parameters(dtype=dtype)
    optimizer = soap(params, average_horizon=1000)
    weights, averages = observed(optimizer, params)
    want = textbook_averages(weights, horizon=1000, start=0)[-1]
    kept = [optimizer.state[param]["average_param"] for param in params]
    assert {average.dtype for average in kept} == {torch.float32}
    torch.testing.assert_close([average.double() for average in kept], want, rtol=1e-6, atol=1e-6)
    assert_same(averages[-1], [average.to(dtype) for average in kept])


def test_a_second_exchange_changes_nothing() -> None:
    params = parameters(dtype=torch.bfloat16)
    optimizer = soap(params, lr=0.1, average_horizon=10)
    optimizer.eval()  # before the first step there is no average
    assert not optimizer.at_average
    train(optimizer, params, range(STEPS))
    raw, state = snapshot(optimizer, params)
    optimizer.eval()
    averages = copies(params)
    assert optimizer.at_average
    assert not any(torch.equal(a, b) for a, b in zip(raw, averages, strict=True) if a.numel())
    optimizer.eval()
    assert_same(copies(params), averages)
    for _ in range(2):
        optimizer.train()
        assert_same(copies(params), raw)
    assert {**state["param_groups"][0], "at_average": False} == optimizer.state_dict()["param_groups"][0]
    assert_same(optimizer.state_dict()["state"], state["state"])


@pytest.mark.parametrize("row", [soap, MARS])
def test_a_step_on_averages_is_an_error(row: Any) -> None:
    params = parameters()
    optimizer = row(params, average_horizon=10)
    train(optimizer, params, range(3))
    optimizer.eval()
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"got a step while the parameters hold the averages.*call train\(\)"):
        train(optimizer, params, [3])
    assert_same(snapshot(optimizer, params), before)
    optimizer.train()
    train(optimizer, params, [3])


def test_a_skipped_step_is_not_averaged() -> None:
    params = parameters()
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(3))
    before = snapshot(optimizer, params)
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 3)
    params[0].grad.view(-1)[0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_average", [False, True])
@pytest.mark.parametrize("start", [0, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(dtype: torch.dtype, at_average: bool, start: int) -> None:
    """The model may be saved with its raw weights or with the averages, before averaging starts or after."""
    settings: dict[str, Any] = {"average_horizon": 4, "average_start": start}
    params = parameters(dtype=dtype)
    optimizer = soap(params, **settings)
    train(optimizer, params, range(5))
    if at_average:
        optimizer.eval()
    saved, state = snapshot(optimizer, params)
    optimizer.train()
    train(optimizer, params, range(5, STEPS))

    resumed = [Parameter(weight) for weight in saved]
    other = soap(resumed, **settings)
    other.load_state_dict(through_a_file(state))
    assert other.at_average == (at_average and not start)
    other.train()
    train(other, resumed, range(5, STEPS))
    assert_same(copies(resumed), copies(params))
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
    for one in (optimizer, other):
        one.eval()
    assert_same(copies(resumed), copies(params))


def assert_averages_from_here(optimizer: Any, params: Sequence[Parameter]) -> None:
    """The next steps are averaged, and none before."""
    history = []
    for step in range(5, STEPS):
        train(optimizer, params, [step])
        history.append(copies(params))
    optimizer.eval()
    torch.testing.assert_close(copies(params), textbook_averages(history, horizon=1000, start=0)[-1])


def test_averaging_starts_from_a_checkpoint_without_averages(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(dtype=torch.float64)
    optimizer = soap(params)
    train(optimizer, params, range(5))
    other = soap(params, average_horizon=1000, average_start=2)  # which has passed
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert caplog.text.count("has no averages of the weights: they start from the loaded weights") == 1
    assert_averages_from_here(other, params)


def test_averages_are_dropped_where_they_are_off(caplog: pytest.LogCaptureFixture) -> None:
    """A run without averages would have continued from the averages that the model was saved with."""
    params = parameters()
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(5))
    raw = copies(params)
    optimizer.eval()
    resumed = [Parameter(weight) for weight in copies(params)]
    other = soap(resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert caplog.text.count("averages of the weights, which average_horizon=0 drops") == 1
    other.train()
    assert_same(copies(resumed), raw)
    train(other, resumed, [5])
    other.eval()
    assert not other.at_average
    assert not {"average_param", "raw_param"} & {role for state in other.state.values() for role in state}


def test_weights_that_are_changed_while_they_hold_averages_stay() -> None:
    params = parameters()
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(5))
    raw = copies(params)
    optimizer.eval()
    with torch.no_grad():
        params[0].fill_(3.0)
    optimizer.train()
    assert_same(copies(params)[1:], raw[1:])
    assert bool((params[0] == 3.0).all())
    optimizer.eval()
    assert bool((params[0] == 3.0).all())  # its average goes on from there


def test_raw_weights_return_before_other_state_is_loaded() -> None:
    params = parameters()
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(5))
    raw, state = copies(params), through_a_file(optimizer.state_dict())
    optimizer.eval()
    optimizer.load_state_dict(state)
    assert_same(copies(params), raw)


def test_an_optimizer_of_the_groups_of_another_averages_its_own_weights() -> None:
    params = parameters(dtype=torch.float64)
    optimizer = soap(params, average_horizon=1000)
    train(optimizer, params, range(5))
    other = SOAP(optimizer.param_groups)
    assert_averages_from_here(other, params)


def test_a_horizon_of_zero_keeps_the_raw_weights() -> None:
    params = parameters()
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(5))
    raw = copies(params)
    for group in optimizer.param_groups:
        group["average_horizon"] = 0
    optimizer.eval()
    assert_same(copies(params), raw)


def test_averages_of_another_shape_are_refused() -> None:
    params = parameters([(6, 6)])
    optimizer = soap(params, average_horizon=10)
    train(optimizer, params, range(2))
    state = optimizer.state_dict()
    state["state"][0]["average_param"] = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"average_param got \(5, 6\), wanted \(6, 6\)"):
        soap(parameters([(6, 6)]), average_horizon=10).load_state_dict(state)


def test_averages_are_counted_as_state() -> None:
    params = parameters([(6, 6), (5,)], dtype=torch.bfloat16)
    optimizer, plain = soap(params, average_horizon=10), soap(params)
    entries = sum(param.numel() for param in params)
    assert optimizer.state_bytes() == plain.state_bytes() + 4 * entries
    train(optimizer, params, range(2))
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert optimizer.state_bytes() == sum(value.nbytes for value in kept)


def test_a_start_without_a_horizon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got average_start=5 without average_horizon.*set average_horizon"):
        SOAP(parameters(), average_start=5)
