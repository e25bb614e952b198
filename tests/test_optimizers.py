"""One table: every optimizer in every awkward situation. Then what only some of them do."""

import copy
import io
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import FULL_RANK, SHAPES, assert_same, gradient, parameters, snapshot, through_a_file, train
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from hf_soap import MARS, SOAP, Shampoo

STEPS = 8


@dataclass(frozen=True)
class Row:
    """An optimizer in the table.

    Attributes:
        make: Makes it from parameters and overrides.
        lr: For the convergence problem.
        seeds: Whether the first non-zero gradient of any tensor updates nothing.
        waits: Whether zero gradients before that leave no trace.
        slow: Whether it differs from another row in few lines of code.
    """

    make: Callable[..., Optimizer]
    lr: float = 0.05
    seeds: bool = False
    waits: bool = False
    slow: bool = False

    def __call__(self, params: Any, **overrides: Any) -> Any:
        return self.make(params, **{"lr": 0.01, **overrides})


soap = partial(SOAP, precondition_frequency=3)
shampoo = partial(Shampoo, precondition_frequency=3, start_step=2)
mars = partial(MARS, weight_decay_1d=0.0)
SoapRow = partial(Row, seeds=True, waits=True)
ShampooRow = partial(Row, waits=True)
TABLE = {
    "soap": SoapRow(soap),
    "staggered": SoapRow(partial(soap, stagger=True)),
    "one-sided": SoapRow(partial(soap, one_sided=True, factorized=True)),
    "blocks": SoapRow(partial(soap, block_size=3), slow=True),
    "padded blocks": SoapRow(partial(soap, block_size=4, normalize_grads=True)),
    "1-D": SoapRow(partial(soap, precondition_1d=True), slow=True),
    "merged": SoapRow(partial(soap, merge_dims=True, max_precond_dim=16), slow=True),
    "current": SoapRow(partial(soap, include_current=True, refresh_tol=0.01), slow=True),
    "kl-soap": SoapRow(partial(soap, kl=True)),
    "shampoo": ShampooRow(shampoo),
    "original": ShampooRow(
        partial(shampoo, betas=(0.0, 0.99), statistics="sum", graft=None, start_step=1), lr=1.0, slow=True
    ),
    "newton": ShampooRow(partial(shampoo, root_method="newton", block_size=4, momentum=0.5), slow=True),
    "background": ShampooRow(partial(shampoo, asynchronous=True, delay=2)),
    "diagonals": ShampooRow(partial(shampoo, max_precond_dim=5, graft="rmsprop", stagger=True), slow=True),
    "kl-shampoo": Row(partial(shampoo, kl=True, graft=None, start_step=1)),
    "mars": Row(mars),
    "mars-lion": Row(partial(mars, variant="lion", optimize_1d=True), slow=True),
    "mars-shampoo": Row(partial(mars, variant="shampoo")),
    "mars-m": Row(partial(mars, variant="m", lr_1d=0.05), lr=0.2, slow=True),
    "mars-soap": Row(partial(mars, variant="soap", precondition_frequency=3)),
}
rows = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=name, marks=[pytest.mark.slow] if row.slow else []) for name, row in TABLE.items()],
)


def close(one: list[Parameter], other: list[Parameter], tolerance: float = 1e-11) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def trained(row: Row, steps: int = STEPS, **options: Any) -> tuple[list[Parameter], Any]:
    params = parameters(**{k: options.pop(k) for k in ("shapes", "dtype") if k in options})
    optimizer = row(params, **options)
    train(optimizer, params, range(steps))
    return params, optimizer


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------


@rows
def test_runs_are_deterministic_and_move(row: Row) -> None:
    (params, optimizer), (again, other) = trained(row), trained(row)
    assert_same(snapshot(optimizer, params), snapshot(other, again))
    for param, start in zip(params, parameters(), strict=True):
        assert param.isfinite().all()
        assert not param.numel() or not torch.equal(param, start)


