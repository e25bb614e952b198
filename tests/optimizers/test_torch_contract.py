"""What torch and those who build on it may ask of any optimizer: one table, a row a function, a column an optimizer.

torch.optim.AdamW is the control column: what it does is right. A row that asks for more than torch gives says so, and
has no control.
"""

import copy
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from contract import (
    COLUMNS,
    CONTROL,
    KINDS,
    SHAPES,
    WITH_FACTORS,
    Column,
    backward,
    chosen,
    copies,
    each_kind,
    each_kind_of_ours,
    every_column,
    every_column_of_ours,
    family_roles,
    numbers,
    over,
    train,
    trained,
    values,
)
from helpers import assert_same, gradient, parameters, through_a_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hf_soap
from hf_soap import MARS, SOAP, Shampoo

# ---------------------------------------------------------------------------------------------------------------------
# Hooks of state_dict and load_state_dict
# ---------------------------------------------------------------------------------------------------------------------

NAMES = [f"weight.{place}" for place in range(len(SHAPES))]
ORDER = [3, 5, 1, 0, 4, 2]
"""Of the parameters in another model."""


def by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Reorders saved state by the names of the parameters, as the documentation of load_state_dict proposes."""
    (saved,), (now,) = state_dict["param_groups"], optimizer.param_groups
    key_of = dict(zip(saved["param_names"], saved["params"], strict=True))
    state = {place: state_dict["state"][key_of[name]] for place, name in enumerate(now["param_names"])}
    group = {**saved, "params": list(range(len(state))), "param_names": now["param_names"]}
    return {"state": state, "param_groups": [group]}


def by_name_in_place(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict.update(by_name(optimizer, state_dict))


@every_column
def test_a_load_pre_hook_moves_state_to_another_order_of_parameters(column: Column) -> None:
    """The pre-hook was handed an empty state, and what it returned was not loaded."""
    for hook in (by_name, by_name_in_place):
        params = parameters(SHAPES)
        optimizer = column(list(zip(NAMES, params, strict=True)))
        train(optimizer, params, range(4))
        moved = copies(chosen(params, ORDER))
        other = column([(NAMES[place], param) for place, param in zip(ORDER, moved, strict=True)])
        other.register_load_state_dict_pre_hook(hook)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert other.param_groups[0]["param_names"] == chosen(NAMES, ORDER)
        train(optimizer, params, range(4, 8))
        train(other, moved, range(4, 8), ORDER)
        (wanted, saved), (got, loaded) = numbers(optimizer, params), numbers(other, moved)
        assert_same(got, chosen(wanted, ORDER))
        assert_same(chosen(loaded, range(len(ORDER))), chosen(saved, ORDER))


@each_kind
def test_load_pre_hooks_are_called_once_in_order_with_what_is_loaded(column: Column) -> None:
    params, optimizer = trained(column)
    saved, seen = through_a_file(optimizer.state_dict()), []

    def adds(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("adds", state_dict))
        state = {key: {**entry, "step": entry["step"] + 1} for key, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def looks(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        seen.append(("looks", state_dict))
        assert optimizer is other

    other = column(copies(params))
    other.register_load_state_dict_pre_hook(adds)
    other.register_load_state_dict_pre_hook(lambda *_: seen.append(("last", None)))
    other.register_load_state_dict_pre_hook(looks, prepend=True)
    other.load_state_dict(saved)
    assert [name for name, _ in seen] == ["looks", "adds", "last"]
    assert_same(seen[0][1], saved)
    assert seen[0][1] is not saved  # a shallow copy, so that a hook may put another state into it
    steps = {key: float(entry["step"]) for key, entry in other.state_dict()["state"].items()}
    assert steps == {key: float(entry["step"]) + 1 for key, entry in saved["state"].items()}


@every_column
def test_a_load_post_hook_finds_the_state_and_its_edits_stay(column: Column) -> None:
    """The post-hook ran before the state was there, and what it changed was written over."""
    params, optimizer = trained(column)
    saved, calls = through_a_file(optimizer.state_dict()), []

    def halves(optimizer: Any) -> None:
        calls.append("halves")
        assert optimizer is other
        for param in fresh:
            state = optimizer.state[param]
            for role in state.keys() - {"step"}:
                state[role] = state[role] * 0.5
        optimizer.param_groups[0]["lr"] = 0.123

    fresh = copies(params)
    other = column(fresh)
    other.register_load_state_dict_post_hook(halves)
    other.register_load_state_dict_post_hook(lambda _: calls.append("first"), prepend=True)
    other.load_state_dict(saved)
    assert calls == ["first", "halves"]
    assert other.param_groups[0]["lr"] == 0.123
    assert len(other.state) == len(params)
    for param, before in zip(fresh, params, strict=True):
        now, was = other.state[param], optimizer.state[before]
        assert_same({**now, "step": None}, {**{role: value * 0.5 for role, value in was.items()}, "step": None})
    for param in params:  # and the next step starts from them
        for role in optimizer.state[param].keys() - {"step"}:
            optimizer.state[param][role].mul_(0.5)
    optimizer.param_groups[0]["lr"] = 0.123
    train(optimizer, params, range(5, 8))
    train(other, fresh, range(5, 8))
    assert_same(numbers(other, fresh), numbers(optimizer, params))


@each_kind
def test_state_dict_hooks_are_called_once_in_order(column: Column) -> None:
    _, optimizer = trained(column)
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("first pre"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("first post"), prepend=True)
    handle = optimizer.register_state_dict_post_hook(lambda *_: calls.append("removed"))
    handle.remove()
    optimizer.state_dict()
    assert calls == ["first pre", "pre", "first post", "post"]


@each_kind
def test_what_a_state_dict_pre_hook_does_is_saved(column: Column) -> None:
    params, optimizer = trained(column)

    def averages(optimizer: Any) -> None:
        optimizer.param_groups[0]["note"] = "saved by a hook"
        for role in optimizer.state[params[0]].keys() - {"step"}:
            optimizer.state[params[0]][role].zero_()

    optimizer.register_state_dict_pre_hook(averages)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["note"] == "saved by a hook"
    for role in optimizer.state[params[0]].keys() - {"step"}:
        assert not saved["state"][0][role].any()


@each_kind
def test_a_state_dict_post_hook_edits_what_is_returned(column: Column) -> None:
    """The hook saw a state dict of views, and what it did to it was thrown away."""
    params, optimizer = trained(column)
    before, seen = copy.deepcopy(optimizer.state_dict()), []

    def edits(one: Optimizer, state_dict: dict[str, Any]) -> None:
        seen.append(copy.deepcopy(state_dict))
        assert one is optimizer
        del state_dict["state"][1]
        state_dict["state"][0] = {role: value.bfloat16() for role, value in state_dict["state"][0].items()}
        state_dict["format"] = 2

    handle = optimizer.register_state_dict_post_hook(edits)
    got = optimizer.state_dict()
    handle.remove()
    assert_same(seen, [before])
    assert got["format"] == 2
    assert sorted(got["state"]) == [0, *range(2, len(params))]
    assert_same(got["state"][0], {role: value.bfloat16() for role, value in before["state"][0].items()})
    assert_same(optimizer.state_dict(), before)


@each_kind
def test_what_a_state_dict_post_hook_returns_is_the_state_dict(column: Column) -> None:
    _, optimizer = trained(column)
    mine = {"state": {}, "param_groups": []}
    optimizer.register_state_dict_post_hook(lambda *_: mine)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict))
    assert optimizer.state_dict() is mine
    assert seen == [mine]
    assert seen[0] is mine


# ---------------------------------------------------------------------------------------------------------------------
# State that others put there
# ---------------------------------------------------------------------------------------------------------------------


def foreign() -> dict[str, Any]:
    """What wrappers keep beside the state of a parameter: tensors of any shape and dtype, and what is no tensor."""
    return {
        "slow": torch.arange(6.0),
        "double": torch.ones(2, 3, dtype=torch.float64),
        "count": 7,
        "seen": torch.tensor(3),
        "rate": 0.5,
        "nested": {"inner": torch.ones(2, dtype=torch.float64), "deeper": [torch.zeros(1), 4]},
        "nothing": None,
    }


def add_foreign(optimizer: Any, params: list[Parameter]) -> None:
    for param in (params[0], params[2]):  # a matrix and a vector
        optimizer.state[param].update(foreign())


def foreign_of(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key in foreign()}


@each_kind
def test_foreign_state_of_a_parameter_stays_untouched(column: Column) -> None:
    """A Lookahead wrapper keeps its slow weights in optimizer.state[p]; the next step raised ValueError."""
    (params, optimizer), (again, undisturbed) = trained(column, 2), trained(column, 2)
    add_foreign(optimizer, params)
    slow = optimizer.state[params[0]]["slow"]
    train(optimizer, params, range(2, 6))
    train(undisturbed, again, range(2, 6))
    assert_same(values(params), values(again))
    assert optimizer.state[params[0]]["slow"] is slow
    for param in (params[0], params[2]):
        assert_same(foreign_of(optimizer.state[param]), foreign())


@every_column
def test_foreign_state_is_saved_and_comes_back_as_torch_keeps_it(column: Column) -> None:
    """torch casts tensors beside the state to the dtype of their parameter, also nested ones, and keeps the rest."""
    for dtype in (torch.float32, torch.bfloat16):
        loaded = []
        for each in (CONTROL, column):
            params = parameters(SHAPES, dtype=dtype)
            optimizer = each(params)
            train(optimizer, params, range(3))
            add_foreign(optimizer, params)
            saved = through_a_file(optimizer.state_dict())
            for place in (0, 2):
                assert_same(foreign_of(saved["state"][place]), foreign())
            assert not foreign_of(saved["state"][1])
            fresh = copies(params)
            other = each(fresh)
            other.load_state_dict(saved)
            loaded.append([foreign_of(other.state[param]) for param in fresh])
            train(optimizer, params, range(3, 6))
            train(other, fresh, range(3, 6))
            if each.ours:  # torch's own state of bfloat16 parameters comes back rounded, and steps as such
                assert_same(values(fresh), values(params))
        assert_same(loaded[1], loaded[0])
        assert loaded[0][0]["double"].dtype == dtype


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@each_kind
@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_foreign_state_and_foreign_keys(column: Column, copied: str) -> None:
    params, optimizer = trained(column, 3)
    add_foreign(optimizer, params)
    add_keys(optimizer)
    again, other = COPIES[copied]((params, optimizer))
    for param in (again[0], again[2]):
        assert_same(foreign_of(other.state[param]), foreign())
    assert_same({key: other.state[key] for key in KEYS}, KEYS)
    assert other.state["run"]["sum"] is not optimizer.state["run"]["sum"]
    train(optimizer, params, range(3, 6))
    train(other, again, range(3, 6))
    assert_same(numbers(other, again), numbers(optimizer, params))


KEYS: dict[str, Any] = {
    "run": {"sum": torch.ones(3, dtype=torch.float64), "count": 3, "name": "trac", "refs": [torch.zeros(2, 2)]},
    "number": 5,
    "tensor": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "nothing": None,
}
"""Keys of optimizer.state that are no parameters, with what a wrapper may keep there."""


def add_keys(optimizer: Any) -> None:
    optimizer.state.update(copy.deepcopy(KEYS))


@every_column
def test_keys_that_are_no_parameters_are_kept_saved_and_loaded(column: Column) -> None:
    """optimizer.state["run"] was lost in state_dict(), and stopped what walks through the state."""
    (params, optimizer), (again, undisturbed) = trained(column, 2), trained(column, 2)
    add_keys(optimizer)
    train(optimizer, params, range(2, 5))
    train(undisturbed, again, range(2, 5))
    assert_same(values(params), values(again))
    assert_same({key: optimizer.state[key] for key in KEYS}, KEYS)
    saved = through_a_file(optimizer.state_dict())
    assert_same({key: saved["state"][key] for key in KEYS}, KEYS)
    assert set(saved["state"]) == {*range(len(params)), *KEYS}
    fresh = copies(params)
    other = column(fresh)
    other.load_state_dict(saved)
    assert_same({key: other.state[key] for key in KEYS}, KEYS)  # no cast: they belong to no parameter
    train(optimizer, params, range(5, 8))
    train(other, fresh, range(5, 8))
    assert_same(numbers(other, fresh), numbers(optimizer, params))


def tuned(optimizer: Any, params: list[Parameter]) -> None:
    """Scales how far the weights have come since the start by a learned factor, and keeps all it knows in the state.

    As TRAC does (Muppidi et al., arXiv:2405.16642), in short.
    """
    known = optimizer.state["trac"]
    if not known:
        known.update(start=values(params), scale=torch.ones((), dtype=torch.float64), steps=0)
    with torch.no_grad():
        moved = [param - start for param, start in zip(params, known["start"], strict=True)]
        gain = sum(float((way * param.grad).sum()) for way, param in zip(moved, params, strict=True))
        before = known["scale"].clone()
        known["scale"].sub_(0.1 * torch.tanh(torch.tensor(gain, dtype=torch.float64)))
        known["steps"] += 1
        for param, start, way in zip(params, known["start"], moved, strict=True):
            param.copy_(start + way * float(known["scale"] / before))


@each_kind
def test_a_wrapper_that_keeps_its_state_under_a_name_resumes_exactly(column: Column) -> None:
    sides = []
    for stop in (None, 4):
        params = parameters(SHAPES)
        optimizer = column(params)
        for step in range(8):
            if step == stop:
                saved, params = through_a_file(optimizer.state_dict()), copies(params)
                optimizer = column(params)
                optimizer.load_state_dict(saved)
            train(optimizer, params, [step])
            tuned(optimizer, params)
        assert optimizer.state["trac"]["steps"] == 8
        sides.append(numbers(optimizer, params))
    assert_same(*sides)
    assert float(sides[0][1]["trac"]["scale"]) != 1.0


@every_column
def test_saved_state_put_back_into_the_state_steps_on(column: Column) -> None:
    """torch's ZeroRedundancyOptimizer assigns entries of a state dict: their layout beside the roles was refused."""
    (params, optimizer), (again, undisturbed) = trained(column, 3), trained(column, 3)
    saved = optimizer.state_dict()["state"]
    for place, param in enumerate(params):
        optimizer.state[param] = saved[place]
    train(optimizer, params, range(3, 8))
    train(undisturbed, again, range(3, 8))
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))


