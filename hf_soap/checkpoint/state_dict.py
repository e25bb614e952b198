"""What a state dict holds and how it is loaded.

A checkpoint holds flat tensors and plain numbers per parameter, keyed by role. It does not depend on how state was
stacked in memory.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_soap.checkpoint import reshard
from hf_soap.checkpoint.checks import check_state
from hf_soap.config.members import OVERRIDES, Member
from hf_soap.distributed import dtensor, owners
from hf_soap.linalg.precision import float32_products
from hf_soap.rules.base import AT_AVERAGE, AVERAGE, AVERAGED, AVERAGES, LAYOUT, RAW_PARAM, Rule, StateSpec
from hf_soap.rules.layout import Layout, uncut
from hf_soap.rules.storage import COUNT, Storage, decoded, is_own

logger = logging.getLogger(__name__)

RATES = ("lr", "initial_lr")
"""Group entries that come from the checkpoint: a scheduler continues from them."""

CYCLED = "max_momentum"
"""Group entry of OneCycleLR and CyclicLR if they change the first beta, or else the momentum, at each step."""

NAMES = "param_names"


class StatePlan(Protocol):
    """What the saved state of a tensor depends on."""

    @property
    def rule(self) -> Rule:
        """The rule that the state belongs to."""

    @property
    def layout(self) -> Layout:
        """How the tensor is cut."""

    @property
    def entrywise(self) -> bool:
        """Whether all state has the tensor's own shape and coordinates, so that it can be resharded exactly."""

    @property
    def state_spec(self) -> dict[str, StateSpec]:
        """Specs of the state by role."""

    @property
    def state_format(self) -> Storage:
        """How the state is stored between steps."""

    def computed(self, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns new state by role for a number of tensors, in the form that the rule computes with."""


def detach_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns ``state_dict`` with copies in place of all state tensors of this package, which are views of stacks."""
    state = {
        key: {role: _detached(role, value) for role, value in entry.items()} if isinstance(key, Tensor) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _detached(role: Any, value: Any) -> Any:
    return value.clone() if is_own(role) and isinstance(value, Tensor) else value


def packed_averages(param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a parameter with copies of its average and its raw weights, sharded like the parameter."""
    return {k: dtensor.to_whole(param, v.clone()) if k in AVERAGES else v for k, v in entry.items()}


def saved_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns param groups with None for empty overrides: torch.distributed.checkpoint saves no empty mappings."""
    return [
        {**group, OVERRIDES: [own or None for own in group[OVERRIDES]]} if group.get(OVERRIDES) else group
        for group in groups
    ]


def regrouped(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict with the groups of an optimizer: as many parameters in each, in the same order.

    Checkpoints of version 0.1.0 have a group for each rule; names say which parameter is which.

    Args:
        groups: The optimizer's param groups.
        state_dict: What was saved.

    Returns:
        The state dict itself if the groups match already.

    Raises:
        ValueError: If the number or sizes of the groups differ, and the names do not match.
    """
    saved = state_dict["param_groups"]
    got, want = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if got == want:
        return state_dict
    where = {name: (key, old) for old in saved for name, key in zip(old.get(NAMES, ()), old["params"], strict=False)}
    names = [name for group in groups for name in group.get(NAMES, ())]
    if not (len(names) == len(set(names)) == len(where) == sum(want) == sum(got) and where.keys() == set(names)):
        raise ValueError(
            f"the checkpoint has param groups of {got} parameters, wanted groups of {want} as in this optimizer; "
            "load it with the same model and the same grouping options in optim_args"
        )
    arranged = []
    for group in groups:
        members = [where[name] for name in group.get(NAMES, ())]
        settings = members[0][1] if members else saved[0]
        keys = [key for key, _ in members]
        arranged.append({**settings, "params": keys, **({NAMES: list(group[NAMES])} if NAMES in group else {})})
    return {**state_dict, "param_groups": arranged}


def merged_groups(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]], settings: Collection[str]
) -> list[dict[str, Any]]:
    """Returns saved groups with the current settings instead of the saved ones.

    Learning rates and other entries of schedulers come from the checkpoint, since a scheduler continues from them.

    Args:
        groups: The optimizer's param groups.
        saved: Equally many saved groups.
        settings: Names of the optimizer's settings.
    """
    merged = []
    for old, new in zip(saved, groups, strict=True):
        kept = {*settings, NAMES, OVERRIDES} - {*RATES}
        saved_only = {*old, "params", AVERAGED, AT_AVERAGE}  # present averages are replaced by the saved ones
        current = {k: v for k, v in new.items() if k in kept or k not in saved_only}
        if CYCLED in old and "betas" in old and "betas" in new:
            current["betas"] = (old["betas"][0], *new["betas"][1:])
        elif CYCLED in old and "momentum" in old and "betas" not in new:
            current["momentum"] = old["momentum"]
        changed = {k: (old[k], v) for k, v in current.items() if k in old and _plain(old[k]) != _plain(v)}
        if changed:
            words = ", ".join(f"{key}={value!r} (saved {before!r})" for key, (before, value) in changed.items())
            logger.info("These settings differ from the checkpoint; the current ones are used: %s", words)
        dropped = (OVERRIDES,) if new["average_horizon"] else (OVERRIDES, AVERAGED)
        merged.append({**{k: v for k, v in old.items() if k not in dropped}, **current})
    return merged


def saved_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> Iterator[tuple[Tensor, Any, dict[str, Any]]]:
    """Yields (parameter, key in the state dict, saved state by role) for parameters with state of this package."""
    for old, new in zip(state_dict["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            saved = {role: value for role, value in state_dict["state"].get(key, {}).items() if is_own(role)}
            if saved:
                yield param, key, saved


def restored_averages(members: Sequence[Member], state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
    """Returns copies of this rank's parts of saved averages and raw weights.

    All ranks that share parameters must call this together.

    Args:
        members: The parameters. Where averaging is off now, only raw weights are returned.
        state_dict: What was saved, with as many parameters in the same order.

    Returns:
        Tensors by parameter and role.

    Raises:
        ValueError: If a shape differs.
    """
    found: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, member in zip(keys, members, strict=True):
        saved, param = state_dict["state"].get(key, {}), member.param
        for role in AVERAGES:
            if role in saved and (role == RAW_PARAM or member.settings["average_horizon"]):
                check_state({role: saved[role]}, {role: param}, member.name, tuple(param.shape))
                found[param][role] = dtensor.part_of(param, saved[role])
    before = any(AVERAGE in state_dict["state"].get(key, {}) for key in keys)
    now = any(member.settings["average_horizon"] for member in members)
    if dtensor.rank() == 0 and state_dict["state"] and before != now:
        logger.warning(
            "The checkpoint has no averages of the weights: they start from the loaded weights."
            if now
            else "The checkpoint has averages of the weights, which average_horizon=0 drops: training continues from "
            "the raw weights."
        )
    return found


def refuse_state_of_others(state_dict: dict[str, Any], members: Sequence[Member]) -> None:
    """Rejects a state dict that has state of the parameters, but none of this package.

    Raises:
        ValueError: If another optimizer saved it.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, member in zip(keys, members, strict=True):
        if known := state_dict["state"].get(key):
            check_state(known, {"step": torch.empty((), device="meta")}, member.name, tuple(member.param.shape))


def refuse_float8(state_dict: dict[str, Any]) -> None:
    """Rejects state with 8-bit moments, which development versions before 0.1.0 could save.

    Raises:
        ValueError: If a param group was saved with ``state_dtype="float8"``.
    """
    if any(group.get("state_dtype") == "float8" for group in state_dict["param_groups"]):
        raise ValueError(
            "the checkpoint was saved with state_dtype='float8', which no longer exists; wanted float32 or bfloat16. "
            "With the version of hf_soap that wrote it, load it into an optimizer with state_dtype='bfloat16' and "
            "save that; or start without the optimizer's state"
        )


def foreign_state(state: Mapping[Any, Any], ours: Collection[Any]) -> dict[Any, Any]:
    """Returns the rest of the state of a state dict: entries of wrappers, which torch keeps itself.

    Args:
        state: The state.
        ours: Keys of the parameters that have state of this package.
    """
    foreign: dict[Any, Any] = {}
    for key, entry in state.items():
        rest = entry
        if isinstance(entry, Mapping):
            rest = {k: v for k, v in entry.items() if not (k in AVERAGES or (key in ours and is_own(k)))}
        if key not in ours or rest:
            foreign[key] = rest
    return foreign


def is_of_family(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether param groups were saved by an optimizer of this package."""
    return all("rule" in group and "shard_mode" in group for group in groups)


def packed(param: Tensor, plan: StatePlan, state: dict[str, Any], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Returns a copy of a parameter's state that any number of ranks can load.

    Args:
        param: The parameter.
        plan: How this rank's part of it is cut.
        state: Its state by role; a rank with an empty part of a sharded parameter holds only ``step``.
        wanted: Tensors with the shapes of all roles.

    Returns:
        State by role. State in the tensor's coordinates has its shape. Other state of a sharded parameter is stacked
        over the ranks, see :func:`hf_soap.distributed.dtensor.to_stack`, with a role that says how each part was cut.
    """
    part, whole = dtensor.local(param), plan.entrywise
    saved: dict[str, Any] = {}
    for role, like in wanted.items():
        value = state.get(role)
        if not isinstance(value, Tensor):
            value = torch.zeros(like.shape, dtype=like.dtype, device=part.device)
        if not dtensor.is_sharded(param):
            saved[role] = value.detach().clone()
        elif role == "step" and (whole or not dtensor.stack_sizes(param)):
            saved[role] = value.detach().clone()  # all ranks count alike, and any number of ranks may load it
        elif role == "step":
            saved[role] = dtensor.to_stack(param, value.detach().clone().to(part.device))
        elif whole:
            saved[role] = dtensor.to_whole(param, value.detach().clone().view(part.shape))
        else:
            saved[role] = dtensor.to_stack(param, value.detach().clone())
    if not whole:
        described = reshard.describe(dtensor.shard_of(param), plan.layout)
        several = bool(dtensor.stack_sizes(param))
        saved[LAYOUT] = dtensor.to_stack(param, described.to(part.device)) if several else described.to(part.device)
    return {**saved, **_foreign(state)}


def packed_of_owner(
    param: Tensor, plan: StatePlan, state: dict[str, Any], wanted: dict[str, Tensor], owner: int, *, to_first: bool
) -> dict[str, Any]:
    """Returns a copy of the state that one rank holds of a whole parameter; all ranks must call this.

    Args:
        param: The parameter.
        plan: How it is cut.
        state: Its state by role on its owner, elsewhere ``step`` alone.
        wanted: Tensors with the shapes of all roles.
        owner: The owner's rank.
        to_first: Send the state to rank 0 instead of distributing it over the ranks that share the parameter.

    Returns:
        State by role.
    """
    part = dtensor.local(param)
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
        saved[LAYOUT] = reshard.describe(_whole(param), plan.layout).to("cpu" if to_first else part.device)
    return {**saved, **_foreign(state)}


def _foreign(state: Mapping[str, Any]) -> dict[str, Any]:
    return {role: value for role, value in state.items() if not is_own(role)}


def _whole(param: Tensor) -> dtensor.Shard:
    shape = tuple(param.shape)
    return dtensor.Shard(shape, (0,) * len(shape), shape, shape)


def packed_shapes(
    param: Tensor, plan: StatePlan, wanted: dict[str, Tensor], *, whole: bool
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a parameter's saved state by role; ``whole`` says that it has an owner."""
    stack, entrywise = () if whole else dtensor.stack_sizes(param), plan.entrywise
    shapes = {role: (*stack, *like.shape) for role, like in wanted.items()}
    if entrywise and dtensor.is_sharded(param) and not whole:
        shapes = {role: () if role == "step" else tuple(param.shape) for role in shapes}
    if not entrywise:
        shapes[LAYOUT] = (*stack, *reshard.describe(dtensor.shard_of(param), plan.layout).shape)
    return shapes


@dataclass(frozen=True)
class Saved:
    """The saved state of a parameter, and the part that this rank needs.

    Attributes:
        member: The parameter.
        plan: How the part that this rank steps is cut.
        saved: Its saved state by role: plain tensors, or DTensors cut as by :func:`packed`.
        wanted: Tensors with the right shapes, by role.
        owner: The rank that needs all of it; None if each rank needs its part.
        bare: The plan of the whole parameter with the same settings but no factors, as for parts that are too thin for
            them.
    """

    member: Member
    plan: StatePlan
    saved: dict[str, Any]
    wanted: dict[str, Tensor]
    owner: int | None
    bare: StatePlan

    @property
    def cut(self) -> bool:
        """Whether this rank needs only a part of the state."""
        return self.owner is None and dtensor.is_sharded(self.member.param)

    @property
    def shard(self) -> dtensor.Shard:
        """The shard that this rank needs."""
        return dtensor.shard_of(self.member.param) if self.cut else _whole(self.member.param)

    @property
    def is_known(self) -> bool:
        """Whether the state says how it was cut, or is that of a parameter without factors."""
        if LAYOUT in self.saved:
            return True
        kept = self.bare.computed(1, dtype=torch.float32, device=torch.device("meta"))
        return "step" in self.saved and _sizes(self.saved) == _sizes(kept)

    def gathered(self) -> Saved:
        """Returns a copy with whole tensors instead of DTensors. All ranks must call this together."""
        whole = {k: dtensor.gathered(v) if isinstance(v, Tensor) else v for k, v in self.saved.items()}
        return replace(self, saved=whole)

    def counted(self) -> Saved:
        """Returns a copy with the step count as a whole tensor. All ranks must call this together."""
        step = self.saved.get("step")
        return (
            replace(self, saved={**self.saved, "step": dtensor.gathered(step)}) if isinstance(step, Tensor) else self
        )


def restored(jobs: Sequence[Saved], *, together: bool, ours: bool) -> tuple[dict[Tensor, dict[str, Any]], int]:
    """Returns copies of saved state on the devices of the parameters, in the saved dtypes.

    Before any rank gathers parts, all ranks agree on which state to reshard. Before any rank raises, all agree on
    errors, since an error may concern the part of one rank only.

    Args:
        jobs: The saved state of each parameter, in the same order on every rank.
        together: Whether ranks load together.
        ours: Whether an optimizer of this package saved it. State of another optimizer is never converted.

    Returns:
        State by parameter and role, and the number of parameters with estimated state, because it was cut differently.

    Raises:
        ValueError: If roles or shapes differ in a way that cannot be converted; on all ranks if they load together.
    """
    jobs = [job.counted() if together else job for job in jobs]
    found = [None if job.owner is not None else _as_it_was(job) for job in jobs]
    anew = [state is None for state in found]
    if together:
        anew = [any(flags) for flags in zip(*dtensor.from_all(anew), strict=True)]
    states: dict[Tensor, dict[str, Any]] = {}
    estimated, error = 0, None
    for job, state, is_cut_anew in zip(jobs, found, anew, strict=True):
        if is_cut_anew and together:
            job = job.gathered()
        if error is not None:
            continue  # other ranks wait for the gathering only
        try:
            states[job.member.param], guessed = _restored(job, state, ours=ours)
            estimated += guessed
        except (ValueError, LookupError, RuntimeError) as caught:
            error = caught if isinstance(caught, ValueError) else _misfit(job, caught)
    if together:
        dtensor.raise_together(error)
    elif error is not None:
        raise error
    return states, estimated


def _misfit(job: Saved, caught: Exception) -> ValueError:
    roles = ", ".join(f"{role} {tuple(getattr(value, 'shape', ()))}" for role, value in job.saved.items())
    shape = tuple(job.member.param.shape)
    error = ValueError(
        f"the optimizer state of {job.member.name}, of shape {shape}, cannot be assembled from {roles}: {caught}. "
        "Resume with the optimizer and the optim_args that wrote the checkpoint, or start without its state"
    )
    error.__cause__ = caught
    return error


def _restored(job: Saved, state: dict[str, Tensor] | None, *, ours: bool) -> tuple[dict[str, Any], bool]:
    param, plan, wanted, shard = job.member.param, job.plan, job.wanted, job.shard
    if job.owner is not None:
        if job.owner != dtensor.rank():
            return {"step": torch.as_tensor(job.saved["step"], device="cpu").max().to("cpu", COUNT)}, False
        state = _as_it_was(job)
    step = torch.as_tensor(job.saved.get("step", 0), device="cpu").max() if state is None else state.get("step")
    estimated = state is None and (LAYOUT in job.saved or not plan.entrywise)
    if state is None:
        if not (ours and job.is_known):
            check_state(job.saved, wanted, job.member.name, tuple(param.shape))
        pieces = _pieces(job)
        computed = plan.computed(1, dtype=torch.float32, device=torch.device("meta"))
        with float32_products(plan.layout.block, torch.device("cpu"), sides=plan.layout.sides):
            state = reshard.reshard(pieces, plan.rule, plan.layout, shard, {**computed, "step": wanted["step"]})
    part = dtensor.local(param)
    if not shard.numel and (job.cut or not param.numel()):
        return {} if step is None else {"step": step.to("cpu", COUNT)}, estimated
    state = plan.state_format.converted(state, wanted, plan.state_spec)
    check_state(state, wanted, job.member.name, tuple(param.shape))
    return {role: value.to("cpu" if role == "step" else part.device) for role, value in state.items()}, estimated


def _as_it_was(job: Saved) -> dict[str, Tensor] | None:
    """Returns this rank's part of saved state, or None if it was cut differently. No other rank is asked."""
    param, plan, wanted, cut = job.member.param, job.plan, job.wanted, job.cut
    own = reshard.describe(job.shard, plan.layout)
    entrywise, described = plan.entrywise, job.saved.get(LAYOUT)
    if described is not None:
        mine = _own_place(param, described) if cut else described
        if mine is None or mine.numel() != own.numel() or not torch.equal(mine.view(own.shape).cpu(), own):
            return None
    elif not entrywise and (cut or not _fits(job.saved, wanted)):
        return None
    state = {}
    for role, value in job.saved.items():
        if role == LAYOUT:
            continue
        like = wanted.get(role)
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        taken: Tensor | None = tensor
        if role == "step":
            own_count = _own_place(param, tensor) if cut and dtensor.stack_sizes(param) else None
            taken = tensor.max() if own_count is None else own_count  # several ranks may have saved one each
        elif cut:
            taken = _own_part(param, tensor) if entrywise else _own_place(param, tensor)
        elif entrywise and like is not None and tensor.numel() == like.numel():
            taken = tensor.reshape(like.shape)
        if taken is None:
            return None
        taken = taken.detach().clone()
        state[role] = taken.view(like.shape) if like is not None and taken.numel() == like.numel() else taken
    return state


def _fits(saved: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> bool:
    return _sizes(saved) == _sizes(wanted)


def _sizes(state: Mapping[str, Any]) -> dict[str, int]:
    sizes = {role: value.numel() if isinstance(value, Tensor) else 1 for role, value in state.items()}
    sizes.pop("step", None)  # each rank may have saved one
    return sizes


def _own_place(param: Tensor, value: Tensor) -> Tensor | None:
    """Returns this rank's place in stacked state, or None if it was not stacked over these ranks."""
    stack = dtensor.stack_sizes(param)
    if tuple(value.shape[: len(stack)]) != stack:
        return None
    if dtensor.is_sharded(value):
        part = dtensor.local(value)
        alone = math.prod(part.shape[: len(stack)]) == 1
        return part.reshape(part.shape[len(stack) :]) if alone else None
    return value[dtensor.place_in_stack(param)]


def _own_part(param: Tensor, value: Tensor) -> Tensor | None:
    """Returns this rank's part of state in the tensor's coordinates, or None if it has other coordinates."""
    if dtensor.is_sharded(value):
        alike = value.shape == param.shape and dtensor.local(value).shape == dtensor.local(param).shape
        return dtensor.local(value) if alike else None
    shard = dtensor.shard_of(param)
    if value.numel() != math.prod(shard.whole):
        return None
    return shard.of(value.reshape(shard.whole))


def _pieces(job: Saved) -> list[reshard.Piece]:
    """Returns the parts of saved state on the CPU. The parts of other ranks were gathered before."""
    param, saved = job.member.param, job.saved
    plain = {role: v if isinstance(v, Tensor) else torch.tensor(v, device="cpu") for role, v in saved.items()}
    plain = {role: value.detach().cpu() for role, value in plain.items()}
    described = plain.pop(LAYOUT, None)
    if described is None:  # the tensor was not cut, but its step counts may still be stacked
        layout = uncut(param.shape)
        state = {role: value.reshape(1, *layout.view) for role, value in plain.items() if role != "step"}
        state = decoded(state, {}, torch.float32)
        return [reshard.Piece(_whole(param), layout, {**state, "step": plain["step"].max()})]
    stack = described.shape[:-1]
    places = [tuple(place) for place in itertools.product(*(range(size) for size in stack))]
    return [
        reshard.understand(described[p], {role: value[p] for role, value in plain.items()}, job.plan.rule)
        for p in places
    ]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