@rows
def test_least_squares_is_solved(row: Row) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8) * torch.logspace(0, 1, 8)
    targets = inputs @ torch.randn(8, 6) + torch.randn(6)
    weight, bias = Parameter(torch.zeros(8, 6)), Parameter(torch.zeros(6))
    optimizer = row([weight, bias], lr=row.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (inputs @ weight + bias - targets).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_has_the_dtype_of_full_precision_parameters(row: Row, dtype: torch.dtype) -> None:
    params, optimizer = trained(row, dtype=dtype)
    for param in params:
        assert param.dtype == dtype
        assert {value.dtype for role, value in optimizer.state[param].items() if role != "step"} <= {dtype}


@rows
def test_each_tensor_has_a_trajectory_of_its_own(row: Row) -> None:
    """Whether others are in its bucket, late, or without gradients changes nothing for a tensor, its t included."""
    everywhere = set(range(STEPS))
    patterns = [everywhere, everywhere, everywhere - {4}, {1, 2, 5, 6, 7}, set(range(3, STEPS)), {0, 7}]
    together = parameters(FULL_RANK, torch.float64)
    train(row(together), together, range(STEPS), patterns)
    for place, pattern in enumerate(patterns):
        alone = parameters(FULL_RANK, torch.float64)
        train(row(alone), alone, range(STEPS), [pattern if i == place else set() for i in range(len(alone))])
        close([together[place]], [alone[place]])
        for i, param in enumerate(parameters(FULL_RANK, torch.float64)):
            assert i == place or torch.equal(param, alone[i]), "a parameter without gradients moved"


@rows
def test_a_late_parameter_counts_its_own_updates(row: Row) -> None:
    """A mixture's expert may see its first gradient at step 1000; bias correction then starts from 1 for it."""
    late, soon = parameters(FULL_RANK, torch.float64), parameters(FULL_RANK, torch.float64)
    optimizer = row(late)
    for step in range(5):
        late[0].grad = gradient(late[0], 0, step)
        optimizer.step()
    for step in range(STEPS):
        late[2].grad = gradient(late[2], 2, step)
        optimizer.step()
    train(row(soon), soon, range(STEPS), [set(), set(), set(range(STEPS)), set(), set(), set()])
    close([late[2]], [soon[2]])


@rows
def test_freezing_is_having_no_gradient(row: Row) -> None:
    frozen, absent = parameters(FULL_RANK, torch.float64), parameters(FULL_RANK, torch.float64)
    everywhere = set(range(STEPS))
    frozen[0].requires_grad_(False)
    optimizer = row([{"params": frozen[:3]}, {"params": frozen[3:]}])
    train(optimizer, frozen, range(3), [set(), *[everywhere] * 5])
    frozen[0].requires_grad_(True)
    train(optimizer, frozen, range(3, 5))
    frozen[2].requires_grad_(False)
    frozen[2].grad = None
    train(optimizer, frozen, range(5, 7), [everywhere, everywhere, set(), *[everywhere] * 3])
    frozen[2].requires_grad_(True)
    train(optimizer, frozen, range(7, STEPS))
    groups = [{"params": absent[:3]}, {"params": absent[3:]}]
    pattern = [everywhere - {0, 1, 2}, everywhere, everywhere - {5, 6}, *[everywhere] * 3]
    train(row(groups), absent, range(STEPS), pattern)
    close(frozen, absent)


@rows
def test_gradients_are_read_and_neither_kept_nor_changed(row: Row) -> None:
    """A reference to .grad kept as the previous gradient turns to zero under zero_grad(set_to_none=False)."""
    kept, cleared = parameters(), parameters()
    optimizer, other = row(kept), row(cleared)
    for param in cleared:
        param.grad = torch.zeros_like(param)
    for step in range(STEPS):
        for place, (one, two) in enumerate(zip(kept, cleared, strict=True)):
            one.grad = gradient(one, place, step)
            two.grad.add_(gradient(two, place, step))
        before = [param.grad.clone() for param in kept]
        optimizer.step()
        other.step()
        assert_same([param.grad for param in kept], before)
        other.zero_grad(set_to_none=False)
    assert_same(snapshot(optimizer, kept), snapshot(other, cleared))


@rows
def test_memory_order_does_not_matter(row: Row) -> None:
    shapes = [(6, 6), (3, 4, 3, 4)]
    plain = parameters(shapes, torch.float64)
    ordered = [
        Parameter(plain[0].detach().T.contiguous().T),
        Parameter(plain[1].detach().to(memory_format=torch.channels_last)),
    ]
    assert not any(param.is_contiguous() for param in ordered)
    train(row(plain), plain, range(STEPS))
    train(row(ordered), ordered, range(STEPS))
    assert not any(param.is_contiguous() for param in ordered)
    close(ordered, plain)


@rows
def test_a_closure_is_evaluated_with_gradients(row: Row) -> None:
    params, again = parameters(), parameters()
    optimizer, other = row(params), row(again)
    for _ in range(4):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(param.square().sum() for param in params)
            loss.backward()
            return loss

        expected = sum(param.square().sum() for param in again)
        other.zero_grad()
        expected.backward()
        other.step()
        assert torch.equal(optimizer.step(closure), expected)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading, copying
# ---------------------------------------------------------------------------------------------------------------------


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
    for state in other.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}
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