@over(*WITH_FACTORS)
@pytest.mark.parametrize("form", [{"state_dtype": "bfloat16"}, {"state_dtype": "bfloat16", "pack_factors": True}])
def test_saved_state_of_fewer_bytes_put_back_steps_on(column: Column, form: dict[str, Any]) -> None:
    (params, optimizer), (again, undisturbed) = trained(column, 3, **form), trained(column, 3, **form)
    saved = optimizer.state_dict()["state"]
    for place, param in enumerate(params):
        optimizer.state[param] = saved[place]
    add_foreign(optimizer, params)
    train(optimizer, params, range(3, 8))
    train(undisturbed, again, range(3, 8))
    assert_same(values(params), values(again))
    for param in (params[0], params[2]):
        assert_same(foreign_of(optimizer.state[param]), foreign())


@each_kind_of_ours
def test_foreign_state_before_the_first_step_is_kept(column: Column) -> None:
    """More than torch gives: its AdamW takes any entry for its own. A wrapper may come before the first step."""
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, undisturbed = column(params), column(again)
    add_foreign(optimizer, params)
    add_keys(optimizer)
    train(optimizer, params, range(5))
    train(undisturbed, again, range(5))
    assert_same(values(params), values(again))
    assert_same(foreign_of(optimizer.state[params[0]]), foreign())
    assert_same({key: optimizer.state[key] for key in KEYS}, KEYS)


@each_kind_of_ours
def test_foreign_state_of_a_parameter_that_was_never_stepped_is_saved_and_loaded(column: Column) -> None:
    """More than torch gives, whose AdamW looks for its own. A wrapper keeps slow weights of unused experts too."""
    params = parameters(SHAPES)
    optimizer = column(params)
    train(optimizer, params, range(3), absent=[0, 2])
    add_foreign(optimizer, params)
    saved = through_a_file(optimizer.state_dict())
    assert_same(chosen(saved["state"], [0, 2]), [foreign(), foreign()])
    fresh = copies(params)
    other = column(fresh)
    other.load_state_dict(saved)
    for one, its in ((optimizer, params), (other, fresh)):
        train(one, its, range(3, 6), absent=[0, 2])
        assert [sorted(one.state[its[place]]) for place in (0, 2)] == [sorted(foreign())] * 2
    assert_same(values(fresh), values(params))


