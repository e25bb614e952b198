"""State of thin matrices that other ranks saved, run in every process; see ranks.py."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded import same_gradients, save, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from hf_soap import MARS, SOAP, Shampoo, checkpoint
from hf_soap.checkpoint.state_dict import LAYOUT
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.rules.storage import decoded
from hf_soap.trainer import resume

LR, STEPS = 1e-2, 6
OPTIMIZERS: dict[str, Callable[..., BlockOptimizer]] = {
    "soap": lambda p, **s: SOAP(p, lr=LR, precondition_frequency=2, **s),
    "soap, one side": lambda p, **s: SOAP(p, lr=LR, precondition_frequency=2, one_sided=True, **s),
    "soap, factorized": lambda p, **s: SOAP(p, lr=LR, precondition_frequency=2, factorized=True, **s),
    "soap, blocks": lambda p, **s: SOAP(p, lr=LR, precondition_frequency=2, block_size=4, **s),
    "soap, square blocks": lambda p, **s: SOAP(
        p, lr=LR, precondition_frequency=3, refresh_growth=0.5, square_blocks=True, **s
    ),
    "soap, bfloat16": lambda p, **s: SOAP(
        p, lr=LR, precondition_frequency=2, state_dtype="bfloat16", pack_factors=True, **s
    ),
    "kl_soap": lambda p, **s: SOAP(p, lr=LR, precondition_frequency=2, kl=True, **s),
    "shampoo": lambda p, **s: Shampoo(p, lr=LR, precondition_frequency=2, start_step=2, **s),
    "shampoo, late roots": lambda p, **s: Shampoo(
        p, lr=LR, precondition_frequency=3, start_step=2, asynchronous=True, delay=2, **s
    ),
    "kl_shampoo": lambda p, **s: Shampoo(p, lr=LR, precondition_frequency=2, kl=True, graft=None, **s),
    "mars_soap": lambda p, **s: MARS(p, lr=LR, variant="soap", precondition_frequency=2, **s),
}

THIN = ((1, 8), (2, 8), (2, 20), (1, 5), (2,))
"""Without factors where cut in two or three, with factors where whole, but for the bias of a head of two labels."""

UNEVEN = ((7, 10), (10,), (5, 7), (5,), (1, 5), (1,), (8, 4), (2, 8))
"""Three ranks share these unevenly, and have nothing of some."""


class Shapes(nn.Module):
    """Parameters of given shapes, and nothing else."""

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate(shapes):
            value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{number}", nn.Parameter(value.to(dtype)))


def model_of(mode: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64) -> Any:
    """Parameters that are sharded over all ranks, unless ``mode`` is ``"one"``."""
    model = Shapes(shapes, dtype)
    return model if mode == "one" else fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def optimizer_of(mode: str, name: str, model: nn.Module) -> BlockOptimizer:
    """An optimizer by its name, for owners or for parts."""
    return OPTIMIZERS[name](model.parameters(), **({"shard_mode": "owner"} if mode == "owner" else {}))


def gathered(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with whole tensors; all ranks must call this."""
    return {
        **state_dict,
        "state": {
            k: {role: dtensor.gathered(value) for role, value in entry.items()}
            for k, entry in state_dict["state"].items()
        },
    }