@rows
def test_a_checkpoint_decides_the_learning_rate_and_the_arguments_the_rest(
    row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    """Raising the refresh frequency for the second half of a run did nothing: the checkpoint's came back."""
    _, optimizer = trained(row, steps=4, lr=0.5, betas=(0.9, 0.9), weight_decay=0.3)
    other = row(parameters(), lr=0.1, betas=(0.8, 0.85), weight_decay=0.2)
    with caplog.at_level(logging.INFO, "hf_soap"):
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    (group,) = other.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.85), 0.2)
    assert "betas=(0.8, 0.85) (saved (0.9, 0.9))" in caplog.text
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
    with pytest.raises(ValueError, match=r"param groups of \[6, 1\] parameters, this optimizer has groups of \[7\]"):
        optimizer.load_state_dict(row([{"params": params[:6]}, {"params": params[6:]}]).state_dict())
    assert_same(snapshot(optimizer, params), before)


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


@rows
def test_an_empty_group_is_no_obstacle(row: Row) -> None:
    params, plain = parameters(), parameters()
    optimizer, other = row([{"params": []}, {"params": params}, {"params": []}]), row(plain)
    train(optimizer, params, range(4))
    train(other, plain, range(4))
    assert_same([p.detach() for p in params], [p.detach() for p in plain])
    resumed = row([{"params": []}, {"params": parameters()}, {"params": []}])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(resumed.state_dict(), optimizer.state_dict())


@rows
def test_named_parameters_are_taken_and_names_are_kept(row: Row) -> None:
    params, plain = parameters(), parameters()
    names = [f"layer.{place}" for place in range(len(params))]
    optimizer, other = row(list(zip(names, params, strict=True))), row(plain)
    train(optimizer, params, range(4))
    train(other, plain, range(4))
    assert_same([p.detach() for p in params], [p.detach() for p in plain])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    resumed = row(list(zip(names, parameters(), strict=True)))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(resumed.state_dict(), optimizer.state_dict())


@rows
def test_a_group_may_join_after_the_first_step(row: Row) -> None:
    grown, whole = parameters(FULL_RANK, torch.float64), parameters(FULL_RANK, torch.float64)
    optimizer = row(grown[:3])
    train(optimizer, grown[:3], range(4))
    optimizer.add_param_group({"params": grown[3:]})
    train(optimizer, grown, range(4, STEPS))
    pattern = [set(range(STEPS))] * 3 + [set(range(4, STEPS))] * 3
    train(row([{"params": whole[:3]}, {"params": whole[3:]}]), whole, range(STEPS), pattern)
    close(grown, whole)