def refused(column: Column, saved: dict[str, Any], params: list[Parameter]) -> None:
    """Asserts that state is refused, and that the refusal changes nothing."""
    mine, optimizer = trained(column, 4)
    before = copy.deepcopy((numbers(optimizer, mine), optimizer.param_groups[0]["lr"]))
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match="does not fit the current settings"):
        optimizer.load_state_dict(saved)
    assert_same((numbers(optimizer, mine), optimizer.param_groups[0]["lr"]), before)


@every_column_of_ours
def test_a_role_that_is_missing_is_refused(column: Column) -> None:
    """More than torch gives, which finds out at the next step, or never."""
    params, optimizer = trained(column, 3)
    for place in (0, 2):
        for role in optimizer.state[params[place]]:
            saved = optimizer.state_dict()
            del saved["state"][place][role]
            refused(column, saved, params)


@every_column_of_ours
def test_a_role_of_another_shape_is_refused(column: Column) -> None:
    """More than torch gives."""
    params, optimizer = trained(column, 3)
    for place in (0, 2):
        for role in optimizer.state[params[place]].keys() - {"step"}:
            saved = optimizer.state_dict()
            saved["state"][place][role] = torch.zeros(1, 3, 7)
            refused(column, saved, params)


@every_column_of_ours
def test_a_role_of_the_family_that_the_settings_do_not_have_is_refused(column: Column) -> None:
    """More than torch gives. What others put there is kept; `exp_avg_sq_row` in a SOAP without it is a mistake."""
    params, optimizer = trained(column, 3)
    others = family_roles().keys() - optimizer.state[params[0]].keys()
    assert len(others) > 3
    for role in others:
        saved = optimizer.state_dict()
        saved["state"][0][role] = torch.zeros(family_roles()[role])
        refused(column, saved, params)


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers
# ---------------------------------------------------------------------------------------------------------------------

STOP, STEPS = 6, 12


def one_cycle(optimizer: Optimizer, top: float = 0.1, low: float = 0.7) -> Any:
    return lr_scheduler.OneCycleLR(
        optimizer, max_lr=[top, top / 2], total_steps=STEPS + 1, base_momentum=low, max_momentum=low + 0.2
    )


def cyclic(optimizer: Optimizer, top: float = 0.1, low: float = 0.7) -> Any:
    return lr_scheduler.CyclicLR(
        optimizer,
        base_lr=[top / 10, top / 20],
        max_lr=[top, top / 2],
        step_size_up=4,
        cycle_momentum=True,
        base_momentum=low,
        max_momentum=low + 0.2,
    )


CYCLES = {"OneCycleLR": one_cycle, "CyclicLR": cyclic}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda t: 0.9, lambda t: 0.8]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 8), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=2.0),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, [1e-3, 1e-4], anneal_epochs=9),
}


def scheduled(
    column: Column,
    schedule: Callable[[Optimizer], Any],
    *,
    resume: bool,
    anew: Callable[[Optimizer], Any] | None = None,
    **changed: Any,
) -> tuple[list[Any], list[Any], Any]:
    """Twelve steps under a scheduler; with ``resume``, model, optimizer and scheduler are new objects after six.

    Args:
        column: Makes the optimizer.
        schedule: Makes the scheduler.
        resume: Whether to save and load in the middle.
        anew: Makes the scheduler of the second half, where that is made with other arguments.
        changed: Settings of the optimizer of the second half.

    Returns:
        Learning rate and betas of each group at each step, weights after each step, the optimizer.
    """

    def grouped(params: list[Parameter], **settings: Any) -> Any:
        return column([{"params": params[:3], "lr": 0.02}, {"params": params[3:]}], **settings)

    params = parameters(SHAPES)
    optimizer, seen, ways = grouped(params), [], []
    scheduler = schedule(optimizer)
    for step in range(STEPS):
        if resume and step == STOP:
            saved = through_a_file(optimizer.state_dict())
            of_scheduler, params = copy.deepcopy(scheduler.state_dict()), copies(params)
            optimizer = grouped(params, **changed)
            scheduler = (anew or schedule)(optimizer)
            optimizer.load_state_dict(saved)
            scheduler.load_state_dict(of_scheduler)
        seen.append([(float(group["lr"]), tuple(group["betas"])) for group in optimizer.param_groups])
        train(optimizer, params, [step])
        ways.append(values(params))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return seen, ways, optimizer


@every_column
def test_a_run_whose_betas_are_cycled_resumes_exactly(column: Column) -> None:
    """Betas came from the constructor, where a scheduler had cycled them: the first step of each half was another."""
    for cycle in CYCLES.values():
        seen, ways, _ = scheduled(column, cycle, resume=False)
        assert len({betas for _, betas in (groups[0] for groups in seen)}) > 4
        again, others, _ = scheduled(column, cycle, resume=True)
        assert again == seen
        assert_same(others, ways)


@each_kind
def test_what_a_cycle_keeps_in_the_groups_comes_from_the_checkpoint(column: Column) -> None:
    """max_lr, min_lr, initial_lr, base_momentum and max_momentum: a new cycle was begun with other arguments."""
    for cycle in CYCLES.values():
        seen, ways, whole = scheduled(column, cycle, resume=False)
        again, others, resumed = scheduled(column, cycle, resume=True, anew=partial(cycle, top=0.3, low=0.5))
        assert again == seen
        assert_same(others, ways)
        for group, wanted in zip(resumed.param_groups, whole.param_groups, strict=True):
            for key in ("lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "betas"):
                assert group.get(key) == wanted.get(key), key


@each_kind_of_ours
def test_settings_that_no_cycle_changes_come_from_the_constructor(column: Column) -> None:
    """More than torch gives, whose settings all come from the checkpoint."""
    for cycle in CYCLES.values():
        changed = {"weight_decay": 0.25, "eps": 1e-5}
        if column.name != "mars":
            changed["precondition_frequency"] = 2
        seen, ways, _ = scheduled(column, cycle, resume=False)
        again, others, resumed = scheduled(column, cycle, resume=True, **changed)
        assert again == seen
        assert_same(others[:STOP], ways[:STOP])
        assert not torch.equal(others[-1][0], ways[-1][0])
        for group in resumed.param_groups:
            assert {key: group[key] for key in changed} == changed


@each_kind
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_sets_what_it_sets_for_adamw_and_resumes(column: Column, name: str) -> None:
    betas = {"betas": (0.9, 0.99)}
    wanted, *_ = scheduled(Column("AdamW", partial(CONTROL.make, **betas)), SCHEDULERS[name], resume=False)
    column = Column(column.name, partial(column.make, **betas))
    seen, ways, _ = scheduled(column, SCHEDULERS[name], resume=False)
    again, others, _ = scheduled(column, SCHEDULERS[name], resume=True)
    assert len({str(groups) for groups in seen}) > 1
    assert seen == wanted
    assert again == seen
    assert_same(others, ways)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that take the place of others
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS = [[0, 2], [1], [3, 4, 5], [2], [0, 1]]
"""As BAdam (Luo et al., arXiv:2404.02827) trains a model: some parameters at a time, others for the next steps."""


@every_column
def test_groups_may_be_given_other_parameters_and_no_state(column: Column) -> None:
    """Parameters of other shapes in a group were taken for the flat vectors of DeepSpeed, and BAdam was refused."""
    for kept in (True, False):
        params, again = parameters(SHAPES), parameters(SHAPES)
        optimizer = column(params)
        for number, block in enumerate(BLOCKS):
            active = [params[place] for place in block]
            if kept:
                optimizer.param_groups[0]["params"] = active
            else:
                optimizer.param_groups = [{**optimizer.param_groups[0], "params": active}]
            optimizer.state = defaultdict(dict)
            steps = range(4 * number, 4 * number + 4)
            train(optimizer, active, steps, block)
            mirror = [again[place] for place in block]
            fresh = column(mirror)
            train(fresh, mirror, steps, block)
            assert_same(values(params), values(again))
            assert_same(optimizer.state_dict()["state"], fresh.state_dict()["state"])
            assert set(optimizer.state) == set(active)


@each_kind
def test_state_waits_for_parameters_that_come_back(column: Column) -> None:
    """Nobody cleared it: each part goes on where it was, as two optimizers do."""
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer = column(params)
    parts = [[0, 2, 4], [1, 3, 5]]
    apart = [column([again[place] for place in part]) for part in parts]
    for turn in range(6):
        part = parts[turn % 2]
        optimizer.param_groups[0]["params"] = [params[place] for place in part]
        steps = range(2 * turn, 2 * turn + 2)
        train(optimizer, optimizer.param_groups[0]["params"], steps, part)
        train(apart[turn % 2], [again[place] for place in part], steps, part)
        assert_same(values(params), values(again))


PRUNED: list[dict[int, tuple[int, ...]]] = [{0: (4, 6)}, {1: (4, 5), 3: (2, 3)}, {2: (3,)}, {0: (3, 6), 2: (3,)}]


@every_column
def test_a_pruned_parameter_starts_afresh_and_the_others_go_on(column: Column) -> None:
    """A layer that lost rows stopped the run: its new weight was taken for a flat vector of DeepSpeed."""
    for smaller in PRUNED:
        (params, optimizer), (again, undisturbed) = trained(column, 4), trained(column, 4)
        for place, shape in smaller.items():
            old = params[place]
            params[place] = Parameter(old.detach()[tuple(slice(size) for size in shape)].clone())
            optimizer.param_groups[0]["params"][place] = params[place]
            del optimizer.state[old]
        alone = copies(params[place] for place in smaller)
        fresh = column(alone)
        train(optimizer, params, range(4, 8))
        train(undisturbed, again, range(4, 8))
        train(fresh, alone, range(4, 8), list(smaller))
        others = [place for place in range(len(params)) if place not in smaller]
        assert_same(chosen(values(params), others), chosen(values(again), others))
        assert_same(chosen(values(params), smaller), values(alone))
        state, mine, theirs = (one.state_dict()["state"] for one in (optimizer, undisturbed, fresh))
        assert_same(chosen(state, others), chosen(mine, others))
        assert_same(chosen(state, smaller), chosen(theirs, range(len(alone))))


def one_flat(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(torch.cat([param.detach().flatten() for param in params]))]


def views_of_each(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().flatten().clone()) for param in params]


