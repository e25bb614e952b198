"""What a step over several ranks does, run in every process; see ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import EVEN, OPTIMIZERS, UNEVEN, assert_equal, network, owned, put, same_gradients, shard, train, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.planning import costs


def a_nan_on_one_rank_skips_the_step_on_all() -> None:
    """Parameters and state stay as they are everywhere, and training goes on."""
    for mode in ("local", "owner"):
        for name in ("soap", "shampoo", "mars"):
            model = shard(network())
            optimizer = owned(name, model.parameters()) if mode == "owner" else OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(4))
            before, state = whole(model), optimizer.state_dict()
            for param in model.parameters():
                if dist.get_rank() == 1 and param.grad.to_local().numel():  # type: ignore[union-attr]
                    param.grad.to_local().view(-1)[0] = float("nan")  # type: ignore[union-attr]
                    break
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert_equal(whole(model), before, name)
            after = optimizer.state_dict()["state"]
            for key, roles in state["state"].items():
                for role, value in roles.items():
                    one, other = (v.to_local() if isinstance(v, DTensor) else v for v in (value, after[key][role]))
                    assert torch.equal(one, other), f"{name}: {role}"
            same_gradients(model, optimizer, range(5, 6))
            assert optimizer.skipped_steps == 1


COLLECTIVES = (
    "all_gather_single",
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
    "barrier",
)


def a_local_step_has_one_collective() -> None:
    """A scalar that says whether all gradients are finite; none without the check. One more for the norms."""
    counts: dict[str, int] = {}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        return counted

    relative = {f"soap, {norm}": partial(SOAP, norm=norm) for norm in ("relative", "hyperball")}
    for name, make in {**OPTIMIZERS, **relative}.items():
        for nonfinite in ("skip", "off"):
            count = (nonfinite == "skip") + (name in relative)
            want = {"all_reduce": count} if count else {}
            model = shard(network())
            optimizer = make(model.parameters())
            for group in optimizer.param_groups:
                group["nonfinite"] = nonfinite
            same_gradients(model, optimizer, range(2))
            with pytest.MonkeyPatch.context() as patch, CommDebugMode() as functional:
                for collective in COLLECTIVES:
                    if hasattr(dist, collective):
                        patch.setattr(dist, collective, counting(collective, getattr(dist, collective)))
                optimizer.step()
            assert counts == want, f"{name}, nonfinite={nonfinite}: {counts}"
            assert functional.get_total_counts() <= count, f"{name}: {functional.get_comm_counts()}"
            counts.clear()


def meshes_of_two_dimensions() -> None:
    """HSDP, tensor parallelism with and without FSDP, and several meshes in one model: parts resume bit for bit."""
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def hsdp(model: nn.Sequential) -> nn.Sequential:
        return shard(model, square)

    def tensor_parallel(model: nn.Sequential) -> nn.Sequential:
        return parallelize_module(model, flat, {"0": ColwiseParallel(), "2": RowwiseParallel()})  # type: ignore[return-value]

    def both(model: nn.Sequential) -> nn.Sequential:
        parallelize_module(model, square["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=square["outer"])
        return model

    def mixed(model: nn.Sequential) -> nn.Sequential:
        fully_shard(model[0], mesh=flat)
        fully_shard(model[2], mesh=square)
        return model

    for cut in (hsdp, tensor_parallel, both, mixed):
        for name in ("soap", "shampoo", "mars"):
            sizes = EVEN if "parallel" in cut.__name__ or cut is both else UNEVEN  # torch's are even
            model = cut(network(sizes=sizes))
            optimizer = OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(6))
            start, state = whole(model), optimizer.state_dict()
            same_gradients(model, optimizer, range(6, 10))
            want = whole(model)
            again = cut(network(sizes=sizes))
            put(again, start)
            optimizer = OPTIMIZERS[name](again.parameters())
            optimizer.load_state_dict(state)
            same_gradients(again, optimizer, range(6, 10))
            assert_equal(whole(again), want, f"{cut.__name__}, {name}")
            losses = train(again, optimizer, [0] * 8)
            assert losses[-1] < losses[0], f"{cut.__name__}, {name}: {losses}"


def a_split_refresh_equals_one_of_its_own() -> None:
    """Under DDP each rank decomposes some factors and gets the others: the same bits as if it did all."""
    for name in OPTIMIZERS:
        results = []
        for split in (False, True):
            model = network()
            optimizer = OPTIMIZERS[name](model.parameters())
            for group in optimizer.param_groups:
                group["distributed_refresh"] = split
            same_gradients(model, optimizer, range(8))
            results.append(whole(model))
        assert_equal(results[1], results[0], name)


def a_rank_without_a_gradient_holds_up_nobody() -> None:
    """Its part of the parameter stays where it is, or, with owners, counts as zero."""
    for mode in ("local", "owner"):
        for name in OPTIMIZERS:
            model = shard(network())
            optimizer = owned(name, model.parameters()) if mode == "owner" else OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(4))
            for weight in model.parameters():
                weight.grad = weight.grad.clone() if dist.get_rank() else None  # type: ignore[union-attr]
            optimizer.step()
            for weight in model.parameters():
                weight.grad = None
            optimizer.step()
            same_gradients(model, optimizer, range(4, 8))
            assert all(value.isfinite().all() for value in whole(model).values()), f"{mode}, {name}"


def ranks_plan_alike() -> None:
    """A smaller part found a factor where the largest had none, and one rank ran SOAP while the other ran Adam."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape, settings in (((9, 1), {}), ((1025, 6), {"max_precond_dim": 512}), ((9,), {"precondition_1d": True})):
        param = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        optimizer = SOAP([param], **settings)
        for _ in range(3):
            param.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
            optimizer.step()
        roles: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(roles, {role: tuple(v.shape) for role, v in optimizer.state_dict()["state"][0].items()})
        assert all(other == roles[0] for other in roles), f"{shape}: {roles}"


def a_first_step_at_no_learning_rate_is_taken_by_all() -> None:
    """Warmup starts at 0, and ranks whose part of all gradients is zero left the others alone in an exchange."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SOAP(model.parameters(), lr=0.0, shard_mode="owner")
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def costs_are_those_of_the_optimizer() -> None:
    """The projected state of the rank that has most is what the optimizer counts there."""
    count = dist.get_world_size()
    shapes = [(40, 24), (40, 40), (24, 24), (24,), (64, 8)]
    mesh = init_device_mesh("cpu", (count,))
    for make in (SOAP, Shampoo, MARS):
        for mode in ("local", "owner", "ddp", "ddp, owner"):
            params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
            projected = costs.cost(make(params), ranks=count, mode=mode)
            if "ddp" not in mode:
                params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
            optimizer = make(params, shard_mode="owner" if "owner" in mode else "local")
            for param in params:
                grad = torch.randn(param.shape)
                param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(param, DTensor) else grad
            optimizer.step()
            kept = {v.untyped_storage().data_ptr(): v for s in optimizer.state.values() for v in s.values()}
            num_bytes: list[Any] = [None] * count
            dist.all_gather_object(num_bytes, sum(v.untyped_storage().nbytes() for v in kept.values()))
            far = abs(max(num_bytes) - projected.state) / projected.state
            assert far < 0.03, f"{make.__name__}, {mode}: {num_bytes}, projected {projected.state}"
