"""Any order of calls: what is saved, loaded, copied and pickled stays bit for bit with what only lives on."""

import copy
import pickle
from typing import Any

import hypothesis
import pytest
import torch
from family import TABLE, Row
from generated import CASES, ORDERS, dtypes, in_order, noise, orders, parameter, shapes, share_of_profile
from helpers import assert_same, through_a_file
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from torch.nn import Parameter

NAMES = sorted(TABLE)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nonfinite": "off"},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "bfloat16", "pack_factors": True},
    {"pack_factors": True},
    {"lr": torch.tensor(0.01)},
    {"weight_decay": 0.3, "eps": 1e-4},
    {"exact": True},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.03},
    {"betas": (0.8, 0.99)},
    {"weight_decay": 0.2},
    {"rule": "adam"},
    {"nonfinite": "off"},
    {"state_dtype": "bfloat16"},
    {"name": "backbone", "lr": 0.002},
]
dense = st.sampled_from([order for order in ORDERS if order != "every other"])
"""What torch's clones and copies keep; weights with gaps between them come back without, and sums in another order."""

members = st.lists(st.tuples(shapes, dtypes, dense, st.booleans()), max_size=4)
SIZES = st.sampled_from([1.0, 1.0, 1.0, 1e-4, 0.0, 1e30, torch.nan])


class Side:
    """An optimizer and its parameters, group by group."""

    def __init__(self, make: Row, options: dict[str, Any]) -> None:
        self.make, self.options = make, options
        self.groups: list[tuple[list[Parameter], dict[str, Any]]] = []
        self.optimizer: Any = None

    @property
    def params(self) -> list[Parameter]:
        return [param for params, _ in self.groups for param in params]

    def add(self, params: list[Parameter], settings: dict[str, Any]) -> None:
        self.groups.append((params, settings))
        group = copy.copy({"params": params, **settings})
        if self.optimizer is None:
            self.optimizer = self.make([group], **copy.deepcopy(self.options))
        else:
            self.optimizer.add_param_group(group)

    def resume(self) -> None:
        """What a new process does with a checkpoint."""
        saved, current = through_a_file(self.optimizer.state_dict()), self.optimizer.param_groups
        groups = [([copied(param) for param in params], settings) for params, settings in self.groups]
        changed = [
            {key: group[key] for key in ("betas", "weight_decay", "base_lr") if key in group} for group in current
        ]
        self.groups, self.optimizer = [], None
        for (params, settings), now in zip(groups, changed, strict=True):
            self.add(params, {**settings, **now})
        self.optimizer.load_state_dict(saved)


def copied(param: Parameter) -> Parameter:
    again = Parameter(param.detach().clone(), requires_grad=param.requires_grad)
    again.grad = None if param.grad is None else param.grad.detach().clone()
    return again


