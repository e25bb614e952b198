"""Plans against what ranks keep, run in every process; see ranks.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from architectures import MODELS, batch, kept_bytes, model, save_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_soap import SoapConfig
from hf_soap.cli.meta_model import model_without_weights, trainer_groups
from hf_soap.planning import plan
from hf_soap.trainer import preflight


def plans_are_what_ranks_keep(names: list[str] | None = None) -> None:
    """State, weights and gradients of the rank that has most, after a real step under FSDP2."""
    count, rank = dist.get_world_size(), dist.get_rank()
    for name in names or MODELS:
        folder = save_config(name, Path(os.environ["SHARED_FOLDER"]) / f"{name}-{rank}")
        empty = model_without_weights(folder).model
        run = plan.Run(empty, trainer_groups(empty), ranks=count, sharded=True)
        for mode, horizon in (("local", 0), ("owner", 0), ("local", 10), ("owner", 10)):
            config = SoapConfig(shard_mode=mode, average_horizon=horizon)
            sharded: Any = model(name)
            fully_shard(sharded, mesh=init_device_mesh("cpu", (count,)))
            optimizer = plan.build(sharded, trainer_groups(sharded), config)
            sharded(**batch(name)).loss.backward()
            optimizer.step()
            params = [param.to_local() for param in sharded.parameters()]
            grads = [param.grad.to_local() for param in sharded.parameters()]
            own = kept_bytes(optimizer), sum(p.nbytes for p in params), sum(g.nbytes for g in grads)
            every: list[Any] = [None] * count
            dist.all_gather_object(every, own)
            want = run.cost(config).state, run.weights(trained=False), run.weights(trained=True)
            got = [max(figures) for figures in zip(*every, strict=True)]
            for figure, planned in zip(got, want, strict=True):
                assert abs(figure - planned) <= 0.01 * figure, f"{name}, {config}: {got}, planned {want}"


def preflight_counts_what_a_rank_has(state_dict_type: str | None, optim_args: str) -> None:
    """In the Trainer, whose optimizer is made before the parameters are sharded."""
    from sharded_trainer import trainer_for

    folder = Path(os.environ["SHARED_FOLDER"])
    trainer = trainer_for(folder, state_dict_type, optim_args=optim_args)
    asked: list[str] = []
    counted = preflight.needs_here

    def needs_here(model: Any, optimizer: Any) -> Any:
        found = counted(model, optimizer)
        (needs,) = found.values()
        asked.append(f"{needs.state} of {needs.missing}")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "needs_here", needs_here)
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert asked == [f"{optimizer.state_bytes()} of {optimizer.state_bytes()}"]
    assert abs(kept_bytes(optimizer) - optimizer.state_bytes()) <= 0.01 * optimizer.state_bytes()
    trainer = trainer_for(folder, state_dict_type, optim_args=optim_args)
    with pytest.MonkeyPatch.context() as patch:
        # Less than the state of any rank, more than a half of it.
        patch.setattr(preflight, "device_memory", lambda _: (400_000, int(0.9 * optimizer.state_bytes())))
        with pytest.raises(ValueError, match=r"optimizer state on cpu.*use optim_args='"):
            trainer.train()
