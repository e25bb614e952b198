"""The parameters of an optimizer, each with the settings that apply to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soap.config import options
from hf_soap.distributed import dtensor

OVERRIDES = "overrides"
"""Entry of a param group: for each of its parameters the settings that differ from the group's."""

OF_GROUPS = {
    *("lr", "weight_decay", "lr_1d", "weight_decay_1d", "nonfinite", "max_skipped_in_a_row", "shard_mode", "exact"),
    *("average_horizon", "average_start"),
    "variant",
    *("foreach", "fused", "differentiable"),
}
"""Settings that are read once for a group or for the whole step, so that all parameters of a group share them."""

OWN_RATES = ("lr_factor", "weight_decay", "lr_1d", "weight_decay_1d")
"""Entries of overrides that say how far a step goes: they are read at each step, like the group's.

``lr_factor`` multiplies the learning rate that a parameter would otherwise have.
"""

Groups = Sequence[dict[str, Any]]

RateSource = tuple[int, tuple[tuple[str, Any], ...]]
"""Where the rates of a parameter come from: the number of its group, and its :data:`OWN_RATES`."""


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter of an optimizer.

    Attributes:
        place: Its position among all parameters of the optimizer. Frozen ones count, so that unfreezing one does not
            move the refreshes and the background work of the others.
        number: Number of its param group.
        param: The parameter.
        settings: The group's settings, overridden by those of the parameter. The learning rate, and all else that a
            scheduler may change at each step, is read from the group instead.
        own: What it overrides.
        rates: Where its learning rate and weight decay come from.
        name: Its name in error messages.
    """

    place: int
    number: int
    param: Tensor
    settings: dict[str, Any]
    own: Mapping[str, Any]
    rates: RateSource
    name: str


class Roster:
    """The parameters of an optimizer, valid while groups, parameters and settings do not change.

    Attributes:
        members: All parameters.
        trained: The parameters that require gradients.
    """

    def __init__(self, groups: Groups, names: Sequence[str]) -> None:
        """Reads the groups.

        Args:
            groups: Param groups; the overrides of each are in the order of its parameters.
            names: The settings that decide how a parameter is updated.
        """
        self._names = names
        self._seen = [self._read(group) for group in groups]
        self.members = list(_members(groups))
        self.trained = [member for member in self.members if member.param.requires_grad]

    def fits(self, groups: Groups) -> bool:
        """Whether the groups have not changed since."""
        if len(groups) != len(self._seen):
            return False
        for group, (params, trained, settings, overrides) in zip(groups, self._seen, strict=True):
            now = group["params"]
            if len(now) != len(params) or any(a is not b for a, b in zip(now, params, strict=True)):
                return False
            if any(param.requires_grad is not flag for param, flag in zip(now, trained, strict=True)):
                return False
            found = [tuple(value) if type(value) is list else value for value in map(group.get, self._names)]
            if found != settings or [*(group.get(OVERRIDES) or ())] != overrides:
                return False
        return True

    def same_parameters(self, other: Roster) -> bool:
        """Whether another roster has the same trained parameters, in the same groups and positions."""
        pairs = zip(self.trained, other.trained, strict=False)
        return len(self.trained) == len(other.trained) and all(
            a.param is b.param and (a.place, a.number) == (b.place, b.number) for a, b in pairs
        )

    def same_settings(self, other: Roster) -> bool:
        """Whether another roster was read from the same parameters and settings."""
        return len(self._seen) == len(other._seen) and all(map(_is_same, self._seen, other._seen))

    def _read(self, group: Mapping[str, Any]) -> Seen:
        params = list(group["params"])
        # Copies: lists and mappings may be changed in place.
        settings = [tuple(value) if type(value) is list else value for value in map(group.get, self._names)]
        overrides = [deepcopy(dict(own)) for own in group.get(OVERRIDES) or ()]
        return params, [param.requires_grad for param in params], settings, overrides


Seen = tuple[list[Tensor], list[bool], list[Any], list[dict[str, Any]]]
"""Contents of a group: parameters, whether each is trained, settings, and the overrides of each parameter."""


def _is_same(one: Seen, other: Seen) -> bool:
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
            rates = number, tuple((key, own[key]) for key in OWN_RATES if key in own)
            yield Member(place, number, param, {**common, **own} if own else common, own, rates, name)
            place += 1


class Registered:
    """The shapes and settings of all parameters, as they were at the last check.

    Parameters may be replaced at any time: by their shards (accelerate under FSDP2), by those of another block
    (block-wise training), by pruned ones. Only flat vectors in place of matrices are refused.
    """

    def __init__(self) -> None:
        self._shapes: list[list[torch.Size]] = []
        self._params: list[list[int]] = []  # their identities; a new object at an old address has taken its place
        self._vectors: set[torch.Size] = set()
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._last: list[list[dict[str, Any]]] = []

    def add(self, group: dict[str, Any]) -> None:
        """Records a new group, whose overrides are in the order of its parameters."""
        self._shapes.append([param.shape for param in group["params"]])
        self._params.append([id(param) for param in group["params"]])
        self._last.append([])
        self._remember(len(self._shapes) - 1, group)

    def update(self, groups: Groups) -> None:
        """Records replaced parameters, and sorts the overrides of each group to match them.

        Args:
            groups: The param groups; their overrides may be modified.

        Raises:
            ValueError: If DeepSpeed or FSDP1 has replaced parameters by a flat vector.
        """
        del self._shapes[len(groups) :], self._params[len(groups) :], self._last[len(groups) :]
        for number, group in enumerate(groups):
            for param in group["params"]:
                dtensor.check_placements(param)
            shapes = [param.shape for param in group["params"]]
            if number == len(self._shapes):
                self._shapes.append(shapes)
                self._params.append([id(param) for param in group["params"]])
                self._last.append([dict(own) for own in group.get(OVERRIDES) or ()])
            before, params = self._shapes[number], [id(param) for param in group["params"]]
            if shapes != before:
                self._refuse_flat_vectors(shapes, before)
                self._shapes[number] = shapes
            if params != self._params[number]:
                self._params[number] = params
                if (
                    group.get(OVERRIDES) and group[OVERRIDES] == self._last[number]
                ):  # the overrides were not replaced too
                    group[OVERRIDES] = self._in_order(group)
            if len(group.get(OVERRIDES) or shapes) != len(shapes):
                raise ValueError(
                    f"{OVERRIDES} of param group {number} has {len(group[OVERRIDES])} mappings, wanted one for each "
                    f"of its {len(shapes)} parameters; set both at the same time"
                )
            self._remember(number, group)

    def _in_order(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the overrides of each parameter; a new parameter takes those of its position."""
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
                f"got a parameter of shape {tuple(flat[0])} in place of one of shape {tuple(want)}, wanted matrices "
                "or shards of them: DeepSpeed and FSDP1 replace matrices by flat vectors, on which the optimizer can "
                "only be Adam; use FSDP2 (fully_shard) or DDP. If these vectors are parameters of the model, pass "
                "them to add_param_group, or create a new optimizer"
            )


def check_overrides(group: Mapping[str, Any], settings: Collection[str]) -> None:
    """Checks that a group's overrides are one mapping of settings for each parameter.

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
    rates = ["lr_factor", *(name for name in settings if name in OWN_RATES)]
    of_parameters = [*rates, *(name for name in settings if name not in OF_GROUPS)]
    unknown = sorted({str(key) for own in overrides for key in own} - {*of_parameters})
    if unknown:
        raise ValueError(
            f"{OVERRIDES} of a param group got {', '.join(unknown)}, wanted settings that may differ between the "
            f"parameters of a group: {', '.join(of_parameters)}; for other settings, use a separate group"
        )
    for own in overrides:
        options.check_number("lr_factor", own.get("lr_factor", 1.0), options.POSITIVE)
