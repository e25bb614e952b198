"""Every optimizer in every awkward situation."""

import pytest
import torch
from family import STEPS, Row, close, rows, rows_with_betas, trained
from helpers import FULL_RANK, assert_same, gradient, parameters, snapshot, through_a_file, train
from torch import Tensor
from torch.nn import Parameter


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


@rows_with_betas
def test_groups_follow_their_own_settings(row: Row) -> None:
    settings = [{"lr": 0.03, "betas": (0.8, 0.99)}, {"weight_decay": 0.3, "eps": 1e-3}]
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


@rows_with_betas
def test_a_scheduler_may_cycle_betas(row: Row) -> None:
    params = parameters()
    optimizer = row(params, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)
    seen = set()
    for step in range(STEPS - 1):
        train(optimizer, params, [step])
        schedule.step()
        seen.add(optimizer.param_groups[0]["betas"])
    assert len(seen) > 3
    assert all(param.isfinite().all() for param in params)
