"""Reads what checkpoints hold: files, and folders of torch.distributed.checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_soap.config.members import OVERRIDES
from hf_soap.distributed import dtensor
from hf_soap.rules.base import AVERAGE, AVERAGES
from hf_soap.rules.storage import is_own


def has_averages(source: Path) -> bool:
    """Whether a file, or a folder of torch.distributed.checkpoint, has averages of weights."""
    return any(AVERAGE in roles for roles in saved_shapes(source, lambda role: role in AVERAGES).values())


def saved_shapes(source: Path, is_meant: Callable[[str], bool] = is_own) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of this package's saved state by parameter name and role; ``is_meant`` chooses the roles."""
    if source.is_file():
        found = {
            name: {role: tuple(getattr(value, "shape", ())) for role, value in entry.items() if is_meant(role)}
            for name, entry in read(source)["state"].items()
            if isinstance(entry, Mapping)
        }
        return {name: roles for name, roles in found.items() if roles}
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    shapes: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, value in FileSystemReader(source).read_metadata().state_dict_metadata.items():
        if key.startswith("optimizer.state."):
            name, _, role = key.removeprefix("optimizer.state.").rpartition(".")
            if is_meant(role):
                shapes[name][role] = tuple(getattr(value, "size", ()))
    return dict(shapes)


def read(source: str | Path) -> dict[str, Any]:
    """Reads a whole optimizer state into CPU memory: a file, or a folder of torch.distributed.checkpoint."""
    source = Path(source)
    whole: dict[str, Any]
    if source.is_file():
        whole = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    else:
        whole = _read_folder(source)["optimizer"]
    return whole


def has_settings(source: Path, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a folder of torch.distributed.checkpoint has all settings of param groups, as torch requires.

    Args:
        source: The folder, which an earlier version may have written.
        groups: The optimizer's param groups.
    """
    saved = _read_groups(source)
    return len(saved) == len(groups) and all(
        len(old["params"]) == len(new["params"]) and _settings(new) <= _settings(old)
        for old, new in zip(saved, groups, strict=True)
    )


def _settings(group: Mapping[str, Any]) -> set[Any]:
    overrides = group.get(OVERRIDES) or []
    return {*group} - {OVERRIDES} | {(place, key) for place, own in enumerate(overrides) for key in own or ()}


def read_part(source: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Reads this rank's part of an optimizer state that equally many ranks saved. All ranks must call this together.

    Args:
        source: A folder of torch.distributed.checkpoint.
        model: The sharded model.
        optimizer: Its optimizer. It may have other param groups and settings than were saved.

    Returns:
        A state dict with the saved param groups, and tensors sharded as those of the optimizer.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    own: Any = get_optimizer_state_dict(model, optimizer)
    reader = FileSystemReader(source)
    state: dict[str, Any] = {
        name: {role: value for role, value in entry.items() if role not in AVERAGES}
        for name, entry in own["state"].items()
    }
    saved = reader.read_metadata().state_dict_metadata
    for mine, group in zip(optimizer.param_groups, own["param_groups"], strict=True):
        for param, name in zip(mine["params"], group["params"], strict=True):
            for role in AVERAGES:
                stored: Any = saved.get(f"optimizer.state.{name}.{role}")
                if stored is not None:
                    part = torch.empty_like(dtensor.local(param), dtype=stored.properties.dtype)
                    state[name][role] = dtensor.to_whole(param, part)
    load({"optimizer": {"state": state}}, storage_reader=reader)
    return {"state": state, "param_groups": _read_groups(source)}


def _read_groups(source: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = _read_folder(source, "optimizer.param_groups")["optimizer"]["param_groups"]
    return groups


def read_weights(source: Path) -> dict[str, Tensor]:
    """Reads all weights of a file, or of a folder of torch.distributed.checkpoint, into CPU memory."""
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
    """Loads whole weights into a model, sharded or not. Every rank must have them and call this.

    Args:
        model: The model.
        weights: Weights by name. Names of adapter weights may omit the adapter's name, as peft saves them.

    Raises:
        ValueError: If a name is unknown, or a trainable parameter is missing.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    known = {*model.state_dict(), *names}
    adapters: Any = getattr(model, "active_adapters", ())  # a property of peft's models, a method of all others
    if callable(adapters):
        adapters = adapters() if getattr(model, "_hf_peft_config_loaded", False) else ()
    short = {name.replace(f".{adapter}", ""): name for adapter in adapters for name in names}
    renamed = {name if name in known else short.get(name, name): value for name, value in weights.items()}
    unknown = sorted(renamed.keys() - known)
    loaded = {names[name] for name in renamed if name in names}  # tied weights are saved under one of their names
    missing = sorted(name for name, param in names.items() if param.requires_grad and param not in loaded)
    if unknown or missing:
        raise ValueError(
            f"the saved weights do not fit the model: unknown names are {unknown[:3]}, missing are {missing[:3]}; "
            "resume with the model, the adapters and the kind of state dict that wrote the checkpoint"
        )
    if not any(dtensor.is_sharded(param) for param in names.values()):
        model.load_state_dict(renamed, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(renamed), options=StateDictOptions(full_state_dict=True, strict=False))


def _read_folder(source: Path, *keys: str) -> dict[str, Any]:
    """Reads a folder of torch.distributed.checkpoint on this rank alone: all of it, or the part under the keys."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(source), planner=_EmptyStateDictLoadPlanner(keys or None), no_dist=True
    )
    return state