def views_of_a_rank(params: list[Parameter]) -> list[Parameter]:
    """What a rank has of each: all of one, half of another, a third, and nothing of the last."""
    whole = [param.detach().flatten() for param in params]
    sizes = [part.numel() // (1 + place % 3) for place, part in enumerate(whole)]
    return [Parameter(part[:size].clone()) for part, size in zip(whole, [*sizes[:-1], 0], strict=True)]


@each_kind_of_ours
@pytest.mark.parametrize("flattened", [one_flat, views_of_each, views_of_a_rank])
def test_flat_vectors_in_place_of_matrices_are_refused(
    column: Column, flattened: Callable[[list[Parameter]], list[Parameter]]
) -> None:
    """More than torch gives: DeepSpeed and FSDP1 put flat vectors there, on which all that is left is Adam."""
    for steps in (0, 3):
        params, optimizer = trained(column, steps)
        flat = flattened(params)
        optimizer.param_groups[0]["params"] = flat
        before = values(flat)
        with pytest.raises(ValueError, match="FSDP2"):
            train(optimizer, flat, [steps])
        assert_same(values(flat), before)


@each_kind
def test_vectors_in_a_group_of_their_own_may_be_pruned(column: Column) -> None:
    """Biases without weight decay have a group of their own, which held no matrices to be flattened."""
    params = parameters([(5,), (7,)])
    optimizer = column(params)
    train(optimizer, params, range(2))
    other, again = parameters([(3,), (5,)]), parameters([(3,), (5,)])
    optimizer.param_groups[0]["params"] = other
    optimizer.state.clear()
    train(optimizer, other, range(3))
    train(column(again), again, range(3))
    assert_same(values(other), values(again))


BLOCKED = [
    Column("soap in blocks", partial(SOAP, block_size=3)),
    Column("shampoo in blocks", partial(Shampoo, block_size=3, precondition_frequency=3, start_step=2)),
]
RESHAPED = [(1, (9, 4)), (1, (6, 6)), (1, (36,)), (0, (4, 9)), (0, (36,)), (0, (2, 3, 6)), (2, (5, 1)), (4, (4, 6))]


def reshaped(param: Parameter, shape: tuple[int, ...]) -> None:
    now = param.data.t() if tuple(param.shape[::-1]) == shape and param.dim() == 2 else param.data
    param.data = now.contiguous().reshape(shape)
    param.grad = None


@over(*COLUMNS, *BLOCKED)
def test_a_parameter_whose_shape_changed_under_its_state_is_refused(column: Column) -> None:
    """p.data = p.data.t().contiguous() has as many entries, and went on with moments and factors of others.

    More than torch gives: its AdamW stops with an error of another kind, or goes on where shapes broadcast.
    """
    for place, shape in RESHAPED:
        params, optimizer = trained(column, 4)
        reshaped(params[place], shape)
        before = values(params)
        with pytest.raises(ValueError):
            train(optimizer, params, [4])
        assert_same(values(params), before)


@every_column
def test_a_parameter_whose_shape_changed_and_whose_state_was_dropped_is_a_new_one(column: Column) -> None:
    for place, shape in RESHAPED:
        (params, optimizer), (again, undisturbed) = trained(column, 4), trained(column, 4)
        reshaped(params[place], shape)
        optimizer.state.pop(params[place])
        alone = copies([params[place]])
        train(optimizer, params, range(4, 7))
        train(undisturbed, again, range(4, 7))
        train(column(alone), alone, range(4, 7), [place])
        assert_same(values([params[place]]), values(alone))
        others = [number for number in range(len(params)) if number != place]
        assert_same(chosen(values(params), others), chosen(values(again), others))


# ---------------------------------------------------------------------------------------------------------------------
# Empty parameters, other default devices, inference mode, compiled steps
# ---------------------------------------------------------------------------------------------------------------------

WITH_AN_EMPTY_ONE = [(6, 6), (0, 4), (5,), (6, 6)]


@every_column
def test_an_empty_parameter_has_state_and_resumes(column: Column) -> None:
    """It had none, so that torch.distributed.checkpoint missed it."""
    params = parameters(WITH_AN_EMPTY_ONE)
    optimizer = column(params)
    train(optimizer, params, range(3))
    assert set(optimizer.state) == set(params)
    saved = through_a_file(optimizer.state_dict())
    assert all(
        "step" in saved["state"][place] for place in range(4)
    )  # rules that wait for a non-zero gradient count none
    fresh = copies(params)
    other = column(fresh)
    other.load_state_dict(saved)
    train(optimizer, params, range(3, 6))
    train(other, fresh, range(3, 6))
    assert_same(numbers(other, fresh), numbers(optimizer, params))


class Weights(nn.Module):
    """A model of plain parameters."""

    def __init__(self, params: list[Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)


@every_column
def test_distributed_checkpoints_state_dicts_of_one_process_resume(column: Column) -> None:
    """It names every trainable parameter, and one without state, such as an empty one, stopped the load."""
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        params = parameters(WITH_AN_EMPTY_ONE)
        optimizer, model = column(params), Weights(params)
        optimizer.param_groups[0]["lr"] = 0.02
        train(optimizer, params, range(3))
        saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
        fresh = copies(params)
        other, again = column(fresh), Weights(fresh)
        set_optimizer_state_dict(again, other, saved, options=options)
        assert other.param_groups[0]["lr"] == 0.02
        train(optimizer, params, range(3, 6))
        train(other, fresh, range(3, 6))
        assert_same(numbers(other, fresh), numbers(optimizer, params))


FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "packed": {"pack_factors": True},
    "bfloat16, packed": {"state_dtype": "bfloat16", "pack_factors": True},
}
in_each_form = pytest.mark.parametrize(
    ("column", "form"),
    [
        pytest.param(CONTROL, {}, id=CONTROL.name),
        *(
            pytest.param(column, form, id=f"{column.name}-{name}")
            for column in WITH_FACTORS
            for name, form in FORMS.items()
        ),
    ],
)


def step_on(optimizer: Any, params: list[Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def gradients(steps: int) -> list[list[Tensor]]:
    """The same at every call, made before the program's settings are changed."""
    params = parameters(SHAPES)
    return [[gradient(param, place, step) for place, param in enumerate(params)] for step in range(steps)]


@pytest.fixture
def _cold() -> None:
    """What was computed once for the whole process may have been made under a setting, or hide that it was not."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "hf_soap":
            for value in list(vars(module).values()):
                if callable(forget := getattr(value, "cache_clear", None)):
                    forget()


@in_each_form
@pytest.mark.usefixtures("_cold")
def test_the_default_device_makes_no_difference(column: Column, form: dict[str, Any]) -> None:
    """Under torch.device("meta"), in which large models are made, counts and noise came without numbers."""
    grads = gradients(8)
    params, again = parameters(SHAPES), parameters(SHAPES)
    torch.set_default_device("meta")
    try:
        optimizer = column(params, **form)
        for each in grads[:4]:
            step_on(optimizer, params, each)
        saved = copy.deepcopy(optimizer.state_dict())
        loaded, copied = copy.deepcopy(params), copy.deepcopy((params, optimizer))
        other = column(loaded, **form)
        other.load_state_dict(saved)
        sides = [(optimizer, params), (other, loaded), copied[::-1]]
        for each in grads[4:]:
            for one, its in sides:
                step_on(one, its, each)
    finally:
        torch.set_default_device(None)
    undisturbed = column(again, **form)
    for each in grads:
        step_on(undisturbed, again, each)
    for one, its in sides:
        assert_same(numbers(one, its), numbers(undisturbed, again))


def steps_in_inference_mode(column: Column, form: dict[str, Any], inside: range) -> None:
    """Asserts that steps inside give what steps outside give, and that others may follow outside."""
    grads = gradients(8)
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, undisturbed = column(params, **form), column(again, **form)
    for step, each in enumerate(grads):
        with torch.inference_mode(step in inside):
            step_on(optimizer, params, each)
    for each in grads:
        step_on(undisturbed, again, each)
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))
    assert not any(param.is_inference() for param in params)
    params[0].square().sum().backward()


@in_each_form
@pytest.mark.usefixtures("_cold")
def test_steps_in_inference_mode_are_steps(column: Column, form: dict[str, Any]) -> None:
    steps_in_inference_mode(column, form, range(2, 5))


@pytest.mark.parametrize("form", FORMS)
@over(*WITH_FACTORS)
@pytest.mark.usefixtures("_cold")
def test_state_made_in_inference_mode_may_be_stepped_outside(column: Column, form: str) -> None:
    """More than torch gives, whose state is then of inference tensors, which nothing outside may change."""
    steps_in_inference_mode(column, FORMS[form], range(3))


@over(CONTROL, *KINDS[:1])
def test_a_compiled_step_gives_the_same_numbers_and_compiles_nothing_of_ours(column: Column) -> None:
    """torch.compile(optimizer.step) took dozens of graphs out of a step that waits for numbers at every turn."""
    (params, optimizer), (again, undisturbed) = trained(column, 0), trained(column, 0)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    step = torch.compile(optimizer.step, backend=backend)
    try:
        for number in range(4):
            backward(params, number)
            step()
        compiled = {str(frame.co_filename) for frame in torch._dynamo.utils.get_compilation_metrics()}
    finally:
        torch._dynamo.reset()
    train(undisturbed, again, range(4))
    assert compiled
    if not column.ours:
        assert graphs
        torch.testing.assert_close(values(params), values(again))
        return
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))
    home = str(Path(hf_soap.__file__).parent)
    assert not [file for file in compiled if file.startswith(home)]
    assert not [node for graph in graphs for node in graph.graph.nodes if home in (node.stack_trace or "")]


# ---------------------------------------------------------------------------------------------------------------------
# Keywords of torch's optimizers
# ---------------------------------------------------------------------------------------------------------------------

KEYWORDS: list[dict[str, Any]] = [
    *({name: value} for name in ("foreach", "fused") for value in (None, True, False)),
    {"maximize": False},
    {"differentiable": False},
    {"foreach": False, "fused": True, "maximize": False, "differentiable": False},
]


@every_column
def test_keywords_of_torchs_optimizers_are_taken(column: Column) -> None:
    """A program that passes foreach or fused to any optimizer got a TypeError; they only say how a step is made."""
    again, undisturbed = trained(column, 4)
    for keywords in KEYWORDS:
        params, optimizer = trained(column, 4, **keywords)
        for name, value in keywords.items():
            assert optimizer.defaults[name] is optimizer.param_groups[0][name] is value
        torch.testing.assert_close(values(params), values(again), rtol=1e-5, atol=1e-7)
        if column.ours:
            assert_same(numbers(optimizer, params), numbers(undisturbed, again))
        optimizer.zero_grad(set_to_none=False)
        assert not any(param.grad.any() for param in params)
        other = column([{"params": copies(params), **keywords}])
        other.load_state_dict(optimizer.state_dict())


@each_kind
def test_a_checkpoint_without_these_keywords_is_loaded(column: Column) -> None:
    """Those that were written before the constructor took them."""
    params, optimizer = trained(column, 4)
    saved = through_a_file(optimizer.state_dict())
    for name in ("foreach", "fused", "maximize", "differentiable"):
        saved["param_groups"][0].pop(name, None)
    fresh = copies(params)
    other = column(fresh)
    other.load_state_dict(saved)
    train(optimizer, params, range(4, 7))
    train(other, fresh, range(4, 7))
    assert_same(numbers(other, fresh), numbers(optimizer, params))
    assert other.param_groups[0]["maximize"] is False


@each_kind_of_ours
def test_a_differentiable_step_is_refused(column: Column) -> None:
    """No column of ours keeps a graph through its decompositions; to take the word and not to do so would be wrong."""
    params = parameters(SHAPES)
    with pytest.raises(ValueError, match="differentiable"):
        column(params, differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        column([{"params": params, "differentiable": True}])
    optimizer = column(params)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "differentiable": True})
    assert len(optimizer.param_groups) == 1


@every_column
def test_maximize_is_a_run_on_negated_gradients(column: Column) -> None:
    """A group that said maximize=True was refused, and the constructor did not know the word."""
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, negated = column(params, maximize=True), column(again)
    for step in range(7):
        if step == 4:  # resumes
            saved, params = through_a_file(optimizer.state_dict()), copies(params)
            assert saved["param_groups"][0]["maximize"] is True
            optimizer = column(params, maximize=True)
            optimizer.load_state_dict(saved)
        train(optimizer, params, [step])
        given = values(param.grad for param in params)
        train(negated, again, [step], signs=[-1] * len(again))
        assert_same(numbers(optimizer, params), numbers(negated, again))
        assert_same(given, [-param.grad for param in again])
    backward(params, 7)
    before = values(param.grad for param in params)
    if column.name != "mars-exact":
        optimizer.step()
        assert_same(values(param.grad for param in params), before)  # whoever logs them reads what autograd gave


@every_column
def test_maximize_is_each_groups_own_and_may_change(column: Column) -> None:
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer = column([{"params": params[:3], "maximize": True}, {"params": params[3:]}])
    negated = column([{"params": again[:3]}, {"params": again[3:]}])
    for step in range(8):
        signs = [-1, 1] if step < 4 else [1, -1]
        for group, sign in zip(optimizer.param_groups, signs, strict=True):
            group["maximize"] = sign < 0
        train(optimizer, params, [step])
        train(negated, again, [step], signs=[signs[0]] * 3 + [signs[1]] * 3)
        assert_same(numbers(optimizer, params), numbers(negated, again))


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a group at each step
# ---------------------------------------------------------------------------------------------------------------------


@every_column
def test_learning_rate_and_weight_decay_are_those_of_the_group_at_each_step(column: Column) -> None:
    params, optimizer = trained(column, 4, weight_decay=0.1)
    saved, again = through_a_file(optimizer.state_dict()), copies(params)
    other = column(again, weight_decay=0.4)
    other.load_state_dict(saved)
    for group in (optimizer.param_groups[0], other.param_groups[0]):
        group["lr"], group["weight_decay"] = 0.03, 0.4
    train(optimizer, params, range(4, 6))
    train(other, again, range(4, 6))
    assert_same(numbers(optimizer, params), numbers(other, again))
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(params)
    train(optimizer, params, range(6, 8))
    assert_same(values(params), before)


VARIANTS = [Column(f"MARS {name}", partial(MARS, variant=name)) for name in ("adamw", "lion", "shampoo", "m", "soap")]
RATE, ROUNDS = 0.1, 3


def shrinks(optimizer: Any, params: list[Parameter], decays: list[float]) -> None:
    """Asserts by how much weights shrink in three steps with gradients of zero."""
    before = values(params)
    for _ in range(ROUNDS):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, old, decay in zip(params, before, decays, strict=True):
        if decay:
            torch.testing.assert_close(param.detach(), old * (1 - RATE * decay) ** ROUNDS)
        else:
            assert_same(param.detach(), old)


@over(*VARIANTS)
def test_mars_decays_vectors_as_their_group_says(column: Column) -> None:
    """weight_decay=0 in the constructor decayed biases by 0.1, and a group's own was that of its construction."""
    for make in (
        partial(column, lr=RATE),
        lambda params, **settings: column([{"params": params, "lr": RATE}], **settings),
    ):
        params = parameters([(5,), ()])
        optimizer = make(params, weight_decay=0.0)
        shrinks(optimizer, params, [0.0, 0.0])
        optimizer.param_groups[0]["weight_decay"] = 0.3
        shrinks(optimizer, params, [0.3, 0.3])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        shrinks(optimizer, params, [0.0, 0.0])
    params = parameters([(5,), (5,), (5,), (6, 6)])
    groups = [
        {"params": params[:1], "weight_decay": 0.3},
        {"params": params[1:2]},
        {"params": params[2:3], "weight_decay": 0.0},
        {"params": params[3:], "rule": "adam"},  # matrices that are updated as vectors are
    ]
    shrinks(column(groups, lr=RATE, weight_decay=0.2), params, [0.3, 0.2, 0.0, 0.2])


@over(*VARIANTS)
def test_mars_own_decay_of_vectors_wins(column: Column) -> None:
    params = parameters([(5,), (5,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay_1d": 0.0}]
    optimizer = column(groups, lr=RATE, weight_decay=0.3, weight_decay_1d=0.2)
    shrinks(optimizer, params, [0.2, 0.0])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    shrinks(optimizer, params, [0.2, 0.0])
    optimizer.param_groups[0]["weight_decay_1d"] = 0.4
    shrinks(optimizer, params, [0.4, 0.0])


@over(*VARIANTS)
def test_mars_decay_of_vectors_follows_the_group_after_a_load_too(column: Column) -> None:
    params = parameters([(5,)])
    optimizer = column(params, lr=RATE, weight_decay=0.3)
    shrinks(optimizer, params, [0.3])
    saved = through_a_file(optimizer.state_dict())
    for decay in (0.0, 0.2):
        fresh = copies(params)
        other = column(fresh, lr=RATE, weight_decay=decay)
        other.load_state_dict(saved)
        shrinks(other, fresh, [decay])
        other.param_groups[0]["weight_decay"] = 0.1
        shrinks(other, fresh, [0.1])


# ---------------------------------------------------------------------------------------------------------------------
# Parameters without gradients
# ---------------------------------------------------------------------------------------------------------------------

LATE = [1, 2, 3]
"""Places of parameters whose first gradient comes late: a matrix, a vector, and one that shares a stack."""


@every_column
def test_a_parameter_without_gradients_takes_no_state(column: Column) -> None:
    """Unused experts and adapters took state as large as all others, and a checkpoint of it."""
    params = parameters(SHAPES)
    optimizer = column(params)
    train(optimizer, params, range(4), absent=LATE)
    early = [place for place in range(len(params)) if place not in LATE]
    assert set(optimizer.state) == set(chosen(params, early))
    saved = through_a_file(optimizer.state_dict())
    assert sorted(saved["state"]) == early
    alone = copies(chosen(params, LATE))
    fresh, loaded = column(alone), copies(params)
    other = column(loaded)
    other.load_state_dict(saved)
    assert set(other.state) == set(chosen(loaded, early))
    for one, its in ((optimizer, params), (other, loaded)):
        train(one, its, range(4, 6), absent=LATE)
        assert set(one.state) == set(chosen(its, early))
        train(one, its, range(6, 10))
    train(fresh, alone, range(6, 10), LATE)
    assert_same(numbers(other, loaded), numbers(optimizer, params))
    assert_same(chosen(values(params), LATE), values(alone))
    state, first = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert_same(chosen(state, LATE), chosen(first, range(len(LATE))))


@each_kind
def test_a_checkpoint_may_lack_the_state_of_some(column: Column) -> None:
    """They start anew, and the others go on; state that the optimizer already had is gone."""
    params, optimizer = trained(column, 4)
    saved = through_a_file(optimizer.state_dict())
    for place in LATE:
        del saved["state"][place]
    fresh = copies(params)
    other = column(fresh)
    train(other, fresh, range(2))
    for param, wanted in zip(fresh, params, strict=True):
        param.data.copy_(wanted.detach())
    other.load_state_dict(saved)
    assert set(other.state) == {param for place, param in enumerate(fresh) if place not in LATE}
    for place in LATE:
        del optimizer.state[params[place]]
    train(optimizer, params, range(4, 8))
    train(other, fresh, range(4, 8))
    assert_same(numbers(other, fresh), numbers(optimizer, params))


@each_kind
def test_a_frozen_parameter_takes_no_state(column: Column) -> None:
    params = parameters(SHAPES)
    for place in LATE:
        params[place].requires_grad_(False)
    optimizer = column(params)
    train(optimizer, params, range(3), absent=LATE)
    assert set(optimizer.state) == {param for param in params if param.requires_grad}
    assert sorted(optimizer.state_dict()["state"]) == [0, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------

MANY = [*[(8, 8)] * 6, (5,), *[(8, 8)] * 6, (8,), (8,), ()]


@every_column
def test_a_group_for_each_parameter_gives_the_numbers_of_one_group(column: Column) -> None:
    params, again = parameters(MANY), parameters(MANY)
    apart, together = column([{"params": [param]} for param in params]), column(again)
    train(apart, params, range(6))
    train(together, again, range(6))
    assert_same(numbers(apart, params), numbers(together, again))


@every_column
def test_a_group_for_each_parameter_gives_the_numbers_of_an_optimizer_for_each(column: Column) -> None:
    params, again = parameters(MANY), parameters(MANY)
    settings = [{"lr": 0.01 * (1 + place % 5), "weight_decay": 0.1 * (place % 3)} for place in range(len(params))]
    optimizer = column([{"params": [param], **own} for param, own in zip(params, settings, strict=True)])
    train(optimizer, params, range(6))
    for place, (param, own) in enumerate(zip(again, settings, strict=True)):
        train(column([param], **own), [param], range(6), [place])
    assert_same(values(params), values(again))


@each_kind
def test_empty_groups_stay_in_place(column: Column) -> None:
    """A layer that is wholly frozen or pruned leaves a group without parameters, with a lambda of its own."""

    def made(params: list[Parameter]) -> tuple[Any, Any]:
        parts = [[], params[:1], [], params[1:4], params[4:], []]
        optimizer = column([{"params": part, "lr": 0.01 * (1 + place)} for place, part in enumerate(parts)])
        return optimizer, lr_scheduler.LambdaLR(optimizer, [(lambda t, p=place: 0.9 ** (t * p)) for place in range(6)])

    params = parameters(SHAPES)
    optimizer, scheduler = made(params)
    resumed: tuple[Any, Any, list[Parameter]] | None = None
    for step in range(6):
        if step == 3:
            fresh = copies(params)
            other, its = made(fresh)
            other.load_state_dict(through_a_file(optimizer.state_dict()))
            its.load_state_dict(scheduler.state_dict())
            resumed = other, its, fresh
        for one, schedule, weights in [(optimizer, scheduler, params), *([resumed] if resumed else [])]:
            train(one, weights, [step])
            schedule.step()
            assert [len(group["params"]) for group in one.param_groups] == [0, 1, 0, 3, 2, 0]
            rates = [0.01 * (1 + place) * 0.9 ** ((step + 1) * place) for place in range(6)]
            assert [group["lr"] for group in one.param_groups] == pytest.approx(rates)
    assert resumed is not None
    assert_same(numbers(resumed[0], resumed[2]), numbers(optimizer, params))
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [
        [],
        [0],
        [],
        [1, 2, 3],
        [4, 5],
        [],
    ]


@each_kind
def test_a_group_that_is_added_later_is_a_new_one(column: Column) -> None:
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, undisturbed = column(params[:4]), column(again[:4])
    train(optimizer, params[:4], range(3))
    optimizer.add_param_group({"params": params[4:], "lr": 0.05})
    late = column(again[4:], lr=0.05)
    train(optimizer, params, range(3, 6))
    train(undisturbed, again[:4], range(6))
    train(late, again[4:], range(3, 6), [4, 5])
    assert_same(values(params), values(again))
    assert optimizer.param_groups[1].keys() >= optimizer.param_groups[0].keys() - {"initial_lr"}
    fresh = copies(params)
    other = column([{"params": fresh[:4]}, {"params": fresh[4:], "lr": 0.05}])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, range(6, 8))
    train(other, fresh, range(6, 8))
    assert_same(numbers(other, fresh), numbers(optimizer, params))


@each_kind
def test_what_torch_refuses_in_groups_is_refused(column: Column) -> None:
    with pytest.raises(TypeError):
        column(torch.ones(2, 2))
    with pytest.raises(ValueError):
        column([])
    with pytest.raises(TypeError):
        column([{"params": {Parameter(torch.ones(2))}}])
    with pytest.raises(TypeError):
        column([2.0])
    with pytest.raises(ValueError):
        column([Parameter(torch.ones(2)) * 2])
    params = parameters(SHAPES)
    optimizer = column(params)
    with pytest.raises(TypeError):
        optimizer.add_param_group(params)
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": params[:1]})
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [("named", Parameter(torch.ones(2)))]})
    with pytest.raises(ValueError):
        column([("named", params[0]), params[1]])
    assert len(optimizer.param_groups) == 1
    for groups in ([params[:1]], [params[:1], params[1:]], [[*params, Parameter(torch.ones(2))]]):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(column([{"params": group} for group in groups]).state_dict())


@each_kind
def test_defaults_groups_and_their_names_are_as_torch_has_them(column: Column) -> None:
    params = parameters(SHAPES)
    groups = [{"params": list(zip(NAMES[:3], params[:3], strict=True)), "lr": 0.5}]
    groups += [{"params": list(zip(NAMES[3:], params[3:], strict=True)), "label": "head"}]
    optimizer = column(groups, lr=0.02, weight_decay=0.3)
    assert isinstance(optimizer.state, defaultdict)
    assert isinstance(optimizer, Optimizer)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.02, 0.3)
    one, two = optimizer.param_groups
    assert (one["lr"], two["lr"], two["label"]) == (0.5, 0.02, "head")
    for group in (one, two):
        assert group.keys() >= optimizer.defaults.keys()
    train(optimizer, params, range(2))
    saved = through_a_file(optimizer.state_dict())
    assert [group["param_names"] for group in saved["param_groups"]] == [NAMES[:3], NAMES[3:]]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
    optimizer.load_state_dict(saved)
    assert [group["param_names"] for group in optimizer.param_groups] == [NAMES[:3], NAMES[3:]]
    assert optimizer.param_groups[1]["label"] == "head"
    kept = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(a is b for a, b in zip(kept, params, strict=True))
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert one.state[Parameter(torch.ones(1))] == {}
        assert type(one).__name__ in repr(one)
        assert "label: head" in repr(one)


# ---------------------------------------------------------------------------------------------------------------------
# Odd calls
# ---------------------------------------------------------------------------------------------------------------------


@every_column
def test_steps_without_any_gradient_change_nothing(column: Column) -> None:
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, undisturbed = column(params), column(again)
    everyone = range(len(params))
    if not getattr(optimizer, "exact", False):  # which wants its second pass before any step
        optimizer.step()
    train(optimizer, params, range(1), absent=everyone)
    assert not optimizer.state
    assert_same(values(params), values(again))
    train(optimizer, params, range(3))
    train(optimizer, params, range(3), absent=everyone)
    train(optimizer, params, range(3, 5))
    train(undisturbed, again, range(5))
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))


@each_kind
def test_zero_grad_clears_or_fills(column: Column) -> None:
    for foreach in (None, True):
        params, optimizer = trained(column, 2, foreach=foreach)
        for param in params:
            param.grad = torch.ones_like(param, requires_grad=True)
        held = [param.grad for param in params]
        optimizer.zero_grad(set_to_none=False)
        for param, grad in zip(params, held, strict=True):
            assert param.grad is grad
            assert not grad.any()
            assert not grad.requires_grad
        optimizer.zero_grad()
        assert all(param.grad is None for param in params)
        optimizer.zero_grad(set_to_none=False)


@every_column
def test_gradients_that_come_and_go_step_each_parameter_by_itself(column: Column) -> None:
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer = column(params)
    present = [{step for step in range(10) if (step + place) % (2 + place % 3)} for place in range(len(params))]
    for step in range(10):
        train(optimizer, params, [step], absent=[place for place, steps in enumerate(present) if step not in steps])
    for place, param in enumerate(again):
        train(column([param]), [param], sorted(present[place]), [place])
    assert_same(values(params), values(again))


@each_kind
def test_freezing_for_a_while_keeps_state(column: Column) -> None:
    params, again = parameters(SHAPES), parameters(SHAPES)
    optimizer, undisturbed = column(params), column(again)
    for first, frozen in ((0, False), (3, True), (6, False)):
        for place in LATE:
            params[place].requires_grad_(not frozen)
        absent = LATE if frozen else ()
        train(optimizer, params, range(first, first + 3), absent=absent)
        train(undisturbed, again, range(first, first + 3), absent=absent)
        assert set(optimizer.state) == set(params)
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))