@rows
def test_groups_follow_their_own_settings(row: Row) -> None:
    settings = [{"lr": 0.03, "betas": (0.8, 0.9)}, {"weight_decay": 0.3, "eps": 1e-3}]
    grouped = parameters(FULL_RANK, torch.float64)
    halves = [{"params": grouped[:3], **settings[0]}, {"params": grouped[3:], **settings[1]}]
    train(row(halves), grouped, range(STEPS))
    for half, setting in zip((slice(0, 3), slice(3, 6)), settings, strict=True):
        alone = parameters(FULL_RANK, torch.float64)
        others = [p for p in alone if not any(p is mine for mine in alone[half])]
        groups = [{"params": alone[half], **setting}, {"params": others}]
        pattern = [set(range(STEPS)) if any(p is mine for mine in alone[half]) else set() for p in alone]
        train(row(groups if half.start == 0 else groups[::-1]), alone, range(STEPS), pattern)
        close(grouped[half], alone[half])


@rows
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_may_be_a_tensor(row: Row, shape: tuple[int, ...]) -> None:
    params, plain = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    train(row(params, lr=torch.full(shape, 0.02, dtype=torch.float64)), params, range(4))
    train(row(plain, lr=0.02), plain, range(4))
    close(params, plain, 1e-14)


@rows
def test_a_scheduler_sets_the_learning_rate(row: Row) -> None:
    params = parameters()
    optimizer = row(params, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 4))
    moved = []
    for step in range(6):
        before = [param.detach().clone() for param in params]
        train(optimizer, params, [step])
        schedule.step()
        moved.append(any(not torch.equal(*pair) for pair in zip(params, before, strict=True)))
    assert moved == [not row.seeds, True, True, True, False, False]


@rows
def test_a_scheduler_may_cycle_betas(row: Row) -> None:
    params = parameters()
    optimizer = row(params, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)
    seen = set()
    for step in range(STEPS - 1):
        train(optimizer, params, [step])
        schedule.step()
        seen.add(optimizer.param_groups[0]["betas"])
    assert len(seen) > 3
    assert all(param.isfinite().all() for param in params)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@rows
def test_zero_gradients_do_nothing(row: Row) -> None:
    """LoRA's A starts behind B = 0, and a checkpoint loader takes a step with zero gradients to make state."""
    params, plain = parameters(), parameters()
    optimizer = row(params, weight_decay=0.1 if row.waits else 0.0)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same([param.detach() for param in params], [param.detach() for param in plain])
    if row.waits:
        assert not any(value.any() for state in optimizer.state.values() for value in state.values())
        other = row(plain, weight_decay=0.1)
        train(optimizer, params, range(4))
        train(other, plain, range(4))
        assert_same(snapshot(optimizer, params), snapshot(other, plain))


