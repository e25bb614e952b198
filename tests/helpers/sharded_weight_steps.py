"""Cautious decay and steps in proportion to norms over several ranks, run in every process; see ranks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same, gradient, parameters
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from hf_soap import SOAP, Muon, Shampoo

SHAPES = [(7, 7), (3, 4, 5), (2, 4, 5), (1, 6), (5,), (4, 3, 3, 3), (7, 7)]
"""Parts are of different sizes, and some ranks have nothing of the second stack and of the flat matrix.

Square matrices, whose factors have full rank: otherwise rounding, which differs between numbers of ranks, would decide
on the bases.
"""

STEPS: dict[str, dict[str, Any]] = {
    "cautious": {"cautious_weight_decay": True},
    "relative": {"norm": "relative", "cautious_weight_decay": True},
    "hyperball": {"norm": "hyperball"},
}


Cuts = tuple[DeviceMesh, Callable[[Tensor], list[Any]]]
"""A mesh, and where the parts of a tensor lie on it."""


def split(params: Iterable[Tensor], cuts: Cuts) -> list[Parameter]:
    mesh, placements = cuts
    return [Parameter(distribute_tensor(param.detach(), mesh, placements(param))) for param in params]


def step(optimizer: Any, params: Sequence[Parameter], number: int) -> None:
    """Steps with gradients that depend on the step and the whole weights alone."""
    for place, param in enumerate(params):
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        grad = gradient(whole, place, number)
        cut = isinstance(param, DTensor)
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if cut else grad
    optimizer.step()


def wholes(params: Sequence[Parameter]) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def rows() -> Cuts:
    return init_device_mesh("cpu", (dist.get_world_size(),)), lambda _: [Shard(0)]


def every_cut() -> list[Cuts]:
    """Along the first and the second dimension; of four ranks, along both, or the first with copies."""
    if dist.get_world_size() < 4:
        return [rows(), (rows()[0], lambda param: [Shard(min(1, param.dim() - 1))])]
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return [(square, lambda _: [Replicate(), Shard(0)]), (square, lambda p: [Shard(min(1, p.dim() - 1)), Shard(0)])]


def owning(cls: Any, **settings: Any) -> Any:
    return partial(cls, lr=0.02, weight_decay=0.5, shard_mode="owner", **settings)


MAKERS: dict[str, Any] = {
    "local, adam": partial(SOAP, lr=0.02, weight_decay=0.5, max_precond_dim=0),
    "owner, soap": owning(SOAP),
    "owner, shampoo": owning(Shampoo, start_step=2),
    "owner, muon": owning(Muon),
}


def equal_one_process() -> None:
    """With owners, and in local mode where the rule treats each entry alone: norms are those of whole matrices."""
    for cuts in every_cut():
        for name in MAKERS:
            for options in STEPS.values():
                assert_as_alone(name, options, split(parameters(SHAPES, torch.float64), cuts), options)


def whole_matrices_equal_one_process() -> None:
    """As under DDP: norms need no other rank, but directions may come from the rank that owns a matrix."""
    for name in MAKERS:
        for options in STEPS.values():
            alone = {**options, "shard_mode": "local"}
            assert_as_alone(name, options, parameters(SHAPES, torch.float64), alone)


def assert_as_alone(name: str, options: dict[str, Any], params: list[Parameter], alone: dict[str, Any]) -> None:
    """Steps parameters, and the same whole ones with the options of one process, which must end alike."""
    others = parameters(SHAPES, torch.float64)
    optimizer, reference = MAKERS[name](params, **options), MAKERS[name](others, **alone)
    for number in range(6):
        step(reference, others, number)
        step(optimizer, params, number)
    for got, want in zip(wholes(params), wholes(others), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=lambda text: f"{name}, {options}: {text}")


def norms_stay_and_runs_resume() -> None:
    """In local mode with factors of parts, in low precision too, where one rank has no gradient at some steps."""
    for cuts in every_cut():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            params = split(parameters(SHAPES, dtype), cuts)
            optimizer = SOAP(params, lr=0.02, norm="hyperball", precondition_frequency=2)
            before = [matrix.double().norm() for matrix in wholes(params)]
            for number in range(6):
                step(optimizer, params, number)
            others = [Parameter(param.detach().clone()) for param in params]
            resumed = SOAP(others, lr=0.02, norm="hyperball", precondition_frequency=2)
            resumed.load_state_dict(optimizer.state_dict())
            for number in range(6, 9):
                step(optimizer, params, number)
                step(resumed, others, number)
            assert_same(wholes(others), wholes(params))
            for param in params:
                param.grad = None if dist.get_rank() == 1 else param.grad
            optimizer.step()
            for param, norm in zip(wholes(params), before, strict=True):
                if param.dim() > 1:
                    torch.testing.assert_close(param.double().norm(), norm, rtol=tolerance, atol=0)


def zeros_are_refused_on_all_ranks() -> None:
    """Also on a rank that has nothing of the matrix; one whose own part is zero is not refused."""
    zeros = [torch.zeros(1, 6), torch.zeros(6, 4)]
    zeros[1][0] = 1
    params = split(zeros, rows())
    optimizer = SOAP(params, norm="hyperball")
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match="got only zeros in parameter 0"):
        optimizer.step()
