"""What SOAP does alone, and what MARS does."""

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
from family import STEPS, TABLE, Row, close, trained
from helpers import SHAPES, assert_same, gradient, parameters, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim import AdamW

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.reference.soap import refresh_is_due
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import is_vector, plan_layout
from hf_soap.rules.schedule import Schedule

LAYOUT = plan_layout((2, 2), max_precond_dim=2)


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


def test_growing_distances_end_at_the_frequency() -> None:
    assert Schedule(4, growth=0.25).early == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18)
    assert Schedule(4).early == (0,)


@settings(deadline=None)
@given(st.integers(1, 12), st.booleans(), st.floats(0.001, 3) | st.just(0.0), st.integers(0, 40), st.integers(1, 300))
def test_refreshes_are_due_when_the_textbook_says(
    every: int, stagger: bool, growth: float, index: int, t: int
) -> None:
    context = StepContext(LAYOUT, t=(t,), index=(index,))
    (number,) = Schedule(every, stagger, growth).numbers(context)
    assert (number is not None) == refresh_is_due(t, index if stagger else 0, every, growth)


def test_each_interval_refreshes_each_tensor_once() -> None:
    schedule, tensors = Schedule(5, stagger=True, growth=0.3), tuple(range(8))
    bounds = [*schedule.early, *(schedule.early[-1] + 5 * n for n in range(1, 4))]
    for number, (start, end) in enumerate(pairwise(bounds), start=1):
        due = [schedule.numbers(StepContext(LAYOUT, t=(t,) * 8, index=tensors)) for t in range(start + 1, end + 1)]
        assert [[n for n in column if n] for column in zip(*due, strict=True)] == [[number]] * 8


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


@pytest.mark.parametrize("options", [{}, {"factorized": True}, {"rotate_second_moment": True}])
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
    if options.get("factorized"):
        torch.testing.assert_close(state["exp_avg_sq_row"][0], 0.8 * before["exp_avg_sq_row"][rows])
        torch.testing.assert_close(state["exp_avg_sq_col"][0], 0.8 * before["exp_avg_sq_col"][columns])
    else:
        torch.testing.assert_close(state["exp_avg_sq"][0], 0.8 * before["exp_avg_sq"][rows][:, columns])


@pytest.mark.parametrize("factorized", [False, True])
def test_rotated_second_moments_do_not_depend_on_the_other_matrices(factorized: bool) -> None:
    """Batched float32 products of 100 x 100 matrices with vectors differed from single ones in the last bit."""
    together, alone = (parameters([(100, 100)] * count) for count in (3, 1))
    for params in (together, alone):
        optimizer = SOAP(params, precondition_frequency=1, rotate_second_moment=True, factorized=factorized)
        train(optimizer, params, range(4))
    assert torch.equal(together[0], alone[0])


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
    expected = param.numel() ** 0.5 if is_vector(shape) else 1.0
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


def test_a_checkpoint_whose_vectors_decayed_otherwise_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Version 0.1.0 decayed vectors by 0.1 where nobody said anything, and a resumed run lost that without a word."""
    param = Parameter(torch.ones(3))
    before = MARS([param], weight_decay_1d=0.1)
    MARS([param]).load_state_dict(before.state_dict())
    assert "was trained with weight_decay_1d=0.1, but vectors now decay by their group's 0.0" in caplog.text
    caplog.clear()
    for decays in ({"weight_decay_1d": 0.1}, {"weight_decay_1d": 0.2}, {"weight_decay": 0.1}):
        MARS([param], **decays).load_state_dict(before.state_dict())
    assert not caplog.records