class AnyOrder(RuleBasedStateMachine):
    """``lives`` is saved, loaded, copied and pickled; ``stays`` only lives through the same steps."""

    @initialize(name=st.sampled_from(NAMES), options=st.sampled_from(OPTIONS), first=members)
    def construct(self, name: str, options: dict[str, Any], first: Any) -> None:
        exact = "exact" in options and name.startswith("mars")
        options = options if exact or "exact" not in options else {}
        if name.startswith("mars") and name != "mars-soap":  # no factors to pack
            options = {key: value for key, value in options.items() if key != "pack_factors"}
        self.lives, self.stays = (Side(TABLE[name], options) for _ in range(2))
        self.exact, self.seed = exact, 0
        self.add_group(first, {})

    def both(self) -> tuple[Side, Side]:
        return self.lives, self.stays

    @rule(members=members, settings=st.sampled_from(SETTINGS))
    def add_group(self, members: Any, settings: dict[str, Any]) -> None:
        if len(self.stays.groups) == 4:
            return
        self.seed += 1
        for side in self.both():
            made = [parameter(*member[:3], self.seed + 10 * i) for i, member in enumerate(members)]
            for param, (*_, frozen) in zip(made, members, strict=True):
                param.requires_grad_(not frozen)
            side.add(made, settings)

    @rule(
        missing=st.sets(st.integers(0, 7)),
        size=SIZES,
        order=st.one_of(orders, st.just("expanded")),
        clear=st.booleans(),
    )
    def step(self, missing: set[int], size: float, order: str, clear: bool) -> None:
        """Some have no gradient, or one of zeros, of NaN, or one that is too large."""
        self.seed += 1
        if any(group["nonfinite"] == "off" for group in self.stays.optimizer.param_groups):
            size = 1e-4 if size == 0.0 else 1.0  # who does not look has NaN in factors, which have no basis then
        for side in self.both():
            self.backward(side, missing, size, order)
            if self.exact:
                with side.optimizer.at_previous_weights():
                    self.backward(side, missing, size, order)
            side.optimizer.step()
            if clear or order == "expanded":  # which autograd cannot add to
                side.optimizer.zero_grad()
        self.compare()

    def backward(self, side: Side, missing: set[int], size: float, order: str) -> None:
        for place, param in enumerate(side.params):
            if place in missing or not param.requires_grad:
                param.grad = None
                continue
            grad = noise(tuple(param.shape), 1000 * self.seed + place) + 0.5 * param.detach().double()
            if size != 1.0 and place % 2:
                grad = grad * size
            param.grad = in_order(grad.to(param.dtype), order)

    @rule(set_to_none=st.booleans())
    def closure(self, set_to_none: bool) -> None:
        losses = []
        for side in self.both():

            def evaluate(side: Side = side) -> Tensor:
                side.optimizer.zero_grad(set_to_none=set_to_none)
                terms = [param.double().square().sum() for param in side.params if param.requires_grad]
                loss = sum(terms, torch.zeros(()))
                if terms:
                    loss.backward()
                return loss

            losses.append(side.optimizer.step(evaluate))
        assert_same(*losses)
        self.compare()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for side in self.both():
            side.optimizer.zero_grad(set_to_none=set_to_none)

    @rule(place=st.integers(0, 7), dtype=dtypes)
    def change_dtype(self, place: int, dtype: torch.dtype) -> None:
        """As ``model.to(dtype)`` does."""
        for side in self.both():
            for param in side.params[place : place + 1]:
                param.grad = None
                param.data = param.data.to(dtype)

    @rule(place=st.integers(0, 7), order=dense)
    def change_order(self, place: int, order: str) -> None:
        for side in self.both():
            for param in side.params[place : place + 1]:
                param.data = in_order(param.data, order)

    @rule(place=st.integers(0, 7))
    def toggle(self, place: int) -> None:
        for side in self.both():
            for param in side.params[place : place + 1]:
                param.requires_grad_(not param.requires_grad)
                param.grad = None

    @rule(
        number=st.integers(0, 3),
        key=st.sampled_from(["lr", "betas", "weight_decay"]),
        size=st.sampled_from([0.5, 0.9]),
    )
    def schedule(self, number: int, key: str, size: float) -> None:
        if key == "betas" and self.stays.optimizer.defaults["betas"][0] == 0:
            return  # without a first moment there is no state for one, which the error says
        for side in self.both():
            for group in side.optimizer.param_groups[number : number + 1]:
                group[key] = (size, 0.99) if key == "betas" else size / 10

    @rule()
    def save_and_resume(self) -> None:
        self.lives.resume()

    @rule()
    def load_its_own(self) -> None:
        self.lives.optimizer.load_state_dict(self.lives.optimizer.state_dict())

    @rule(pickled=st.booleans())
    def copy(self, pickled: bool) -> None:
        self.lives.__dict__ |= recreated(self.lives, pickled=pickled)

    @precondition(lambda self: any(state for state in self.lives.optimizer.state.values()))
    @rule(place=st.integers(0, 7))
    def replace_state(self, place: int) -> None:
        """State that the user puts there counts, and so do equal values."""
        for param in self.lives.params[place : place + 1]:
            state = self.lives.optimizer.state.get(param, {})
            state.update({role: value.clone() for role, value in state.items()})

    def compare(self) -> None:
        assert_same(*([param.detach() for param in side.params] for side in self.both()))

    def teardown(self) -> None:
        if hasattr(self, "stays"):
            assert_same(*(tidy(side.optimizer.state_dict()) for side in self.both()))
            CASES["AnyOrder"] += 1


def recreated(side: Side, *, pickled: bool) -> dict[str, Any]:
    both = side.groups, side.optimizer
    groups, optimizer = pickle.loads(pickle.dumps(both)) if pickled else copy.deepcopy(both)
    return {"groups": groups, "optimizer": optimizer}


def tidy(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without what torch adds to groups once something was loaded."""
    groups = [{key: group[key] for key in group.keys() - {"differentiable"}} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


AnyOrder.TestCase.settings = hypothesis.settings(max_examples=share_of_profile(0.2))
TestAnyOrder = pytest.mark.filterwarnings("ignore")(AnyOrder.TestCase)