@every_column
def test_state_that_is_deleted_starts_anew(column: Column) -> None:
    for dropped in ([0], [1, 2], "all"):
        (params, optimizer), (again, undisturbed) = trained(column, 4), trained(column, 4)
        places = list(range(len(params))) if dropped == "all" else dropped
        if dropped == "all":
            optimizer.state.clear()
        else:
            for place in places:
                del optimizer.state[params[place]]
        assert sorted(optimizer.state_dict()["state"]) == [
            place for place in range(len(params)) if place not in places
        ]
        alone = copies(chosen(params, places))
        train(optimizer, params, range(4, 7))
        train(undisturbed, again, range(4, 7))
        train(column(alone), alone, range(4, 7), places)
        assert_same(chosen(values(params), places), values(alone))
        others = [place for place in range(len(params)) if place not in places]
        assert_same(chosen(values(params), others), chosen(values(again), others))


@each_kind_of_ours
def test_a_model_that_changes_its_dtype_goes_on(column: Column) -> None:
    """More than torch gives, whose AdamW stops: model.to(dtype) keeps the parameters and gives them other data."""
    again, _ = trained(column, 6)
    for dtype in (torch.float64, torch.bfloat16):
        params, optimizer = trained(column, 3)
        for param in params:
            param.data, param.grad = param.data.to(dtype), None
        train(optimizer, params, range(3, 6))
        assert {param.dtype for param in params} == {dtype}
        assert all(param.isfinite().all() for param in params)
        if dtype == torch.float64:
            assert_close_to(params, again)
        saved = through_a_file(optimizer.state_dict())
        fresh = copies(params)
        other = column(fresh)
        other.load_state_dict(saved)
        train(optimizer, params, range(6, 8))
        train(other, fresh, range(6, 8))
        assert_same(numbers(other, fresh), numbers(optimizer, params))


