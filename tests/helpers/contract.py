"""The columns of the table in test_torch_contract.py, and what its rows share."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
from family import TABLE, mars, soap
from helpers import gradient, parameters
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

SHAPES = [(6, 6), (4, 9), (5,), (6, 6), (3, 4, 2), ()]
"""Two matrices that share a stack, one that is not square, a vector, a tensor of three dimensions and a scalar."""


@dataclass(frozen=True)
class Column:
    """One optimizer in the table.

    Attributes:
        name: Of the column.
        make: Makes it from parameters and settings.
        ours: Whether it is one of the family; the control is torch's own.
    """

    name: str
    make: Callable[..., Optimizer]
    ours: bool = True

    def __call__(self, params: Any, **settings: Any) -> Any:
        return self.make(params, **{"lr": 0.01, **settings})


CONTROL = Column("AdamW", AdamW, ours=False)
"""Shows what is right: every row passes for it, except those that ask for more than torch gives."""

COLUMNS = [
    Column("soap", TABLE["soap"].make),
    Column("kl-soap", TABLE["kl-soap"].make),
    Column("one-sided", partial(soap, one_sided=True)),
    Column("factorized", partial(soap, factorized=True)),
    Column("shampoo", TABLE["shampoo"].make),
    Column("kl-shampoo", TABLE["kl-shampoo"].make),
    Column("mars", TABLE["mars"].make),
    Column("mars-lion", partial(mars, variant="lion")),
    Column("mars-shampoo", TABLE["mars-shampoo"].make),
    Column("mars-m", TABLE["mars-m"].make),
    Column("mars-soap", TABLE["mars-soap"].make),
    Column("soap-muon", TABLE["soap-muon"].make),
    Column("mars-exact", partial(mars, exact=True)),
]
KINDS = [column for column in COLUMNS if column.name in ("soap", "shampoo", "mars")]
"""One of each class, for rows that what the others add does not touch."""

WITH_FACTORS = [column for column in COLUMNS if column.name in ("soap", "shampoo", "mars-soap")]
"""One of each class that has factors, for rows about how those are kept."""


def over(*columns: Column) -> pytest.MarkDecorator:
    """Runs a row for these columns."""
    return pytest.mark.parametrize("column", [pytest.param(column, id=column.name) for column in columns])


every_column = over(CONTROL, *COLUMNS)
each_kind = over(CONTROL, *KINDS)
every_column_of_ours = over(*COLUMNS)
"""For rows that ask for more than torch gives."""
each_kind_of_ours = over(*KINDS)


def backward(
    params: Sequence[Tensor],
    step: int,
    places: Sequence[int] | None = None,
    *,
    absent: Collection[int] = (),
    signs: Sequence[int] | None = None,
) -> None:
    """Gives each parameter its gradient at a step.

    Args:
        params: The parameters.
        step: The step.
        places: What the gradients depend on, which a parameter takes along into another order; None counts them.
        absent: Places of those that have no gradient.
        signs: What the gradients are multiplied by.
    """
    signs = signs or [1] * len(params)
    for place, param, sign in zip(places or range(len(params)), params, signs, strict=True):
        param.grad = None if place in absent else sign * gradient(param, place, step)


def train(optimizer: Any, params: Sequence[Tensor], steps: Iterable[int], *args: Any, **options: Any) -> None:
    """Takes steps on the gradients of :func:`backward`; exact MARS gets its second backward pass."""
    for step in steps:
        backward(params, step, *args, **options)
        if getattr(optimizer, "exact", False):
            with optimizer.at_previous_weights():
                backward(params, step, *args, **options)
        optimizer.step()


def trained(column: Column, steps: int = 5, **settings: Any) -> tuple[list[Parameter], Any]:
    """Parameters, and an optimizer that has stepped them."""
    params = parameters(SHAPES)
    optimizer = column(params, **settings)
    train(optimizer, params, range(steps))
    return params, optimizer


def copies(params: Iterable[Tensor]) -> list[Parameter]:
    """New parameters of the same values, without gradients, as a new process has them."""
    return [Parameter(param.detach().clone(), requires_grad=param.requires_grad) for param in params]


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Weights, to be compared."""
    return [param.detach().clone() for param in params]


def chosen(things: Any, places: Iterable[int]) -> list[Any]:
    """The things at these places, or under these keys."""
    return [things[place] for place in places]


def numbers(optimizer: Optimizer, params: Iterable[Tensor]) -> tuple[list[Tensor], dict[Any, Any]]:
    """Weights and saved state, without settings."""
    return values(params), optimizer.state_dict()["state"]


@cache
def family_roles() -> dict[str, tuple[int, ...]]:
    """Every role that any optimizer of the family keeps for a matrix of 6 x 6, with one of its shapes."""
    roles: dict[str, tuple[int, ...]] = {}
    for make in [*(row.make for row in TABLE.values()), *(column.make for column in COLUMNS)]:
        param = parameters([(6, 6)])
        optimizer = make(param, lr=0.01)
        train(optimizer, param, range(2))
        roles |= {role: tuple(value.shape) for role, value in optimizer.state[param[0]].items()}
    return roles