@rows
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("when", [0, 4])
def test_a_nonfinite_gradient_skips_the_whole_step(
    row: Row, bad: float, when: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One NaN in one gradient stayed in the factors for good."""
    params, optimizer = trained(row, steps=when)
    before = snapshot(optimizer, params)
    for attempt in range(2):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, attempt)
        params[-1].grad[1, 2] = bad
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 2
    assert sum("the whole step is skipped" in message for message in caplog.messages) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == 0
    train(optimizer, params, range(when, STEPS))
    again, other = trained(row)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


@rows
def test_looking_for_nonfinite_gradients_can_be_turned_off(row: Row) -> None:
    params, optimizer = trained(row, steps=4, shapes=[(5,), (6, 6)], nonfinite="off")
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad[1] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 0
    # The sign of NaN is 0: Lion's moment shows it, its weights do not.
    assert any(value.isnan().any() for value in (params[0], *optimizer.state[params[0]].values()))


@rows
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e50), (torch.float32, 1e16)])
def test_large_gradients_are_finite(row: Row, dtype: torch.dtype, size: float) -> None:
    """1e50 is finite in float64 and was skipped, since its norm was taken to float32."""
    params = parameters(dtype=dtype)
    optimizer = row(params)
    for step in range(8):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, step) * size
        optimizer.step()
    assert optimizer.skipped_steps == 0
    for param, start in zip(params, parameters(dtype=dtype), strict=True):
        assert param.isfinite().all()
        assert not param.numel() or not torch.equal(param, start)


def test_a_float16_gradient_with_a_norm_beyond_float16_is_used() -> None:
    param = Parameter(torch.zeros(100, 100, dtype=torch.float16))
    optimizer = SOAP([param])
    param.grad = torch.full_like(param, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps == 0


@rows
@pytest.mark.parametrize(("where", "size"), [((1, 2), 1e25), (slice(None), 1e19)], ids=["an entry", "their sum"])
def test_a_gradient_too_large_to_square_is_skipped(
    row: Row, where: Any, size: float, caplog: pytest.LogCaptureFixture
) -> None:
    """One gradient of 1e25 is finite in float32, its square is not: the factors were infinite from then on."""
    params, optimizer = trained(row, steps=4)
    before = snapshot(optimizer, params)
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad[where] = size
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 1
    assert "the whole step is skipped" in caplog.text


@rows
def test_a_frozen_parameters_leftover_gradient_is_not_looked_at(row: Row) -> None:
    params, optimizer = trained(row, steps=4)
    params[0].requires_grad_(False)
    before = params[0].detach().clone()
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert torch.equal(params[0], before)


@rows
def test_complex_parameters_are_refused(row: Row) -> None:
    turned = Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex64 .*view_as_real"):
        row([turned])
    params, optimizer = trained(row, steps=4)
    with pytest.raises(ValueError, match=r"complex64 .*view_as_real"):
        optimizer.add_param_group({"params": [turned]})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params, range(4, STEPS))
    again, other = trained(row)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


@rows
def test_frozen_parameters_may_be_of_any_kind(row: Row) -> None:
    """A quantised base model holds its frozen weights as integers, and model.parameters() hands them over."""
    frozen = Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    params, plain = parameters(), parameters()
    optimizer, other = row([*params, frozen]), row(plain)
    train(optimizer, params, range(4))
    train(other, plain, range(4))
    assert_same([param.detach() for param in params], [param.detach() for param in plain])
    assert frozen not in optimizer.state


@rows
def test_a_wrong_setting_of_a_new_group_changes_nothing(row: Row) -> None:
    _, optimizer = trained(row, steps=4)
    for wrong in ({"betas": (0.9, 1.0)}, {"betas": 0.9}, {"lr": -1.0}, {"weight_decay": torch.nan}, {"eps": "small"}):
        with pytest.raises(ValueError, match=r"must be .*got"):
            optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **wrong})
    assert len(optimizer.param_groups) == 1


@rows
def test_sparse_gradients_are_refused_before_anything_changes(row: Row) -> None:
    table = torch.nn.Embedding(8, 4, sparse=True)
    params = [*parameters(), table.weight]
    optimizer = row(params)
    train(optimizer, params, range(4))
    before = snapshot(optimizer, params)
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    optimizer.zero_grad()
    (table(torch.tensor([1, 2])).sum() + sum(param.square().sum() for param in params[:-1])).backward()
    with pytest.raises(ValueError, match=r"dense gradients, got torch.sparse_coo .*sparse=False"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_shards_may_come_after_construction(mesh: DeviceMesh) -> None:
    """accelerate puts them into the groups of an optimizer that was made for whole parameters."""
    for make in (SOAP, Shampoo, MARS):
        params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))]
        optimizers = [make([param], lr=0.1) for param in params]
        params[1] = Parameter(distribute_tensor(torch.ones(4, 4), mesh))
        optimizers[1].param_groups[0]["params"][0] = params[1]
        for step in range(3):
            grad = gradient(params[0], 0, step)
            params[0].grad, params[1].grad = grad, distribute_tensor(grad, mesh)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(params[0], params[1].full_tensor())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters_of_fsdp_1_are_refused(mesh: DeviceMesh, use_orig_params: bool) -> None:
    """They are vectors, on which SOAP would silently be Adam."""
    model = FullyShardedDataParallel(
        torch.nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    with pytest.raises(ValueError, match=r"that FSDP1 flattened, wanted a tensor or a DTensor.*fully_shard"):
        SOAP(model.parameters())


def test_parameters_of_other_shapes_in_their_place_are_refused() -> None:
    """DeepSpeed's ZeRO puts one flat vector into each group of an optimizer that was made before."""
    optimizer = SOAP([Parameter(torch.ones(4, 4)), Parameter(torch.ones(4))])
    flat = Parameter(torch.ones(20))
    flat.grad = torch.ones(20)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"shape \(20,\) in the place of one of shape \(4, 4\).*use FSDP2"):
        optimizer.step()


