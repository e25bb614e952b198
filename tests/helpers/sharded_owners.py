"""Owners of whole matrices, and exact MARS, run in every process; see ranks.py."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import OPTIMIZERS, assert_equal, network, owned, put, same_gradients, save, shard, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.checkpoint import files
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.trainer import resume


def owners_equal_one_process(names: list[str] | None = None, dtype: str = "float64", replicas: int = 0) -> None:
    """Whatever the number of ranks: the weights of one process that saw the same gradients, bit for bit.

    With ``replicas`` on a mesh of two dimensions, or, at -1, whole on every rank.
    But for MARS-AdamW and MARS-Lion, which one process steps by fused kernels that round otherwise.
    """
    ranks = dist.get_world_size()
    for name in names or OPTIMIZERS:
        alone, split = network(getattr(torch, dtype)), network(getattr(torch, dtype))
        if replicas > 0:
            mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
            shard(split, mesh)
        elif replicas == 0:
            shard(split)
        reference, optimizer = OPTIMIZERS[name](alone.parameters()), owned(name, split.parameters())
        for model, stepped in ((alone, reference), (split, optimizer)):
            same_gradients(model, stepped, range(8))
        if "mars" not in name:
            assert_equal(whole(split), whole(alone), name)
        for key, value in whole(split).items():
            torch.testing.assert_close(value, whole(alone)[key], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        held = [p for p in split.parameters() if optimizer.state[p].keys() - {"average_param"} == {"step"}]
        assert held, "every rank holds all state"


def owners_keep_their_matrices() -> None:
    """Freezing one parameter moved the others to new owners, who knew nothing of their state."""
    model, alone = shard(network(torch.float64)), network(torch.float64)
    optimizer, reference = owned("soap", model.parameters()), OPTIMIZERS["soap"](alone.parameters())
    for steps, frozen in ((range(4), False), (range(4, 8), True), (range(8, 12), False)):
        for net, stepped in ((model, optimizer), (alone, reference)):
            net[0].weight.requires_grad_(not frozen)
            same_gradients(net, stepped, steps)
        assert_equal(whole(model), whole(alone), f"frozen={frozen}")
        state = optimizer.state_dict()  # also of what is frozen
        optimizer.load_state_dict(state)


def owners_are_copied() -> None:
    """After a freeze, owners are not those that a new optimizer would choose; a copy forgot them, with their state."""
    model = network(torch.float64)
    optimizer = owned("soap", model.parameters())
    for steps, frozen in ((range(4), False), (range(4, 6), True)):
        model[0].weight.requires_grad_(not frozen)
        same_gradients(model, optimizer, steps)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    for net, stepped in ((model, optimizer), (copied, copied_optimizer)):
        net[0].weight.requires_grad_(True)
        same_gradients(net, stepped, range(6, 9))
    assert_equal(whole(copied), whole(model), "copy")


def owned_model(mode: str, name: str) -> tuple[nn.Sequential, BlockOptimizer]:
    """A model under FSDP2, or whole on every rank, and its optimizer."""
    model = network(torch.float64)
    if mode == "fsdp":
        shard(model)
    return model, owned(name, model.parameters())


def owners_save(names: list[str], mode: str) -> None:
    """Trains six steps, saves in every way there is, and notes how the run goes on."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        folder.mkdir(exist_ok=True)
        model, optimizer = owned_model(mode, name)
        same_gradients(model, optimizer, range(6))
        start = whole(model)
        if mode == "fsdp":
            save(model, optimizer, folder)
        else:
            if dist.get_world_size() > 1:
                with pytest.raises(RuntimeError, match=r"call consolidate\(\) on all ranks"):
                    optimizer.state_dict()
                optimizer.consolidate()
            if dist.get_rank() == 0:
                torch.save(optimizer.state_dict(), folder / resume.PLAIN)
        same_gradients(model, optimizer, range(6, 12))
        end = whole(model)
        if dist.get_rank() == 0:
            torch.save({"start": start, "end": end}, folder / "run.pt")
        dist.barrier()


