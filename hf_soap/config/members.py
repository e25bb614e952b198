"""The parameters of an optimizer, each with the settings that hold for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soap.distributed import dtensor

OVERRIDES = "overrides"
"""Entry of a param group: for each of its parameters the settings that differ from the group's."""

OF_GROUPS = {
    *("lr", "weight_decay", "lr_1d", "weight_decay_1d", "nonfinite", "max_skipped_in_a_row", "shard_mode", "exact"),
    "variant",
    *("foreach", "fused", "differentiable"),
}
"""Settings that all parameters of a group share: they are read for the group, or for the whole step."""

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
        """Whether another roster has the same trained parameters in the same groups and places."""
        pairs = zip(self.trained, other.trained, strict=False)
        return len(self.trained) == len(other.trained) and all(
            a.param is b.param and (a.place, a.number) == (b.place, b.number) for a, b in pairs
        )

    def same_settings(self, other: Roster) -> bool:
        """Whether another roster was read from the same parameters and settings."""
        return len(self._seen) == len(other._seen) and all(map(_alike, self._seen, other._seen))

    def _read(self, group: Mapping[str, Any]) -> Seen:
        params = list(group["params"])
        # Copies: lists and mappings may be changed in place.
        settings = [tuple(value) if type(value) is list else value for value in map(group.get, self._names)]
        overrides = [dict(own) for own in group.get(OVERRIDES) or ()]
        return params, [param.requires_grad for param in params], settings, overrides

    def _same(self, group: Mapping[str, Any], seen: Seen) -> bool:
        return _alike(self._read(group), seen)


Seen = tuple[list[Tensor], list[bool], list[Any], list[dict[str, Any]]]
"""What a group held: parameters, whether each is trained, settings, and what differs for each parameter."""


def _alike(one: Seen, other: Seen) -> bool:
    same = len(one[0]) == len(other[0]) and all(a is b for a, b in zip(one[0], other[0], strict=True))
    return same and one[1:] == other[1:]


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
        self._last: list[list[dict[str, Any]]] = []

    def add(self, group: dict[str, Any]) -> None:
        """Takes note of a new group, whose overrides are in order."""
        self._shapes.append([param.shape for param in group["params"]])
        self._last.append([])
        self._remember(len(self._shapes) - 1, group)

    def update(self, groups: Groups) -> None:
        """Takes note of replaced parameters, and puts the overrides of each group in their order.

        Args:
            groups: The param groups; their overrides may be changed.

        Raises:
            ValueError: If a parameter is a flat vector that DeepSpeed or FSDP1 has put in the place of others.
        """
        del self._shapes[len(groups) :], self._last[len(groups) :]
        for number, group in enumerate(groups):
            for param in group["params"]:
                dtensor.check_placements(param)
            shapes = [param.shape for param in group["params"]]
            if number == len(self._shapes):
                self._shapes.append(shapes)
                self._last.append([dict(own) for own in group.get(OVERRIDES) or ()])
            before = self._shapes[number]
            if shapes != before:
                self._refuse_flat_vectors(shapes, before)
                if group.get(OVERRIDES) and group[OVERRIDES] == self._last[number]:  # nobody gave others with them
                    group[OVERRIDES] = self._in_order(group)
                self._shapes[number] = shapes
            if len(group.get(OVERRIDES) or shapes) != len(shapes):
                raise ValueError(
                    f"{OVERRIDES} of param group {number} hold {len(group[OVERRIDES])} mappings, wanted one for each "
                    f"of its {len(shapes)} parameters; give them together with the parameters"
                )
            self._remember(number, group)

    def _in_order(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the overrides of each parameter; one that was not seen before has those of its place."""
        params, by_place = group["params"], group[OVERRIDES]
        place_counts = len(params) == len(by_place)
        return [
            dict(self._overrides.get(param, by_place[place] if place_counts else {}))
            for place, param in enumerate(params)
        ]

    def _remember(self, number: int, group: Mapping[str, Any]) -> None:
        self._vectors.update(param.shape for param in group["params"] if param.dim() < 2)
        self._last[number] = [dict(own) for own in group.get(OVERRIDES) or ()]
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
    of_parameters = [name for name in settings if name not in OF_GROUPS]
    unknown = sorted({str(key) for own in overrides for key in own} - {*of_parameters})
    if unknown:
        raise ValueError(
            f"{OVERRIDES} of a param group got {', '.join(unknown)}, wanted settings that parameters of a group may "
            f"have of their own: {', '.join(of_parameters)}; give a parameter a group for the others"
        )