@pytest.mark.parametrize("saved_by", [torch.optim.AdamW, Shampoo, MARS])
def test_state_of_another_optimizer_is_refused(saved_by: Any) -> None:
    params = [Parameter(torch.ones(4, 4))]
    optimizer = saved_by(params)
    train(optimizer, params, range(2))
    with pytest.raises(ValueError, match=r"basis_0 got nothing, wanted .*Resume with the optimizer"):
        SOAP(params).load_state_dict(through_a_file(optimizer.state_dict()))


def test_a_parameter_whose_parts_are_to_be_summed_is_refused(mesh: DeviceMesh) -> None:
    partial = Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"shape \(4, 4\) with the placement .*wanted Shard or Replicate"):
        SOAP([partial])


@rows
def test_hooks_run_once_a_step(row: Row) -> None:
    params = parameters()
    optimizer = row(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, range(2))
    assert calls == ["before", "after"] * 2


@rows
def test_the_surroundings_do_not_matter(row: Row) -> None:
    """A step inside autocast, or under another default dtype or device, is the step outside of it."""
    (params, optimizer), (again, other) = trained(row, steps=4), parameters_and(row)
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            train(other, again, range(2))
        for step in (2, 3):
            for place, param in enumerate(again):
                param.grad = gradient(param, place, step)
            with torch.device("meta"):
                other.step()
    finally:
        torch.set_default_dtype(previous)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


def parameters_and(row: Row) -> tuple[list[Parameter], Any]:
    params = parameters()
    return params, row(params)


# ---------------------------------------------------------------------------------------------------------------------
# SOAP alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity", [{"max_precond_dim": 0}, {"rule": "adam"}, {"max_precond_dim": 5}], ids=["no sides", "rule", "short"]
)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95)])
def test_with_identity_bases_soap_is_adamw_one_gradient_later(
    identity: dict[str, Any], betas: tuple[float, float]
) -> None:
    shapes = [(6, 6), (7,), (8, 9), (6, 7, 8), ()]
    mine, theirs = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    optimizer = SOAP([{"params": mine, **identity}], lr=0.01, betas=betas, eps=0.0, weight_decay=0.0)
    adamw = AdamW(theirs, lr=0.01, betas=betas, eps=0.0, weight_decay=0.0)
    for step in range(50):
        for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            one.grad = gradient(one, place, step)
            other.grad = gradient(other, place, step)
        optimizer.step()
        if step:
            adamw.step()
    close(mine, theirs, 1e-10)


def test_decay_follows_the_update() -> None:
    """W ← W − ηN, then W ← W − ηλW: the official order, which AdamW has the other way round."""
    (plain, _), (decayed, _) = (trained(TABLE["soap"], steps=2, shapes=[(6, 6)], weight_decay=w) for w in (0.0, 0.5))
    torch.testing.assert_close(decayed[0], plain[0] * (1 - 0.01 * 0.5), rtol=1e-6, atol=0)


def test_the_first_gradient_sets_factors_and_bases_and_moves_nothing() -> None:
    params, optimizer = trained(TABLE["soap"], steps=1, dtype=torch.float64, weight_decay=0.5)
    assert_same([param.detach() for param in params], [param.detach() for param in parameters(dtype=torch.float64)])
    grad, state = gradient(params[1], 1, 0), optimizer.state[params[1]]
    for side, gram in ((0, grad @ grad.T), (1, grad.T @ grad)):
        basis, factor = state[f"basis_{side}"][0], state[f"factor_{side}"][0]
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(gram), dtype=torch.float64))
        torch.testing.assert_close(basis @ factor @ basis.T, (1 - 0.95) * gram)
        assert torch.equal(factor, factor.diagonal().diag())
        assert (factor.diagonal().diff() <= 0).all()
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()