def assert_close_to(params: list[Parameter], others: list[Parameter]) -> None:
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.detach().float(), other.detach(), rtol=1e-3, atol=1e-4)


@each_kind
def test_a_checkpoint_is_loaded_into_another_dtype(column: Column) -> None:
    params, optimizer = trained(column, 3)
    saved = through_a_file(optimizer.state_dict())
    train(optimizer, params, range(3, 6))
    start, _ = trained(column, 3)
    for dtype in (torch.float64, torch.bfloat16):
        fresh = [Parameter(param.detach().to(dtype)) for param in start]
        other = column(fresh)
        other.load_state_dict(saved)
        train(other, fresh, range(3, 6))
        assert {param.dtype for param in fresh} == {dtype}
        assert all(param.isfinite().all() for param in fresh)
        assert not any(torch.equal(param, old.to(dtype)) for param, old in zip(fresh, start, strict=True))
        if dtype == torch.float64:
            assert_close_to(fresh, params)


COUNTS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "float": float,
    "float32": lambda count: torch.tensor(float(count)),
    "float64": lambda count: torch.tensor(count, dtype=torch.float64),
    "int64": torch.tensor,
}


@each_kind
def test_a_count_of_steps_may_be_any_number(column: Column) -> None:
    """Older checkpoints of torch hold integers, and other programs what they like."""
    params, optimizer = trained(column, 4)
    saved = through_a_file(optimizer.state_dict())
    train(optimizer, params, range(4, 8))
    start, _ = trained(column, 4)
    for kind in COUNTS.values():
        state = copy.deepcopy(saved["state"])
        for entry in state.values():
            entry["step"] = kind(int(entry["step"]))
        fresh = copies(start)
        other = column(fresh)
        other.load_state_dict({**saved, "state": state})
        train(other, fresh, range(4, 8))
        assert_same(values(fresh), values(params))
        assert {float(entry["step"]) for entry in other.state_dict()["state"].values()} == {8.0}


