"""What several ranks measure together, run in every process; see ranks.py."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sharded import EVEN, network, shard, train, whole
from sharded_trainer import trainer_for

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.engine.profiling import StepProfiler
from hf_soap.trainer.metrics import diagnostics, measurements, plans_of, slug


def ranks_measure_the_whole() -> None:
    """Updates are those of all parts together, of whoever steps them; what only some ranks know reaches all."""
    makers = {
        "local": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2),
        "owner": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, shard_mode="owner"),
        "shampoo": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, start_step=1, shard_mode="owner"),
        "mars": lambda p: MARS(p, lr=1e-2),
    }
    for name, make in makers.items():
        model = shard(network())
        optimizer = make(model.parameters())
        optimizer.profiler = StepProfiler()
        train(model, optimizer, range(5))
        measurements(optimizer)
        before = whole(model)
        optimizer.profiler.due = True
        train(model, optimizer, range(5, 6))
        after = whole(model)
        found = measurements(optimizer)
        everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        assert all(one == found for one in everyone), name
        rules = {param: plan.label for param, plan in plans_of(optimizer).items()}
        named = dict(model.named_parameters())
        assert len(set(rules.values())) > 1, rules.values()
        for rule in set(rules.values()):
            own = [key for key in before if rules[named[key]] == rule]
            moved = sum(float((after[key] - before[key]).double().square().sum()) for key in own)
            rms = math.sqrt(moved / sum(before[key].numel() for key in own))
            assert abs(found[f"optimizer/update_rms/{slug(rule)}"] - rms) < 1e-5 * rms, (name, found, rms)


def owners_measure_as_one_process() -> None:
    """Angles, shares and updates of one process with the same gradients; only times are another matter."""
    folder = Path(os.environ["SHARED_FOLDER"])
    model = network(sizes=EVEN)
    model = shard(model) if dist.get_world_size() > 1 else model
    optimizer = SOAP(model.parameters(), lr=1e-2, precondition_frequency=2, shard_mode="owner")
    optimizer.profiler = StepProfiler()
    optimizer.profiler.due = True
    train(model, optimizer, range(6))
    found = {key: value for key, value in measurements(optimizer).items() if "refresh" not in key and "_ms" not in key}
    assert diagnostics(optimizer)["optimizer/skipped_steps"] == 0
    if dist.get_world_size() == 1:
        torch.save(found, folder / "found.pt")
        return
    want = torch.load(folder / "found.pt")
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert abs(found[key] - value) <= 1e-5 * abs(value), (key, found[key], value)


def trainers_log(mode: str, kind: str | None) -> None:
    """The real Trainer, under FSDP2 or DDP."""
    folder = Path(os.environ["SHARED_FOLDER"])
    options = f"precondition_frequency=2,log_every=4,shard_mode={mode}"
    trainer = trainer_for(folder / "run", state_dict_type=kind, optim_args=options)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "optimizer/step_ms" in entry]
    assert [entry["step"] for entry in entries] == [4, 8]
    for what in ("update_rms", "update_ratio", "factor_off_diagonal", "rotation_degrees", "refresh_ms"):
        assert entries[1][f"optimizer/{what}/soap_2_sides"] > 0, what
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, entries)
    assert all(one == entries for one in everyone)
