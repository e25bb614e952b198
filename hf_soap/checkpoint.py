"""What a state dict holds and how it is loaded.

A checkpoint holds flat tensors and plain numbers per parameter, keyed by role, so that it says nothing about how state
was stacked in memory.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_soap import owners, recut, sharding
from hf_soap.blocks import Layout, Plan
from hf_soap.buckets import check_state
from hf_soap.precision import float32_products
from hf_soap.storage import COUNT, decoded

logger = logging.getLogger(__name__)

FROM_CHECKPOINT = ("lr", "initial_lr")
"""Group entries that a checkpoint decides: a scheduler continues from them. All others are current settings."""


def detach_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns ``state_dict`` with every tensor of its state copied out of the stack it is a view of."""
    state = {
        key: {role: value.clone() if isinstance(value, Tensor) else value for role, value in entry.items()}
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def groups_to_load(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict without state, whose groups combine saved learning rates and current settings.

    Args:
        groups: The optimizer's param groups.
        state_dict: What was saved.

    Returns:
        A state dict for ``torch.optim.Optimizer.load_state_dict``.

    Raises:
        ValueError: If number or sizes of the groups differ.
    """
    saved = state_dict["param_groups"]
    got, want = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if got != want:
        raise ValueError(
            f"the checkpoint has param groups of {got} parameters, this optimizer has groups of {want}; "
            "load it with the same model and the same grouping options in optim_args"
        )
    merged = []
    for old, new in zip(saved, groups, strict=True):
        current = {key: value for key, value in new.items() if key not in ("params", *FROM_CHECKPOINT)}
        changed = {k: (old[k], v) for k, v in current.items() if k in old and _plain(old[k]) != _plain(v)}
        if changed:
            words = ", ".join(f"{key}={value!r} (saved {before!r})" for key, (before, value) in changed.items())
            logger.info("Settings that differ from the checkpoint's; the current ones are used: %s", words)
        merged.append({**old, **current})
    return {"state": {}, "param_groups": merged}


def saved_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """Yields (group, parameter, saved state by role) for every parameter that has saved state."""
    for old, new in zip(state_dict["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            saved = state_dict["state"].get(key)
            if saved:
                yield new, param, saved


LAYOUT = "layout"
"""Role of the numbers that say how a tensor was cut, in a state dict only."""


def packed(param: Tensor, plan: Plan, state: dict[str, Any], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Returns a copy of a parameter's state that means the same to all ranks and to other numbers of them.

    Args:
        param: The parameter.
        plan: How this rank's part of it is cut.
        state: Its state by role; a rank that has nothing of a sharded parameter holds only ``step``.
        wanted: Tensors with the shapes of all roles.

    Returns:
        State by role. What has the tensor's coordinates has its shape; all else of a sharded parameter is stacked over
        the ranks, see :func:`hf_soap.sharding.to_stack`, with a role that says how each was cut.
    """
    part, whole = sharding.local(param), plan.entrywise
    saved: dict[str, Any] = {}
    for role, like in wanted.items():
        value = state.get(role)
        if not isinstance(value, Tensor):
            value = torch.zeros(like.shape, dtype=like.dtype, device=part.device)
        if not sharding.is_sharded(param):
            saved[role] = value.detach().clone()
        elif role == "step" and (whole or not sharding.stack_sizes(param)):
            saved[role] = value.detach().clone()  # all ranks count alike
        elif role == "step":
            saved[role] = sharding.to_stack(param, value.detach().clone().to(part.device))
        elif whole:
            saved[role] = sharding.to_whole(param, value.detach().clone().view(part.shape))
        else:
            saved[role] = sharding.to_stack(param, value.detach().clone())
    if not whole:
        described = recut.describe(sharding.shard_of(param), plan.layout)
        several = bool(sharding.stack_sizes(param))
        saved[LAYOUT] = sharding.to_stack(param, described.to(part.device)) if several else described.to(part.device)
    return saved


def packed_of_owner(
    param: Tensor, plan: Plan, state: dict[str, Any], wanted: dict[str, Tensor], owner: int, *, to_first: bool
) -> dict[str, Any]:
    """Returns a copy of the state that one rank holds of a whole parameter; all ranks must call this.

    Args:
        param: The parameter.
        plan: How it is cut.
        state: Its state by role on its owner, elsewhere ``step`` alone.
        wanted: Tensors with the shapes of all roles.
        owner: The owner's rank.
        to_first: Bring the state to rank 0, instead of spreading it over the ranks that share the parameter.

    Returns:
        State by role.
    """
    part = sharding.local(param)
    saved: dict[str, Any] = {"step": state["step"].detach().clone()}
    for role, like in wanted.items():
        if role == "step":
            continue
        value = state.get(role)
        if to_first:
            brought = owners.send_to_first(value, like, owner, part.device)
            if brought is not None:
                saved[role] = brought
        else:
            saved[role] = owners.spread_rows(value, like, owner, param)
    if not plan.entrywise:
        saved[LAYOUT] = recut.describe(_whole(param), plan.layout).to("cpu" if to_first else part.device)
    return saved


def _whole(param: Tensor) -> sharding.Shard:
    shape = tuple(param.shape)
    return sharding.Shard(shape, (0,) * len(shape), shape, shape)


def packed_shapes(param: Tensor, plan: Plan, wanted: dict[str, Tensor], *, whole: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what is saved of a parameter, by role; ``whole`` says that it has an owner."""
    stack, entrywise = () if whole else sharding.stack_sizes(param), plan.entrywise
    shapes = {role: (*stack, *like.shape) for role, like in wanted.items()}
    if entrywise and sharding.is_sharded(param) and not whole:
        shapes = {role: () if role == "step" else tuple(param.shape) for role in shapes}
    if not entrywise:
        shapes[LAYOUT] = (*stack, *recut.describe(sharding.shard_of(param), plan.layout).shape)
    return shapes


def gathered(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns saved state with whole tensors in place of DTensors; all ranks must call this."""
    return {role: sharding.gathered(value) if isinstance(value, Tensor) else value for role, value in saved.items()}


def restored(
    param: Tensor, plan: Plan, saved: dict[str, Any], wanted: dict[str, Tensor], *, whole: bool
) -> tuple[dict[str, Any], bool]:
    """Returns a copy of the saved state of one parameter on the parameter's device, in the saved dtypes.

    Args:
        param: The parameter.
        plan: How what this rank steps of it is cut.
        saved: Its saved state by role: plain tensors, or DTensors that are cut as :func:`packed` does.
        wanted: Tensors with the right shapes, by role.
        whole: The parameter has an owner: all of its state is wanted, and was gathered.

    Returns:
        State by role, and whether some of it is estimated, because it was cut in other parts.

    Raises:
        ValueError: If roles or shapes differ in a way that cannot be bridged.
    """
    part, cut = sharding.local(param), sharding.is_sharded(param) and not whole
    shard = sharding.shard_of(param) if cut else _whole(param)
    state = _as_it_was(param, plan, saved, wanted, shard, cut=cut)
    estimated = state is None and (LAYOUT in saved or not plan.entrywise)
    if state is None:
        pieces = [replace(piece, state=decoded(piece.state, torch.float32)) for piece in _pieces(param, saved)]
        computed = plan.computed(1, dtype=torch.float32, device=torch.device("meta"))
        with float32_products(plan.layout.block, torch.device("cpu"), sides=plan.layout.sides):
            state = recut.recut(pieces, plan.rule, plan.layout, shard, {**computed, "step": wanted["step"]})
    if not shard.numel and cut:
        step = state["step"] if plan.entrywise else torch.zeros((), dtype=COUNT)
        return {"step": step.to("cpu", COUNT)}, estimated
    state = plan.kept.converted(state, wanted)
    check_state(state, wanted, tuple(param.shape))
    return {role: value.to("cpu" if role == "step" else part.device) for role, value in state.items()}, estimated


def _as_it_was(
    param: Tensor, plan: Plan, saved: dict[str, Any], wanted: dict[str, Tensor], shard: sharding.Shard, *, cut: bool
) -> dict[str, Tensor] | None:
    """What this rank steps of saved state, or None if it was cut in another way."""
    own = recut.describe(shard, plan.layout)
    if (described := saved.get(LAYOUT)) is not None:
        mine = _own_place(param, described) if cut else described
        if mine is None or mine.numel() != own.numel() or not torch.equal(mine.view(own.shape).cpu(), own):
            return None
    entrywise = plan.entrywise
    if described is None and cut and not entrywise:
        return None
    state = {}
    for role, value in saved.items():
        if role == LAYOUT:
            continue
        like = wanted.get(role)
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        taken: Tensor | None = tensor
        if role == "step" and (entrywise or not cut or not sharding.stack_sizes(param)):
            taken = sharding.gathered(tensor).max()  # several ranks may have saved one each
        elif cut:
            taken = _own_part(param, tensor) if entrywise else _own_place(param, tensor)
        elif entrywise and like is not None and tensor.numel() == like.numel():
            taken = tensor.reshape(like.shape)
        if taken is None:
            return None
        taken = taken.detach().clone()
        state[role] = taken.view(like.shape) if like is not None and taken.numel() == like.numel() else taken
    return state


def _own_place(param: Tensor, value: Tensor) -> Tensor | None:
    """This rank's place of stacked state, or None if it was not stacked over these ranks."""
    stack = sharding.stack_sizes(param)
    if sharding.is_sharded(value):
        part = sharding.local(value)
        return part.reshape(part.shape[len(stack) :])
    if tuple(value.shape[: len(stack)]) != stack:
        return None
    return value[sharding.place_in_stack(param)]


def _own_part(param: Tensor, value: Tensor) -> Tensor | None:
    """This rank's part of state in the tensor's coordinates, or None if it has other ones."""
    if sharding.is_sharded(value):
        return sharding.local(value)
    shard = sharding.shard_of(param)
    if value.numel() != math.prod(shard.whole):
        return None
    return shard.of(value.reshape(shard.whole))


def _pieces(param: Tensor, saved: dict[str, Any]) -> list[recut.Piece]:
    """The parts that saved state consists of, on the CPU."""
    plain = {role: value if isinstance(value, Tensor) else torch.tensor(value) for role, value in saved.items()}
    plain = {role: sharding.gathered(value).detach().cpu() for role, value in plain.items()}
    described = plain.pop(LAYOUT, None)
    if described is None:  # the tensor was not cut, and its steps may be stacked all the same
        view = tuple(param.shape) or (1,)
        layout = Layout(view, (1,) * len(view), view, ())
        state = {role: value.reshape(1, *view) for role, value in plain.items() if role != "step"}
        return [recut.Piece(_whole(param), layout, {**state, "step": plain["step"].max()})]
    stack = described.shape[:-1]
    places = [tuple(place) for place in itertools.product(*(range(size) for size in stack))]
    return [recut.understand(described[p], {role: value[p] for role, value in plain.items()}) for p in places]


def saved_shapes(source: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the saved state by name of the parameter and role."""
    if source.is_file():
        state = read(source)["state"]
        return {name: {role: tuple(torch.as_tensor(v).shape) for role, v in e.items()} for name, e in state.items()}
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    shapes: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, value in FileSystemReader(source).read_metadata().state_dict_metadata.items():
        if key.startswith("optimizer.state."):
            name, _, role = key.removeprefix("optimizer.state.").rpartition(".")
            shapes[name][role] = tuple(getattr(value, "size", ()))
    return dict(shapes)


def read(source: Path) -> dict[str, Any]:
    """Reads a whole optimizer state into the CPU's memory: a file, or a folder of torch.distributed.checkpoint."""
    whole: dict[str, Any]
    if source.is_file():
        whole = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    else:
        whole = _read_folder(source)["optimizer"]
    return whole


def read_weights(source: Path) -> dict[str, Tensor]:
    """Reads all weights of a file, or of a folder of torch.distributed.checkpoint, into the memory of the CPU."""
    weights: dict[str, Tensor]
    if source.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(source)
    elif source.is_file():
        weights = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    else:
        weights = _read_folder(source)["model"]
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads whole weights into a model, sharded or not; every rank must have them and call this.

    Args:
        model: The model.
        weights: By name; those of adapters may lack the adapter's name, as peft saves them.

    Raises:
        ValueError: If a name is unknown, or a trainable parameter is left out.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    known = {*model.state_dict(), *names}
    adapters: Any = getattr(model, "active_adapters", ())  # of peft's models; a method of all others
    if callable(adapters):
        adapters = adapters() if getattr(model, "_hf_peft_config_loaded", False) else ()
    short = {name.replace(f".{adapter}", ""): name for adapter in adapters for name in names}
    renamed = {name if name in known else short.get(name, name): value for name, value in weights.items()}
    unknown = sorted(renamed.keys() - known)
    loaded = {names[name] for name in renamed if name in names}  # tied weights are saved under one of their names
    left_out = sorted(name for name, param in names.items() if param.requires_grad and param not in loaded)
    if unknown or left_out:
        raise ValueError(
            f"the saved weights do not fit the model: unknown are {unknown[:3]}, left out are {left_out[:3]}; resume "
            "with the model, the adapters and the kind of state dict that wrote the checkpoint"
        )
    if not any(sharding.is_sharded(param) for param in names.values()):
        model.load_state_dict(renamed, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(renamed), options=StateDictOptions(full_state_dict=True, strict=False))


def _read_folder(source: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(source), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return state


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