@each_kind
def test_what_is_loaded_stays_as_it_was(column: Column) -> None:
    """load_state_dict writes nothing into what it is handed: neither into the groups nor into the hooks' copy."""
    params, optimizer = trained(column, 4)
    add_foreign(optimizer, params)
    saved = through_a_file(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other = column(copies(params))
    other.load_state_dict(saved)
    assert_same(saved, before)
    other.param_groups[0]["lr"] = 0.5
    assert_same(saved, before)


@each_kind
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(column: Column) -> None:
    params, optimizer = trained(column, 1)
    again, undisturbed = trained(column, 1)
    undisturbed.zero_grad()
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in params), torch.zeros(()))
        loss.backward()
        return loss

    for _ in range(4):
        sum((param.square().sum() for param in again), torch.zeros(())).backward()
        wanted = sum(float(param.detach().square().sum()) for param in again)
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert float(loss.detach()) == pytest.approx(wanted)
        undisturbed.step()
        undisturbed.zero_grad()
    assert calls == [True] * 4
    assert_same(values(params), values(again))


@each_kind
def test_step_hooks_are_called_once_in_order_and_may_change_the_call(column: Column) -> None:
    params, optimizer = trained(column, 2)
    calls: list[Any] = []
    everywhere = [
        register_optimizer_step_pre_hook(lambda one, *_: calls.append(("all before", one))),
        register_optimizer_step_post_hook(lambda one, *_: calls.append(("all after", one))),
    ]
    own = [
        optimizer.register_step_pre_hook(lambda one, *_: calls.append(("before", one))),
        optimizer.register_step_post_hook(lambda one, *_: calls.append(("after", one))),
    ]
    try:
        before = values(params)
        train(optimizer, params, [2])
        assert calls == [(name, optimizer) for name in ("all before", "before", "after", "all after")]
        assert not torch.equal(params[0], before[0])
    finally:
        for handle in (*everywhere, *own):
            handle.remove()
    train(optimizer, params, [3])
    assert len(calls) == 4
    optimizer.register_step_pre_hook(lambda one, args, kwargs: ((one, lambda: 7.0), {}))
    backward(params, 4)
    assert optimizer.step() == 7.0


