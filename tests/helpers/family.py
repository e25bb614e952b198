"""One table of every optimizer of the family, for tests that all of them must pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import parameters, train
from third_party import SPlus
from torch.nn import Parameter
from torch.optim import Optimizer

from hf_soap import MARS, SOAP, Muon, Shampoo, SoapMuon

STEPS = 8


@dataclass(frozen=True)
class Row:
    """An optimizer in the table.

    Attributes:
        make: Makes it from parameters and overrides.
        lr: For the convergence problem.
        seeds: Whether the first non-zero gradient of any tensor updates nothing.
        waits: Whether zero gradients before that leave no trace.
        has_betas: Whether ``betas`` is a setting.
        slow: Whether it differs from another row in few lines of code.
    """

    make: Callable[..., Optimizer]
    lr: float = 0.05
    seeds: bool = False
    waits: bool = False
    has_betas: bool = True
    slow: bool = False

    def __call__(self, params: Any, **overrides: Any) -> Any:
        return self.make(params, **{"lr": 0.01, **overrides})


soap = partial(SOAP, precondition_frequency=3, refresh_growth=0.0)
shampoo = partial(Shampoo, precondition_frequency=3, start_step=2)
mars = partial(MARS, weight_decay_1d=0.0)
SoapRow = partial(Row, seeds=True, waits=True)
ShampooRow = partial(Row, waits=True)
TABLE = {
    "soap": SoapRow(soap),
    "staggered": SoapRow(partial(soap, stagger=True)),
    "growing": SoapRow(partial(soap, refresh_growth=0.5, stagger=True)),
    "one-sided": SoapRow(partial(soap, one_sided=True, factorized=True)),
    "blocks": SoapRow(partial(soap, block_size=3), slow=True),
    "padded blocks": SoapRow(partial(soap, block_size=4, normalize_grads=True)),
    "1-D": SoapRow(partial(soap, precondition_1d=True), slow=True),
    "merged": SoapRow(partial(soap, merge_dims=True, max_precond_dim=16), slow=True),
    "current": SoapRow(partial(soap, include_current=True, refresh_tol=0.01), slow=True),
    "rotated second moment": SoapRow(partial(soap, rotate_second_moment=True), slow=True),
    "kl-soap": SoapRow(partial(soap, kl=True)),
    "overlapped": SoapRow(partial(soap, overlap_refresh=True), slow=True),
    "shampoo": ShampooRow(shampoo),
    "original": ShampooRow(
        partial(shampoo, betas=(0.0, 0.99), statistics="sum", graft=None, start_step=1), lr=1.0, slow=True
    ),
    "newton": ShampooRow(partial(shampoo, root_method="newton", block_size=4, momentum=0.5), slow=True),
    "pseudo-inverse": ShampooRow(partial(shampoo, ridge=0.0, root_cutoff=1e-4), slow=True),
    "background": ShampooRow(partial(shampoo, asynchronous=True, delay=2)),
    "diagonals": ShampooRow(partial(shampoo, max_precond_dim=5, graft="rmsprop", stagger=True), slow=True),
    "kl-shampoo": Row(partial(shampoo, kl=True, graft=None, start_step=1)),
    "mars": Row(mars),
    "mars-lion": Row(partial(mars, variant="lion", optimize_1d=True), slow=True),
    "mars-shampoo": Row(partial(mars, variant="shampoo")),
    "mars-m": Row(partial(mars, variant="m", lr_1d=0.05), lr=0.2, slow=True),
    "muon": Row(partial(Muon, lr_1d=0.05), lr=0.2, has_betas=False),
    "soap-muon": Row(
        partial(SoapMuon, lr_1d=0.05, block_size=4, precondition_frequency=3, refresh_growth=0.0), lr=0.2
    ),
    "third party": Row(partial(SPlus, precondition_frequency=3), lr=0.5, has_betas=False),
    "mars-soap": Row(partial(mars, variant="soap", precondition_frequency=3, refresh_growth=0.0)),
}


def over(table: dict[str, Row]) -> pytest.MarkDecorator:
    """Runs a test for each row."""
    marks = [pytest.mark.slow]
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=name, marks=marks if row.slow else []) for name, row in table.items()]
    )


rows = over(TABLE)
rows_with_betas = over({name: row for name, row in TABLE.items() if row.has_betas})


def close(one: list[Parameter], other: list[Parameter], tolerance: float = 1e-11) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def trained(row: Row, steps: int = STEPS, **options: Any) -> tuple[list[Parameter], Any]:
    params = parameters(**{k: options.pop(k) for k in ("shapes", "dtype") if k in options})
    optimizer = row(params, **options)
    train(optimizer, params, range(steps))
    return params, optimizer


def parameters_and(row: Row) -> tuple[list[Parameter], Any]:
    params = parameters()
    return params, row(params)
