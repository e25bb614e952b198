"""What the tests of sharded training run in every process; see ranks.py."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from third_party import SPlus
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_soap import MARS, SOAP, Muon, Shampoo, SoapMuon
from hf_soap.checkpoint import files
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.trainer import resume


def _with_own_settings(params: Iterable[Any]) -> list[dict[str, Any]]:
    """A matrix and a vector have their own rates and betas."""
    listed = list(params)
    own = {"lr_factor": 0.5, "weight_decay": 0.25, "betas": (0.9, 0.8)}
    return [{"params": listed, "overrides": [{} if place % 3 else own for place in range(len(listed))]}]


OPTIMIZERS: dict[str, Callable[[Any], BlockOptimizer]] = {
    "soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2),
    "soap, one side, factorized": lambda p: SOAP(
        p, lr=1e-2, precondition_frequency=2, one_sided=True, factorized=True
    ),
    "soap, blocks": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, block_size=4),
    "soap, square blocks": lambda p: SOAP(
        p, lr=1e-2, precondition_frequency=3, refresh_growth=0.5, square_blocks=True, factorized=True
    ),
    "kl_soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, kl=True),
    "shampoo": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, start_step=2),
    "shampoo, late roots": lambda p: Shampoo(
        p, lr=1e-2, precondition_frequency=3, start_step=2, asynchronous=True, delay=2
    ),
    "mars": lambda p: MARS(p, lr=1e-2),
    "mars_lion": lambda p: MARS(p, lr=1e-2, variant="lion"),
    "mars_shampoo": lambda p: MARS(p, lr=1e-2, variant="shampoo"),
    "mars_soap": lambda p: MARS(p, lr=1e-2, variant="soap", precondition_frequency=2),
    "muon": lambda p: Muon(p, lr=1e-2, lr_1d=1e-3),
    "soap_muon": lambda p: SoapMuon(p, lr=1e-2, lr_1d=1e-3),
    "third party": lambda p: SPlus(p, lr=1e-2, precondition_frequency=2),
    "soap, own settings": lambda p: SOAP(_with_own_settings(p), lr=1e-2, precondition_frequency=2),
    "soap, averaged": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, average_horizon=3, average_start=2),
    "soap, overlapped": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, overlap_refresh=True),
}
WITHOUT_OWNERS: dict[str, Callable[[Any], BlockOptimizer]] = {}


UNEVEN, EVEN = (7, 10, 5, 1), (8, 12, 8, 4)


def network(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = UNEVEN) -> nn.Sequential:
    """By default with rows that 2 and 3 ranks share unevenly, and a last layer of which some have nothing."""
    torch.manual_seed(0)
    first, second, third = (nn.Linear(rows, columns) for rows, columns in itertools.pairwise(sizes))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).to(dtype)


def shard(model: nn.Sequential, mesh: DeviceMesh | None = None) -> nn.Sequential:
    """Shards each layer by itself."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Trains on data that depends on the step alone; every rank has the same batch."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ends = (model[0].in_features, model[4].out_features)
        x, y = (torch.randn(16, n, generator=generator).to(dtype) for n in ends)
        loss = (model(x) - y).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Sets all parameters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = weights[name]
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Asserts equality bit for bit."""
    differ = [name for name, value in want.items() if not torch.equal(value, got[name])]
    assert not differ, f"{what}: {differ} differ"


def resumed_equals_uninterrupted(dtype: str, names: list[str] | None = None) -> None:
    """FULL and SHARDED state dicts of torch.distributed.checkpoint, as accelerate takes them."""
    folder = Path(os.environ["SHARED_FOLDER"])
    makers = {**OPTIMIZERS, **WITHOUT_OWNERS}
    for name in names or makers:
        model = shard(network(getattr(torch, dtype)))
        optimizer = makers[name](model.parameters())
        train(model, optimizer, range(6))
        weights = whole(model)
        save(model, optimizer, folder)
        losses = train(model, optimizer, range(6, 10))
        want = whole(model)
        for full in (True, False):
            model = shard(network(getattr(torch, dtype)))
            put(model, weights)
            optimizer = makers[name](model.parameters())
            options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full, cpu_offload=full)
            if full:
                state = torch.load(folder / resume.FULL, weights_only=True) if dist.get_rank() == 0 else {}
            else:
                saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
                dcp.load(saved, storage_reader=dcp.FileSystemReader(folder / resume.SHARDED))
                state = saved["optimizer"]
            set_optimizer_state_dict(model, optimizer, state, options=options)
            assert train(model, optimizer, range(6, 10)) == losses, f"{name}, full={full}"
            assert_equal(whole(model), want, f"{name}, full={full}")
        dist.barrier()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes both kinds of state dict of an optimizer as accelerate does."""
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(full, folder / resume.FULL)
    sharded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(sharded, storage_writer=dcp.FileSystemWriter(folder / resume.SHARDED))
    dist.barrier()


def save_for_others(names: list[str]) -> None:
    """Trains six steps, and saves what runs on other ranks go on from, and how this one goes on."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        folder.mkdir(exist_ok=True)
        model = shard(network())
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, range(6))
        weights = whole(model)
        save(model, optimizer, folder)
        losses = train(model, optimizer, range(6, 12))
        if dist.get_rank() == 0:
            torch.save({"weights": weights, "losses": losses}, folder / "run.pt")
        dist.barrier()


class Messages(logging.Handler):
    """Collects what a logger says."""

    def __init__(self, logger: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def goes_on_from_others(names: list[str], sharded: bool = True, tolerance: float = 0.02) -> None:
    """Loads what another number of ranks saved: no jump in the loss, momentum intact, one warning."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        run = torch.load(folder / "run.pt", weights_only=True)
        for source in (resume.FULL, resume.SHARDED):
            model = shard(network()) if sharded else network()
            put(model, run["weights"])
            optimizer, said = OPTIMIZERS[name](model.parameters()), Messages("hf_soap.engine.optimizer")
            optimizer.load_state_dict(files.read(folder / source))
            exact = name in ("mars", "mars_lion", "mars_shampoo")  # no factors: nothing is estimated
            warned = [text for text in said.texts if "saved in other parts" in text]
            assert len(warned) == (0 if exact or dist.get_rank() else 1), f"{name}: {said.texts}"
            losses = train(model, optimizer, range(6, 12))
            for got, want in zip(losses, run["losses"], strict=True):
                assert abs(got - want) <= (1e-6 if exact else tolerance) * want, f"{name}: {losses}, {run['losses']}"


def owned(name: str, params: Any) -> BlockOptimizer:
    """One of the optimizers, with whole matrices on one rank each."""
    optimizer = OPTIMIZERS[name](params)
    for group in optimizer.param_groups:
        group["shard_mode"] = "owner"
    return optimizer


def same_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with gradients that depend on the step and the weights alone, however they are sharded."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, weight in whole(model).items():
            param = model.get_parameter(name)
            grad = (torch.randn(weight.shape, generator=generator, dtype=torch.float64) + weight).to(weight.dtype)
            split = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if split else grad
        optimizer.step()
