"""Checks before the first step whether gradients and optimizer state fit into memory."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_soap.config import options
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.planning import costs
from hf_soap.planning import plan as planning

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Needs:
    """Bytes that training needs on one device.

    Attributes:
        weights: Parameters, including frozen ones; these are allocated already.
        gradients: Gradients that are not allocated yet.
        state: All optimizer state.
        missing: The part of the state that is not allocated yet.
    """

    weights: int = 0
    gradients: int = 0
    state: int = 0
    missing: int = 0


def needs_here(model: nn.Module, optimizer: BlockOptimizer) -> dict[torch.device, Needs]:
    """Counts what this rank needs on each of its devices, for its parameters as they are now, sharded or not."""
    found: defaultdict[torch.device, Needs] = defaultdict(Needs)
    states = optimizer.state_bytes_of_parameters()
    params: list[Tensor] = list(model.parameters())
    for param in params:
        part, state = dtensor.local(param), states.get(param, 0)
        needs = found[part.device]
        needs.weights += part.nbytes
        needs.gradients += part.nbytes if param.requires_grad and param.grad is None else 0
        needs.state += state
        needs.missing += 0 if optimizer.state.get(param) else state
    return found


def check_memory(needs: Needs, *, free: int, total: int, device: str, suggest: Callable[[int], str]) -> str | None:
    """Checks whether training fits on a device, not counting activations.

    Args:
        needs: What training needs there.
        free: Bytes that are free now, with the weights allocated.
        total: Bytes of the device.
        device: Its name, for the message.
        suggest: Returns a suggestion of settings whose optimizer state fits into a number of bytes.

    Returns:
        A warning, or None if everything fits.

    Raises:
        ValueError: If the optimizer's state alone is larger than the device.
    """
    room = free - needs.gradients + needs.state - needs.missing
    if needs.state <= total and needs.state <= room:
        return None
    text = (
        f"{_gib(needs.weights)} of weights, {_gib(needs.gradients)} of further gradients and {_gib(needs.state)} of "
        f"optimizer state on {device}, which has {_gib(total)}, {_gib(free)} of them free"
    )
    remedy = suggest(min(room, total))
    if needs.state > total:
        raise ValueError(
            f"got {text}, wanted state that fits; {remedy}, or SoapTrainer(preflight=False) to try it anyway"
        )
    return f"{text}: training will run out of memory, even without activations; {remedy}"


def suggestion(model: nn.Module, optimizer: BlockOptimizer, config: options.OptimizerConfig, room: int) -> str:
    """Suggests settings with which the optimizer's state on this rank fits into ``room`` bytes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def measure(candidate: options.OptimizerConfig) -> costs.Cost:
        made = planning.build(model, params, candidate)
        plans = [made.plan_of(m.settings, m.param) for m in made.members() if m.param.requires_grad]
        return costs.Cost(state=made.state_bytes(), work=sum(plan.work() for plan in plans))

    found = planning.settings_that_fit(config, measure, lambda cost: cost.state <= room)
    if not found:
        return "none of the optimizer settings that were tried fits; use LoRA, or FSDP2 on more ranks"
    best, cost = found[0]
    return f"use optim_args={best.to_optim_args()!r} ({_gib(cost.state)} of state)"


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Returns the (free, total) bytes available to a process; None for a device that does not report them.

    Processes on one machine share its main memory evenly, which is known only if psutil is installed.
    """
    if device.type == "cpu":
        try:
            import psutil
        except ModuleNotFoundError:
            return None

        memory, processes = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return memory.available // processes, memory.total // processes
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    # Memory that the allocator has reserved but does not use is free too, though the device counts it as used.
    return free + module.memory_reserved(device) - module.memory_allocated(device), total


def check(model: nn.Module, optimizer: BlockOptimizer, config: options.OptimizerConfig) -> list[str]:
    """Checks before the first step whether gradients and optimizer state fit on this rank's devices.

    Args:
        model: The model, sharded or not.
        optimizer: Its optimizer.
        config: The config of the optimizer, for suggestions.

    Returns:
        Warnings.

    Raises:
        ValueError: If the optimizer's state alone is larger than a device.
    """
    warnings = []
    for device, needs in needs_here(model, optimizer).items():
        if (memory := device_memory(device)) is not None:
            warnings.append(
                check_memory(
                    needs,
                    free=memory[0],
                    total=memory[1],
                    device=str(device),
                    suggest=lambda room: suggestion(model, optimizer, config, room),
                )
            )
    return [warning for warning in warnings if warning]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