def owners_go_on(names: list[str], mode: str) -> None:
    """Loads each of them: the run goes on bit for bit."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        run = torch.load(folder / "run.pt", weights_only=True)
        ways = [(path, how) for path in sorted(folder.glob("optimizer*")) for how in ("read", "torch")]
        assert ways
        for path, how in ways:
            model, optimizer = owned_model(mode, name)
            put(model, run["start"])
            if how == "read" or path.name == resume.PLAIN or mode != "fsdp":
                optimizer.load_state_dict(files.read(path))
            elif path.name == resume.FULL:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
                state = torch.load(path, weights_only=True) if dist.get_rank() == 0 else {}
                set_optimizer_state_dict(model, optimizer, state, options=options)
            else:
                saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.load(saved, storage_reader=dcp.FileSystemReader(path))
                set_optimizer_state_dict(model, optimizer, saved["optimizer"])
            same_gradients(model, optimizer, range(6, 12))
            assert_equal(whole(model), run["end"], f"{name} from {path.name}, {how}")


def square_network(width: int = 25) -> nn.Sequential:
    """Layers whose factors have full rank where the batch has more rows than the layers are wide."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(3)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def batch_of(step: int, rank: int, width: int = 25) -> tuple[Tensor, Tensor]:
    """The samples of one rank, others on each."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = (torch.randn(64, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


SQUARE: dict[str, Callable[[Any], BlockOptimizer]] = {
    "soap": lambda p: SOAP(p, lr=3e-3, precondition_frequency=5),
    "shampoo": lambda p: Shampoo(p, lr=3e-3, precondition_frequency=5, start_step=5),
    "mars": lambda p: MARS(p, lr=3e-3),
    "mars_shampoo": lambda p: MARS(p, lr=3e-3, variant="shampoo"),
}


def owners_equal_one_process_on_data_of_their_own(steps: int = 30) -> None:
    """Each rank has other samples, and one process has all of them; rounding is all that the two differ by."""
    ranks = dist.get_world_size()
    for name, make in SQUARE.items():
        alone, split = square_network(), shard(square_network())
        reference, optimizer = make(alone.parameters()), make(split.parameters())
        for group in optimizer.param_groups:
            group["shard_mode"] = "owner"
        for step in range(steps):
            x, y = batch_of(step, dist.get_rank())
            optimizer.zero_grad()
            (split(x) - y).square().mean().backward()
            optimizer.step()
            every = [batch_of(step, rank) for rank in range(ranks)]
            x, y = (torch.cat([batch[i] for batch in every]) for i in (0, 1))
            reference.zero_grad()
            (alone(x) - y).square().mean().backward()
            reference.step()
        for key, value in whole(split).items():
            want = alone.get_parameter(key).detach()
            torch.testing.assert_close(value, want, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def exact_mars_equals_a_loop_by_hand(sharded: bool, steps: int = 12) -> None:
    """FSDP2 or DDP, against the equations on one process with the samples of all ranks."""
    ranks, lr, beta1, beta2, gamma = dist.get_world_size(), 3e-3, 0.95, 0.99, 0.025
    model = square_network()
    weights = [param.detach().clone() for param in model.parameters()]
    before, first, second = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    net: Any = shard(model) if sharded else nn.parallel.DistributedDataParallel(model)
    optimizer = MARS(model.parameters(), lr=lr, betas=(beta1, beta2), gamma=gamma, exact=True)
    copy = square_network()

    def gradients_at(points: list[Tensor], step: int) -> list[Tensor]:
        x, y = (torch.cat([batch_of(step, rank)[i] for rank in range(ranks)]) for i in (0, 1))
        for param, point in zip(copy.parameters(), points, strict=True):
            param.data.copy_(point)
        copy.zero_grad()
        (copy(x) - y).square().mean().backward()
        return [param.grad.clone() for param in copy.parameters()]  # type: ignore[union-attr]

    for step in range(steps):
        x, y = batch_of(step, dist.get_rank())
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        with optimizer.at_previous_weights():
            if optimizer.has_previous_weights:
                (net(x) - y).square().mean().backward()
        optimizer.step()

        now = gradients_at(weights, step)
        behind = gradients_at(before, step) if step else [torch.zeros_like(w) for w in weights]
        before = [w.clone() for w in weights]
        for i, weight in enumerate(weights):
            c = now[i] + gamma * beta1 / (1 - beta1) * (now[i] - behind[i])
            c = c / max(1.0, float(c.norm())) if not sharded else c
            if sharded:  # each rank clips its part by the norm of that
                parts = c.tensor_split([-(-25 // ranks) * r for r in range(1, ranks)])
                c = torch.cat([part / max(1.0, float(part.norm())) for part in parts])
            first[i] = beta1 * first[i] + (1 - beta1) * c
            second[i] = beta2 * second[i] + (1 - beta2) * c * c
            debiased = first[i] / (1 - beta1 ** (step + 1))
            weight -= lr * debiased / ((second[i] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
    for value, want in zip(whole(model).values(), weights, strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=1e-9)
