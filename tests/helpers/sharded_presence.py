"""Gradients and errors that one rank has and others have not, run in every process; see ranks.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import assert_equal, same_gradients, whole
from sharded_changes import Exchange, outcome_of, told
from sharded_exact import classifier
from sharded_loading import OPTIMIZERS, UNEVEN, gathered, model_of

from hf_soap import MARS, SOAP
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.profiling import StepProfiler
from hf_soap.trainer import metrics, preflight

MAKERS: dict[str, Callable[..., BlockOptimizer]] = {
    "soap": OPTIMIZERS["soap"],
    "shampoo": OPTIMIZERS["shampoo"],
    "kl_shampoo": OPTIMIZERS["kl_shampoo"],
    "mars": lambda p, **s: MARS(p, lr=1e-2, **s),
    "mars_soap": OPTIMIZERS["mars_soap"],
}


def optimizers_of(name: str, modes: Iterable[str] = ("local", "owner")) -> Iterable[tuple[str, Any, BlockOptimizer]]:
    """A sharded model and its optimizer in both modes."""
    for mode in modes:
        model = model_of(mode, UNEVEN)
        yield f"{mode}, {name}", model, MAKERS[name](model.parameters(), shard_mode=mode)


def gradients(model: Any, step: int, missing: Callable[[int], bool]) -> None:
    """Gives gradients that depend on the step and the weights, but for those that are missing on this rank."""
    kept = same_gradients_of(model, step)
    for place, (param, grad) in enumerate(zip(model.parameters(), kept, strict=True)):
        param.grad = None if missing(place) else grad


def same_gradients_of(model: Any, step: int) -> list[torch.Tensor]:
    """Those of :func:`sharded.same_gradients`, which are not stepped with."""

    class Idle:
        def step(self) -> None:
            pass

    same_gradients(model, Idle(), [step])  # type: ignore[arg-type]
    return [param.grad for param in model.parameters()]


def saves_and_goes_on(what: str, model: Any, optimizer: BlockOptimizer, name: str, mode: str) -> None:
    """A new optimizer loads what was saved, and both go on.

    FSDP gives all ranks parts of a gradient or none. Where a program gives them to some, each rank counts its own, as
    with AdamW.
    """
    state = optimizer.state_dict()
    for saved in (state, gathered(state)):
        again = MAKERS[name](model.parameters(), shard_mode=mode)
        again.load_state_dict(saved)
        same_gradients(model, again, range(20, 22))
        assert all(value.isfinite().all() for value in whole(model).values()), what


def an_expert_that_one_rank_uses(names: list[str]) -> None:
    """The first ranks' batches did not reach a matrix and a vector: from the beginning, then in between, then all."""
    for name in names:
        for what, model, optimizer in optimizers_of(name):
            for step in range(8):
                unused = step not in (4, 5) and dist.get_rank() != 1
                gradients(model, step, lambda place, unused=unused: unused and place in (0, 1, 4))  # type: ignore[misc]
                optimizer.step()
            assert all(value.isfinite().all() for value in whole(model).values()), what
            saves_and_goes_on(what, model, optimizer, name, what.partition(",")[0])


def a_rank_that_has_no_gradients(names: list[str]) -> None:
    """From the first step on, at no learning rate and then at one, with a profiler that all ranks read."""
    for name in names:
        for what, model, optimizer in optimizers_of(name):
            optimizer.profiler = StepProfiler()
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            for step in range(6):
                gradients(model, step, lambda place: dist.get_rank() == 0)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2
            measured = dtensor.from_all(sorted(metrics.measurements(optimizer)))
            assert all(other == measured[0] for other in measured), f"{what}: {measured}"
            saves_and_goes_on(what, model, optimizer, name, what.partition(",")[0])


def a_parameter_that_is_thawed(names: list[str]) -> None:
    """Two are trained from the fifth step on; with owners, bit for bit as in one process."""
    for name in names:
        for what, model, optimizer in optimizers_of(name):
            alone = model_of("one", UNEVEN)
            reference = MAKERS[name](alone.parameters())
            for net, stepped in ((model, optimizer), (alone, reference)):
                late = [list(net.parameters())[place] for place in (0, 5)]
                for param in late:
                    param.requires_grad_(requires_grad=False)
                for step in range(8):
                    if step == 4:
                        for param in late:
                            param.requires_grad_()
                        if net is model:
                            stepped.load_state_dict(stepped.state_dict())
                    same_gradients(net, stepped, [step])
                for param in late:
                    assert stepped.state[param]["step"] == 4, f"{what}: {stepped.state[param]['step']}"
            if what.startswith("owner") and name != "mars":  # which one process steps by fused kernels
                assert_equal(whole(model), whole(alone), what)
            saves_and_goes_on(what, model, optimizer, name, what.partition(",")[0])


def a_setting_that_does_not_fit_in_mid_run(mode: str) -> None:
    """Who has nothing of the matrix stepped on, or waited for its owner, and the others raised."""
    exchange = Exchange()
    model = model_of(mode, ((4, 8),), torch.float32)
    optimizer = SOAP(model.parameters(), lr=1e-2, shard_mode=mode)  # type: ignore[arg-type]
    same_gradients(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["factorized"] = True
    same_gradients_of(model, 3)
    outcomes = exchange(outcome_of(lambda: optimizer.step()))
    assert {outcome.kind for outcome in outcomes} in ({"done"}, {"ValueError"}), told(outcomes)


def state_that_does_not_fit_one_rank() -> None:
    """The memory of one device is less than its state: everybody is told, and nobody waits for the others."""
    exchange, ask = Exchange(), preflight.device_memory
    trainer = classifier(Path(os.environ["SHARED_FOLDER"]) / "a", sharded=True, freeze=False)
    with pytest.MonkeyPatch.context() as patch:
        little = (1000, 1000)
        patch.setattr(preflight, "device_memory", lambda device: little if dist.get_rank() == 1 else ask(device))
        outcomes = exchange(outcome_of(trainer.train))
    assert {outcome.kind for outcome in outcomes} == {"ValueError"}, told(outcomes)
    assert all("state that fits" in outcome.text for outcome in outcomes), told(outcomes)
