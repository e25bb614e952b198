"""Runs that stop at a checkpoint and go on: made by an old version for checkpoints/, repeated by the present one.

Both import this file, so that it holds no option that one of them lacks. Weights are float64 and factors have full
rank, so that two correct versions differ by rounding alone, on any CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import gradient, parameters, train
from paths import ROOT
from sharded import same_gradients, save, shard, whole
from torch import nn
from torch.nn import Parameter

from hf_soap import MARS, SOAP, OptimizerConfig, Shampoo, ShampooConfig, SoapConfig
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.trainer import registry

FOLDER = ROOT / "tests" / "checkpoint" / "versions"

SHAPES = [(8, 8), (5, 5), (5, 8), (6,), (4, 3, 3)]
"""No matrix flatter than 8 : 1, no 1 x N and no stack of matrices: such have had other factors since 0.1.0."""

STEPS, MORE = range(8), range(8, 11)
"""The checkpoint comes between the two; factors are refreshed after it too."""

soap = partial(SOAP, lr=1e-2, precondition_frequency=2, refresh_growth=0.0)
shampoo = partial(Shampoo, lr=1e-2, precondition_frequency=2, start_step=2)
mars = partial(MARS, lr=1e-2, weight_decay=0.01, weight_decay_1d=0.02)
"""With a decay for vectors: where none was given, 0.1.0 had another one."""

OPTIMIZERS: dict[str, Callable[[Any], BlockOptimizer]] = {
    "soap": soap,
    "soap_one_sided_factorized": partial(soap, one_sided=True, factorized=True),
    "soap_blocks": partial(soap, block_size=4),
    "soap_kl": partial(soap, kl=True),
    "soap_bfloat16_packed": partial(soap, state_dtype="bfloat16", pack_factors=True),
    "shampoo": shampoo,
    "shampoo_asynchronous": partial(shampoo, precondition_frequency=4, asynchronous=True, delay=3),
    "shampoo_diagonals": partial(shampoo, max_precond_dim=6),
    "shampoo_kl": partial(shampoo, kl=True, graft=None),
    "mars_adamw": mars,
    "mars_lion": partial(mars, variant="lion"),
    "mars_shampoo": partial(mars, variant="shampoo"),
    "mars_m": partial(mars, variant="m"),
    "mars_soap": partial(mars, variant="soap", precondition_frequency=2, refresh_growth=0.0),
    "mars_exact": partial(mars, exact=True),
}


def made(name: str) -> tuple[list[Parameter], Any]:
    """Returns parameters and a new optimizer for them."""
    params = parameters(SHAPES, torch.float64)
    return params, OPTIMIZERS[name](params)


def go(optimizer: Any, params: list[Parameter], steps: Iterable[int]) -> None:
    """Takes steps with the gradients of helpers.gradient; exact MARS has them at the previous weights too."""
    if not getattr(optimizer, "exact", False):
        train(optimizer, params, steps)
        return
    for step in steps:
        for place, param in enumerate(params):
            param.grad = gradient(param, place, step)
        with optimizer.at_previous_weights():
            for place, param in enumerate(params if optimizer.has_previous_weights else []):
                param.grad = gradient(param, place, step)
        optimizer.step()


def values(params: Iterable[Parameter]) -> list[torch.Tensor]:
    """Copies of parameters."""
    return [param.detach().clone() for param in params]


TRAINED, TRAINED_MORE = 6, 3
"""Steps of the Trainer before its checkpoint, and after it."""


def trainer(folder: Path) -> Any:
    """A Trainer whose two groups 0.1.0 split in five; in each batch are all of its samples, in whatever order."""
    from tiny import Counting, arguments, gpt2  # here, for they take seconds to import in every process
    from transformers import Trainer

    model = gpt2(n_embd=8, n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    settings: dict[str, Any] = {
        "optim_args": "precondition_frequency=2,refresh_growth=0,adam_modules=wte|wpe,one_sided_modules=c_fc",
        "weight_decay": 0.01,
        "max_steps": TRAINED + TRAINED_MORE,
        "save_strategy": "steps",
        "save_steps": TRAINED,
        "lr_scheduler_type": "linear",
    }
    return Trainer(model=model, args=arguments(folder, **settings), train_dataset=Counting(4))


SHARDED: dict[str, tuple[str, type[BlockOptimizer], OptimizerConfig]] = {
    "soap_local": ("local", SOAP, SoapConfig(precondition_frequency=2, refresh_growth=0.0, adam_modules="bias")),
    "shampoo_owner": ("owner", Shampoo, ShampooConfig(precondition_frequency=2, start_step=2)),
}
"""Shard mode, class and options of what two ranks save. For ``adam_modules`` 0.1.0 made a second group."""


def sharded_run(name: str, *, split: bool = True) -> tuple[nn.Sequential, BlockOptimizer]:
    """A network that ranks share evenly under FSDP2, or that one process has, and the optimizer the Trainer makes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
    mode, cls, config = SHARDED[name]
    groups = [{"params": list((shard(model) if split else model).parameters()), "weight_decay": 0.01}]
    grouping: Any = registry._grouping_class(cls, config, model)
    return model, grouping(groups, lr=1e-2, **{**config.constructor_kwargs(), "shard_mode": mode})


def save_sharded(folder: str) -> None:
    """Saves the state of each in both formats, in every process; see ranks.py."""
    for name in SHARDED:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        model, optimizer = sharded_run(name)
        same_gradients(model, optimizer, STEPS)
        weights = {"at_save": whole(model)}
        save(model, optimizer, place)
        same_gradients(model, optimizer, MORE)
        weights["after"] = whole(model)
        if dist.get_rank() == 0:
            torch.save(weights, place / "weights.pt")
        dist.barrier()