def save_parts(names: list[str], shapes: list[list[int]], mode: str = "local") -> None:
    """Takes six steps; saves FULL and SHARDED state dicts and a gathered one, and the weights and the momentum."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        folder.mkdir(exist_ok=True)
        model = model_of(mode, shapes)
        optimizer = optimizer_of(mode, name, model)
        same_gradients(model, optimizer, range(STEPS))
        save(model, optimizer, folder)
        memory, weights = gathered(optimizer.state_dict()), whole(model)
        if dist.get_rank() == 0:
            torch.save(memory, folder / "memory.pt")
            torch.save(weights, folder / "weights.pt")
        dist.barrier()


def loads_parts(names: list[str], shapes: list[list[int]], mode: str) -> None:
    """Loads each of them: momentum and counts carry over, factors are those of a first gradient, and steps go on."""
    checked = 0
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        weights = torch.load(folder / "weights.pt", weights_only=True)
        old = torch.load(folder / "memory.pt", weights_only=True)["state"]
        for source in ("memory.pt", resume.FULL, resume.SHARDED):
            what = f"{name} from {source}"
            model = model_of(mode, shapes)
            optimizer = optimizer_of(mode, name, model)
            optimizer.load_state_dict(checkpoint.read(str(folder / source)))
            for place, param in enumerate(model.parameters()):
                state = optimizer.state[param]
                assert state["step"] == STEPS, f"{what}, {tuple(param.shape)}: {state['step']} steps"
                plan = optimizer.plan_of(optimizer.param_groups[0], param)
                had_none = LAYOUT not in old[place]
                if mode != "local" and had_none and plan.layout.sides and state.keys() != {"step"}:
                    assert_is_a_first_one(plan, param, state, old[place], f"{what}, {tuple(param.shape)}")
                    checked += 1
            with torch.no_grad():
                for key, param in model.named_parameters():
                    given = weights[key]
                    param.copy_(given if mode == "one" else as_sharded(given, param))
            for step in range(STEPS, STEPS + 4):
                before = whole(model)
                same_gradients(model, optimizer, [step])
                for key, after in whole(model).items():
                    moved = (after - before[key]).abs().max()
                    assert moved < 20 * LR, f"{what}: {key} moved by {moved}"  # not where either is NaN
                assert all(state["step"] == step + 1 for state in optimizer.state.values()), what
    assert mode == "local" or any(dtensor.from_all(checked)), "no matrix has factors now that had none before"


def as_sharded(value: Tensor, param: Any) -> Tensor:
    """A whole tensor, cut as a parameter is."""
    return distribute_tensor(value, param.device_mesh, param.placements)


def assert_is_a_first_one(
    plan: Plan, param: Tensor, state: dict[str, Tensor], old: dict[str, Tensor], what: str
) -> None:
    """State with the old momentum, whose factors are as that would make them if it were a first gradient."""
    kept = {role: value for role, value in state.items() if role != "step"}
    new = plan.rule.restate(decoded(kept, plan.state_spec, torch.float32), plan.layout)
    assert all(value.isfinite().all() for value in new.values()), what
    momentum = plan.layout.from_blocks(new["exp_avg"], param.shape)
    rounded = kept["exp_avg"].dtype == torch.bfloat16
    far = 2**-6 if rounded else 1e-12
    want = old["exp_avg"].to(momentum.dtype)
    torch.testing.assert_close(
        momentum, want, rtol=0, atol=far * float(want.abs().max()), msg=lambda m: f"{what}: {m}"
    )
    squares = new.get("exp_avg_sq", new.get("exp_avg_sq_row"))
    if squares is not None:  # Adam's, of a tensor that gets factors: its mean is what is known of them
        share = squares.mean() / old["exp_avg_sq"].to(squares.dtype).mean()
        assert 0.7 < share < 1.4, f"{what}: the second moment is {share} times what it was"
    blocks = plan.layout.to_blocks(want)
    for side in plan.layout.sides:
        factor = new[f"factor_{side}"]
        assert (torch.linalg.eigvalsh(factor) >= -far * 4 * factor.abs().max()).all(), f"{what}: factor_{side}"
        assert factor.any(), f"{what}: factor_{side} is zero"
        if "kl" in what:  # its factors start as multiples of the identity, or as means
            continue
        rows = blocks.movedim(side + 1, 1).flatten(2)
        gram = rows @ rows.mT
        alike = (factor * gram).sum() / (factor.norm() * gram.norm())
        assert math.isclose(float(alike), 1, abs_tol=1e-3 if rounded else 1e-9), f"{what}: factor_{side}"
