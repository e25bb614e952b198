"""The parameters of an optimizer, each with the settings that hold for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soap import sharding

OVERRIDES = "overrides"
"""Entry of a param group: for each of its parameters the settings that differ from the group's."""

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter of an optimizer.

    Attributes:
        place: Its place among all parameters of the optimizer, frozen ones counted: thawing one must move no other's
            refreshes and background work.
        number: Number of its param group.
        param: The parameter.
        settings: The group's settings with those of the parameter in their place. The learning rate and all that a
            scheduler may change at each step are read from the group instead.
        name: What errors call it.
    """

    place: int
    number: int
    param: Tensor
    settings: dict[str, Any]
    name: str


class Roster:
    """The parameters of an optimizer, as long as groups, parameters and settings stay what they are.

    Attributes:
        members: All parameters.
        trained: Those that are trained.
    """

    def __init__(self, groups: Groups, names: Sequence[str]) -> None:
        """Reads the groups.

        Args:
            groups: Param groups whose overrides are in order.
            names: Settings that decide how a parameter is stepped.
        """
        self._names = names
        self._seen = [self._read(group) for group in groups]
        self.members = list(_members(groups))
        self.trained = [member for member in self.members if member.param.requires_grad]

    def fits(self, groups: Groups) -> bool:
        """Whether nothing has changed in the groups."""
        return len(groups) == len(self._seen) and all(map(self._same, groups, self._seen))

    def same_parameters(self, other: Roster) -> bool:
        """Whether another roster has the same trained parameters in the same order."""
        pairs = zip(self.trained, other.trained, strict=False)
        return len(self.trained) == len(other.trained) and all(a.param is b.param for a, b in pairs)

    def _read(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        params = list(group["params"])
        flags = [param.requires_grad for param in params]
        return params, flags, tuple(map(group.get, self._names)), list(group.get(OVERRIDES) or ())

    def _same(self, group: Mapping[str, Any], seen: tuple[Any, ...]) -> bool:
        params, flags, settings, overrides = seen
        now = group["params"]
        return (
            len(params) == len(now)
            and all(a is b for a, b in zip(params, now, strict=True))
            and flags == [param.requires_grad for param in now]
            and settings == tuple(map(group.get, self._names))
            and overrides == list(group.get(OVERRIDES) or ())
        )


def _members(groups: Groups) -> Iterator[Member]:
    place = 0
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        overrides = group.get(OVERRIDES) or ()
        common = {key: value for key, value in group.items() if key not in ("params", "param_names", OVERRIDES)}
        for index, param in enumerate(group["params"]):
            own = overrides[index] if overrides else {}
            name = names[index] if index < len(names) else f"parameter {index} of group {number}"
            yield Member(place, number, param, {**common, **own} if own else common, name)
            place += 1


class Registered:
    """What the groups held when they were last looked at: shapes, and the settings of each parameter.

    Parameters may be replaced by others at any time: by shards of them (accelerate under FSDP2), by those of another
    block (block-wise training), by pruned ones. Only flat vectors in the place of matrices are refused.
    """

    def __init__(self) -> None:
        self._shapes: list[list[torch.Size]] = []
        self._vectors: set[torch.Size] = set()
        self._overrides: dict[Tensor, dict[str, Any]] = {}

    def add(self, group: dict[str, Any]) -> None:
        """Takes note of a new group, whose overrides are in order."""
        self._shapes.append([param.shape for param in group["params"]])
        self._remember(group)

    def update(self, groups: Groups) -> None:
        """Takes note of replaced parameters, and puts the overrides of each group in their order.

        Args:
            groups: The param groups; their overrides may be changed.

        Raises:
            ValueError: If a parameter is a flat vector that DeepSpeed or FSDP1 has put in the place of others.
        """
        del self._shapes[len(groups) :]
        for number, group in enumerate(groups):
            for param in group["params"]:
                sharding.check_placements(param)
            shapes = [param.shape for param in group["params"]]
            if number == len(self._shapes):
                self._shapes.append(shapes)
            before = self._shapes[number]
            if shapes != before:
                self._refuse_flat_vectors(shapes, before)
                if group.get(OVERRIDES):
                    group[OVERRIDES] = [dict(self._overrides.get(param, {})) for param in group["params"]]
                self._shapes[number] = shapes
            self._remember(group)

    def _remember(self, group: Mapping[str, Any]) -> None:
        self._vectors.update(param.shape for param in group["params"] if param.dim() < 2)
        if group.get(OVERRIDES):
            self._overrides.update(zip(group["params"], group[OVERRIDES], strict=True))

    def _refuse_flat_vectors(self, now: Sequence[torch.Size], before: Sequence[torch.Size]) -> None:
        had_matrices = any(len(shape) > 1 for shape in before)
        flat = [shape for shape in now if shape not in self._vectors]
        if had_matrices and flat and all(len(shape) == 1 for shape in now):
            want = next(shape for shape in before if len(shape) > 1)
            raise ValueError(
                f"got a parameter of shape {tuple(flat[0])} in the place of one of shape {tuple(want)}, wanted "
                "matrices or shards of them: DeepSpeed and FSDP1 put flat vectors there, on which the optimizer could "
                "only be Adam; use FSDP2 (fully_shard) or DDP. If these vectors are parameters of the model, give "
                "them to add_param_group, or make the optimizer anew"
            )


def check_overrides(group: Mapping[str, Any], settings: Collection[str]) -> None:
    """Checks that a group's overrides name settings, a mapping for each parameter.

    Args:
        group: The param group.
        settings: Names of the optimizer's settings.

    Raises:
        ValueError: If they do not.
    """
    overrides = group.get(OVERRIDES)
    if not overrides:
        return
    if len(overrides) != len(group["params"]) or not all(isinstance(own, Mapping) for own in overrides):
        raise ValueError(
            f"{OVERRIDES} of a param group must hold one mapping of settings for each of its "
            f"{len(group['params'])} parameters, got {overrides!r}"
        )
    unknown = sorted({str(key) for own in overrides for key in own} - {*settings})
    if unknown:
        raise ValueError(
            f"{OVERRIDES} of a param group got {', '.join(unknown)}, wanted settings of the optimizer: "
            f"{', '.join(settings)}"
        )