@each_kind
def test_a_step_is_named_in_a_profile(column: Column) -> None:
    params, optimizer = trained(column, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, [1])
        optimizer.zero_grad()
    names = [event.name for event in profile.events() or ()]
    kind = type(optimizer).__name__
    assert names.count(f"Optimizer.step#{kind}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{kind}.zero_grad") == 1


@each_kind
def test_a_learning_rate_may_be_a_tensor_that_a_scheduler_fills(column: Column) -> None:
    """As programs with compiled steps or CUDA graphs have it: the tensor stays, and whoever holds it sees the rate."""
    sides: list[Any] = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64), "resumed"):
        rate = torch.tensor(0.02, dtype=torch.float64) if lr == "resumed" else lr
        params = parameters(SHAPES)
        optimizer = column(params, lr=rate)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(6):
            if lr == "resumed" and step == 3:
                saved = through_a_file(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
                params, rate = copies(params), torch.tensor(0.02, dtype=torch.float64)
                optimizer = column(params, lr=rate)
                scheduler = lr_scheduler.ExponentialLR(optimizer, 0.8)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            train(optimizer, params, [step])
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02 * 0.8**6)
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (lr != 0.02 or isinstance(lr, Tensor))
        if isinstance(lr, Tensor):
            assert optimizer.param_groups[0]["lr"] is lr
        sides.append(numbers(optimizer, params))
    torch.testing.assert_close(sides[1][0], sides[0][0], rtol=1e-5, atol=1e-6)
    assert_same(sides[2], sides[1])


# ---------------------------------------------------------------------------------------------------------------------
# Those who wrap an optimizer
# ---------------------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.filterwarnings("error")
def test_schedulers_wrap_and_warn_of_nothing(column: Column) -> None:
    """A scheduler puts its own step in place of the optimizer's, to see who is called first; copies have their own."""
    params, optimizer = trained(column, 0)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    for step in range(3):
        train(optimizer, params, [step])
        scheduler.step()
    again, other = copy.deepcopy((params, optimizer))
    before = values(params)
    train(other, again, range(3, 5))
    assert_same(values(params), before)


@each_kind
def test_averaged_weights_follow_and_do_not_disturb(column: Column) -> None:
    ends = []
    for averages in (True, False):
        model = Weights(parameters(SHAPES))
        params = list(model.parameters())
        optimizer = column(params)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        by_hand = values(params)
        for step in range(5):
            train(optimizer, params, [step])
            if averages:
                averaged.update_parameters(model)
                for mean, param in zip(by_hand, params, strict=True):
                    mean.lerp_(param.detach(), 0.5 if step else 1.0)
        if averages:
            torch.testing.assert_close(values(averaged.module.parameters()), by_hand)
        ends.append(numbers(optimizer, params))
    assert_same(*ends)


def scaled_backward(scaler: Any, optimizer: Any, params: list[Parameter], step: int, size: float = 1.0) -> None:
    """The backward pass of a scaled loss whose gradients are those of :func:`backward`."""
    backward(params, step)
    grads = [param.grad for param in params]
    optimizer.zero_grad()
    loss = sum((param * grad * size).sum() for param, grad in zip(params, grads, strict=True))
    scaler.scale(loss).backward()


@every_column
def test_a_gradient_scaler_steps_and_skips(column: Column) -> None:
    """A scale that is a power of two changes no bit; fused=True must not say that the step unscales by itself."""
    for fused, unscales in ((None, True), (True, True), (True, False)):
        params, again = parameters(SHAPES), parameters(SHAPES)
        optimizer, plain = column(params, fused=fused), column(again, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        for step in range(5):
            scaled_backward(scaler, optimizer, params, step)
            if unscales or getattr(optimizer, "exact", False):
                scaler.unscale_(optimizer)
            if getattr(optimizer, "exact", False):
                with optimizer.at_previous_weights():
                    backward(params, step)
            scaler.step(optimizer)
            scaler.update()
            train(plain, again, [step])
            assert_same(values(params), values(again))
        before = copy.deepcopy(numbers(optimizer, params))
        scaled_backward(scaler, optimizer, params, 5, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert_same(numbers(optimizer, params), before)


@each_kind
def test_accelerate_wraps_saves_and_loads(column: Column) -> None:
    accelerator = Accelerator(cpu=True)
    model, again = Weights(parameters(SHAPES)), parameters(SHAPES)
    params = list(model.parameters())
    undisturbed = column(again)
    model, optimizer = accelerator.prepare(model, column(params))
    params = list(model.parameters())
    train(optimizer, params, range(3))
    saved = through_a_file(optimizer.state_dict())
    fresh = copies(params)
    other = accelerator.prepare(column(fresh))
    other.load_state_dict(saved)
    train(optimizer, params, range(3, 6))
    train(other, fresh, range(3, 6))
    train(undisturbed, again, range(6))
    assert_same(numbers(optimizer, params), numbers(undisturbed, again))
    assert_same(numbers(other, fresh), numbers(undisturbed, again))