def test_states_of_one_shape_are_views_of_one_stack() -> None:
    """The step costs a few batched calls for all tensors of a shape, not a few for each."""
    params, optimizer = trained(TABLE["soap"], steps=2)
    for role in ("exp_avg", "factor_0", "basis_1"):
        stacks = {optimizer.state[params[place]][role].untyped_storage().data_ptr() for place in (0, 6)}
        assert len(stacks) == 1


def changed_bases(row: Row, params: list[Parameter]) -> list[list[int]]:
    """Which parameters' bases change at each step."""
    optimizer = row(params)
    changed, before = [], [torch.zeros(())] * len(params)
    for step in range(10):
        train(optimizer, params, [step])
        now = [optimizer.state[param]["basis_0"].clone() for param in params]
        changed.append([place for place, pair in enumerate(zip(now, before, strict=True)) if not torch.equal(*pair)])
        before = now
    return changed[1:]


def test_refreshes_fall_on_every_third_update_together() -> None:
    changed = changed_bases(TABLE["soap"], parameters([(6, 6)] * 6))
    assert changed == [[], [], [0, 1, 2, 3, 4, 5]] * 3


def test_staggered_refreshes_spread_over_the_steps() -> None:
    changed = changed_bases(TABLE["staggered"], parameters([(6, 6)] * 6))
    assert changed == [[2, 5], [1, 4], [0, 3]] * 3


@pytest.mark.parametrize("stagger", [False, True])
def test_a_basis_that_drifted_is_brought_back(stagger: bool) -> None:
    """Products of rotations never re-orthonormalise: rounding adds up over tens of thousands of refreshes."""
    params = parameters([(6, 6)] * 3, torch.float64)
    optimizer = SOAP(params, precondition_frequency=1, stagger=stagger)
    train(optimizer, params, range(3))
    for state in optimizer.state.values():
        state["basis_0"].mul_(1 + 1e-4)
    train(optimizer, params, range(3, 103))
    for state in optimizer.state.values():
        basis = state["basis_0"][0]
        torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"factorized": True}])
def test_a_refresh_that_only_sorts_takes_both_moments_along(options: dict[str, Any]) -> None:
    """Sorting the columns of a basis without the second moments gives each direction another one's step size."""
    (param,) = params = parameters([(4, 3)], torch.float64)
    optimizer = SOAP(params, precondition_frequency=1, betas=(0.9, 0.8), shampoo_beta=0.5, **options)
    train(optimizer, params, range(3))
    order = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])]
    state = optimizer.state[param]
    for side, places in enumerate(order):
        # Descending behind the sort: the refresh of a diagonal factor is the sort.
        values = torch.empty(len(places), dtype=torch.float64)
        values[places] = torch.arange(len(places), 0, -1, dtype=torch.float64)
        state[f"factor_{side}"][0] = values.diag()
    before = {role: value[0].clone() for role, value in state.items() if role != "step"}
    param.grad = torch.zeros_like(param)
    optimizer.step()
    rows, columns = order
    for side, places in enumerate(order):
        basis, old = state[f"basis_{side}"][0], before[f"basis_{side}"][:, places]
        torch.testing.assert_close(basis * (basis * old).sum(0).sign(), old)
        torch.testing.assert_close(
            state[f"factor_{side}"][0].diagonal(), 0.5 * before[f"factor_{side}"].diagonal()[places]
        )
    moved = before["exp_avg"][rows][:, columns] * 0.9
    torch.testing.assert_close(state["exp_avg"][0].abs(), moved.abs())
    if options:
        torch.testing.assert_close(state["exp_avg_sq_row"][0], 0.8 * before["exp_avg_sq_row"][rows])
        torch.testing.assert_close(state["exp_avg_sq_col"][0], 0.8 * before["exp_avg_sq_col"][columns])
    else:
        torch.testing.assert_close(state["exp_avg_sq"][0], 0.8 * before["exp_avg_sq"][rows][:, columns])


