"""Every optimizer saved, loaded, copied and pickled."""

import copy
import io
import logging
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from family import STEPS, Row, rows, rows_with_betas, trained
from helpers import assert_same, gradient, parameters, snapshot, through_a_file, train
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer


@rows
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_is_the_uninterrupted_one(row: Row, stop: int) -> None:
    whole, uninterrupted = trained(row)
    params, optimizer = trained(row, steps=stop)
    resumed = [Parameter(param.detach().clone()) for param in params]
    other = row(resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(other, resumed, range(stop, STEPS))
    assert_same(snapshot(other, resumed), snapshot(uninterrupted, whole))


@rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_full_precision_state(row: Row, dtype: torch.dtype) -> None:
    """Float32 factors of a bf16 model came back from a checkpoint as bf16.

    torch.optim.Optimizer.load_state_dict casts all state but `step` to the dtype of its parameter. Eigenvalues that
    span seven decades then have two digits left, and the resumed run leaves the uninterrupted one.
    """
    whole, uninterrupted = trained(row, dtype=dtype)
    params, optimizer = trained(row, steps=5, dtype=dtype)
    resumed = [Parameter(param.detach().clone()) for param in params]
    other = row(resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for param, state in other.state.items():
        dtypes = {value.dtype for role, value in state.items() if role != "step"}
        assert dtypes == ({torch.float32} if param.numel() else set())
    train(other, resumed, range(5, STEPS))
    assert {param.dtype for param in resumed} == {dtype}
    assert_same(snapshot(other, resumed), snapshot(uninterrupted, whole))


@rows
def test_low_precision_parameters_are_rounded_once(row: Row) -> None:
    """One step in bf16 is the step in float32 from the same weights and gradients, rounded."""
    low, full = (
        parameters(dtype=torch.bfloat16),
        [Parameter(p.detach().float()) for p in parameters(dtype=torch.bfloat16)],
    )
    optimizer, other = row(low), row(full)
    for step in range(3):
        for place, (one, two) in enumerate(zip(low, full, strict=True)):
            two.data.copy_(one)
            one.grad = gradient(one, place, step)
            two.grad = one.grad.float()
        optimizer.step()
        other.step()
    assert_same([param.detach() for param in low], [param.detach().bfloat16() for param in full])


@rows
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deep", "pickle"]
)
def test_a_copy_continues_like_the_original_and_apart_from_it(row: Row, copied: Callable[[Any], Any]) -> None:
    params, optimizer = trained(row, steps=5)
    again, other = copied((params, optimizer))
    before = snapshot(optimizer, params)
    train(other, again, range(5, STEPS))
    assert_same(snapshot(optimizer, params), before)
    train(optimizer, params, range(5, STEPS))
    assert_same(snapshot(optimizer, params), snapshot(other, again))


@rows
def test_loading_copies(row: Row) -> None:
    """A load that keeps the source's tensors trains two optimizers on one state."""
    _, optimizer = trained(row, steps=4)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    params = parameters()
    other = row(params)
    other.load_state_dict(saved)
    for state in saved["state"].values():
        for value in state.values():
            value.add_(1)
    assert_same(other.state_dict(), before)
    changed = copy.deepcopy(saved)
    train(other, params, range(4, 8))
    assert_same(saved, changed)


@rows
def test_a_state_dict_is_a_snapshot(row: Row) -> None:
    params, optimizer = trained(row, steps=4)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    train(optimizer, params, range(4, 8))
    assert_same(saved, before)


def saved_size(thing: Any) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


@rows
def test_one_parameters_state_is_saved_without_its_neighbours(row: Row) -> None:
    """A view is saved with its whole storage: one parameter's state came with that of its whole bucket."""
    _, optimizer = trained(row, steps=2, shapes=[(16, 16)] * 40)
    state = optimizer.state_dict()["state"][0]
    content = sum(value.numel() * value.element_size() for value in state.values())
    assert saved_size(state) < content + 8_000


@rows
def test_a_pickle_holds_the_state_once(row: Row) -> None:
    """A view is pickled with its whole storage, so that forty parameters of a bucket wrote it forty times."""
    params, optimizer = trained(row, steps=2, shapes=[(16, 16)] * 40)
    content = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
    assert len(pickle.dumps(optimizer)) < 2 * (content + len(pickle.dumps(params)))


@rows
def test_state_that_was_replaced_is_used(row: Row) -> None:
    """What users put into optimizer.state counts, not the stack it was a view of."""
    (params, optimizer), (again, other) = trained(row, steps=4), trained(row, steps=4)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        for role in mine.keys() - {"step"}:
            mine[role] = mine[role] * 1.5
            theirs[role].mul_(1.5)
    train(optimizer, params, range(4, 8))
    train(other, again, range(4, 8))
    assert_same(snapshot(optimizer, params), snapshot(other, again))
    assert not torch.equal(params[0], trained(row, steps=8)[0][0])


@rows
def test_state_that_was_dropped_starts_anew(row: Row) -> None:
    params, optimizer = trained(row, steps=4)
    optimizer.state.clear()
    start = [Parameter(param.detach().clone()) for param in params]
    other = row(start)
    train(optimizer, params, range(4, 8))
    train(other, start, range(4, 8))
    assert_same(snapshot(optimizer, params), snapshot(other, start))


@rows_with_betas
def test_a_checkpoint_decides_the_learning_rate_and_the_arguments_the_rest(
    row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    """Raising the refresh frequency for the second half of a run did nothing: the checkpoint's came back."""
    _, optimizer = trained(row, steps=4, lr=0.5, betas=(0.9, 0.99), weight_decay=0.3)
    other = row(parameters(), lr=0.1, betas=(0.8, 0.99), weight_decay=0.2)
    with caplog.at_level(logging.INFO, "hf_soap"):
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    (group,) = other.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.99), 0.2)
    assert "betas=(0.8, 0.99) (saved (0.9, 0.99))" in caplog.text
    assert " lr=" not in caplog.text


@rows
@pytest.mark.parametrize("foreign", [AdamW, partial(SGD, lr=0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_state_of_another_optimizer_is_refused_and_changes_nothing(
    row: Row, foreign: Callable[..., Optimizer]
) -> None:
    params = parameters()
    other = foreign(params)
    train(other, params, range(2))
    mine, optimizer = trained(row, steps=4)
    before = copy.deepcopy(snapshot(optimizer, mine))
    with pytest.raises(ValueError, match=r"does not fit the current settings: .* wanted .*Resume with"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(snapshot(optimizer, mine), before)


@rows
def test_state_of_other_groups_is_refused_and_changes_nothing(row: Row) -> None:
    params, optimizer = trained(row, steps=4)
    before = copy.deepcopy(snapshot(optimizer, params))
    with pytest.raises(ValueError, match=r"param groups of \[6, 1\] parameters, wanted groups of \[7\]"):
        optimizer.load_state_dict(row([{"params": params[:6]}, {"params": params[6:]}]).state_dict())
    assert_same(snapshot(optimizer, params), before)
