"""Cautious decay and steps in proportion to norms over several ranks, run in every process; see ranks.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def split(params: Iterable[Parameter], mesh: DeviceMesh, placements: Sequence[Any]) -> list[Parameter]:
    return [Parameter(distribute_tensor(param.detach(), mesh, placements)) for param in params]


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


def placements() -> list[tuple[DeviceMesh, tuple[Any, ...]]]:
    """Cut along the first dimension; by four ranks along either dimension of a mesh, with copies along the other."""
    count = dist.get_world_size()
    if count < 4:
        flat = init_device_mesh("cpu", (count,))
        return [(flat, (Shard(0),))]
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return [(square, (Replicate(), Shard(0))), (square, (Shard(0), Replicate()))]


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
    for mesh, where in placements():
        for name, make in MAKERS.items():
            for options in STEPS.values():
                alone = parameters(SHAPES, torch.float64)
                parts = split(alone, mesh, where)
                reference, optimizer = make(alone, **options), make(parts, **options)
                for number in range(6):
                    step(reference, alone, number)
                    step(optimizer, parts, number)
                for got, want in zip(wholes(parts), wholes(alone), strict=True):
                    message = lambda text, n=name, o=options: f"{n}, {o}: {text}"  # noqa: E731
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=message)


def whole_matrices_equal_one_process() -> None:
    """As under DDP: norms need no other rank, but directions may come from the rank that owns a matrix."""
    for name, make in MAKERS.items():
        for options in STEPS.values():
            alone, params = (parameters(SHAPES, torch.float64) for _ in range(2))
            reference, optimizer = make(alone, **{**options, "shard_mode": "local"}), make(params, **options)
            for number in range(6):
                step(reference, alone, number)
                step(optimizer, params, number)
            for got, want in zip(wholes(params), wholes(alone), strict=True):
                message = lambda text, n=name, o=options: f"{n}, {o}: {text}"  # noqa: E731
                torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=message)


def norms_stay_and_runs_resume() -> None:
    """In local mode with factors of parts, in low precision too, where one rank has no gradient at some steps."""
    for mesh, where in placements():
        for dtype in (torch.float32, torch.bfloat16):
            params = split(parameters(SHAPES, dtype), mesh, where)
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
            for place in (0, 3, 5, 6):
                torch.testing.assert_close(
                    wholes(params)[place].double().norm(),
                    before[place],
                    rtol=0.02 if dtype != torch.float32 else 1e-5,
                    atol=0,
                )


def zeros_are_refused_on_all_ranks() -> None:
    """Also on a rank that has nothing of the matrix; one whose own part is zero is not refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    zeros = [torch.zeros(1, 6), torch.zeros(6, 4)]
    zeros[1][0] = 1
    params = split([Parameter(zero) for zero in zeros], mesh, [Shard(0)])
    optimizer = SOAP(params, norm="hyperball")
    params[1].grad = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    optimizer.step()
    params[0].grad = distribute_tensor(torch.ones(1, 6), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="got only zeros in parameter 0"):
        optimizer.step()