def test_the_bases_diagonalise_the_factors_in_the_end() -> None:
    """With gradients from one distribution, the estimated eigenvalues are those of the factor."""
    params = parameters([(6, 6)], torch.float64)
    optimizer = SOAP(params, precondition_frequency=1, shampoo_beta=0.999)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, 2, 6, dtype=torch.float64).unsqueeze(1)
    for _ in range(300):
        params[0].grad = scale * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[params[0]]
    factor, basis = state["factor_0"][0], state["basis_0"][0]
    assert (factor - factor.diagonal().diag()).norm() < 1e-3 * factor.norm()
    assert basis.abs().argmax(0).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1), (5,), (1, 3, 2)])
def test_shampoos_first_step_is_of_unit_length_whatever_has_one_entry(shape: tuple[int, ...]) -> None:
    """A scalar took plain gradient steps: sides of one entry were left out, and with them all preconditioning."""
    param = Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Shampoo([param], lr=1.0, betas=(0.0, 0.9), graft=None, statistics="sum", weight_decay=0.0)
    param.grad = torch.full(shape, 1000.0, dtype=torch.float64)
    optimizer.step()
    # Every factor of an even gradient has rank 1 and the eigenvalue ‖G‖², so that k of them divide by ‖G‖. A vector's
    # diagonal has its entries' squares instead.
    expected = param.numel() ** 0.5 if len(shape) == 1 else 1.0
    torch.testing.assert_close(param.detach().norm().item(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shapes", list(itertools.permutations([(6, 6), (4, 9), (5,)])))
def test_state_bytes_is_what_the_state_takes(shapes: tuple[tuple[int, ...], ...]) -> None:
    params = parameters(shapes)
    optimizer = SOAP(params)
    expected = optimizer.state_bytes()
    train(optimizer, params, range(2))
    assert expected == optimizer.state_bytes()
    assert expected == sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("options", [{}, {"block_size": 4}])
def test_normalized_updates_have_unit_size(options: dict[str, Any]) -> None:
    """Each tensor's update is divided by its root mean square, padding not counted."""
    params = parameters([(6, 6), (7, 5), (7, 2)], torch.float64)
    optimizer = SOAP(params, lr=0.1, normalize_grads=True, correct_bias=False, weight_decay=0.0, **options)
    train(optimizer, params, range(1))
    for state in optimizer.state.values():
        # In the null space of a factor any basis will do, also one that mixes padded rows into it.
        state["basis_0"].copy_(torch.linalg.qr(torch.randn_like(state["basis_0"])).Q)
    before = [param.detach().clone() for param in params]
    train(optimizer, params, range(1, 2))
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close((param - start).square().mean().sqrt().item(), 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# MARS alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo", "soap", "m"])
def test_mars_updates_vectors_by_adamw_at_a_rate_in_proportion_to_the_schedule(variant: str) -> None:
    mine, theirs = (parameters([(6, 6), (5,), ()], torch.float64) for _ in range(2))
    optimizer = MARS(mine, lr=0.01, variant=variant, lr_1d=0.03, betas_1d=(0.8, 0.9), weight_decay_1d=0.2)
    adamw = AdamW(theirs[1:], lr=0.03, betas=(0.8, 0.9), weight_decay=0.2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, STEPS) for each in (optimizer, adamw)]
    for step in range(STEPS):
        train(optimizer, mine, [step])
        for place in (1, 2):
            theirs[place].grad = gradient(theirs[place], place, step)
        adamw.step()
        for schedule in schedules:
            schedule.step()
    close(mine[1:], theirs[1:])


def test_every_test_shape_is_in_the_table() -> None:
    assert {len(shape) for shape in SHAPES} == {0, 1, 2, 3}


@rows
def test_a_model_may_change_its_memory_format_between_steps(row: Row) -> None:
    """Fused kernels pair entries by their place in memory: the state of one then went with the weight of another."""
    finals = []
    for moved in (False, True):
        params = parameters(shapes=[(4, 3, 2, 5)])
        optimizer = row(params)
        train(optimizer, params, range(3))
        if moved:
            params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        train(optimizer, params, range(3, 6))
        finals.append(params)
    close(*finals, tolerance=1e-5)
