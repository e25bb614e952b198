"""What an optimizer plans for each parameter, and how its state is saved and loaded."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap import checkpoint, schema, sharding
from hf_soap.background import Background
from hf_soap.blocks import Layout, Plan
from hf_soap.buckets import GroupCache, state_dtype
from hf_soap.checks import check_group_keys, check_learning_rate, check_number, check_pair
from hf_soap.failures import Failures
from hf_soap.guard import Guard
from hf_soap.owners import Ownership
from hf_soap.probe import Probe
from hf_soap.refreshes import Refreshes
from hf_soap.storage import COUNT

logger = logging.getLogger(__name__)


class PlannedOptimizer(torch.optim.Optimizer):
    """A torch optimizer that knows by which rule each parameter is updated, and what state that takes.

    Subclasses say which rule a tensor follows and how it is cut (:meth:`plan`). State is made at the first step, so
    that parameters may be moved, replaced or sharded after construction.

    Attributes:
        probe: Measures the steps; None measures nothing. It is not copied or saved.
    """

    config: type[schema.OptimizerConfig]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._made_for: dict[int, list[torch.Size]] = {}
        self._owner_of: dict[Tensor, int] = {}
        self.probe: Probe | None = None
        self._reset_cache()
        super().__init__(params, defaults)

    def _reset_cache(self) -> None:
        self._buckets: dict[tuple[int, int], GroupCache] = {}
        self._failures = Failures()
        self._background = Background(self._failures)
        self._owners: Ownership | None = None
        self._consolidated: dict[str, Any] | None = None
        self._guard = Guard()
        self._refreshes = Refreshes()

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out because a gradient was not finite, since construction or load."""
        self._refreshes.join()
        return self._guard.skipped()

    @property
    def failed_refreshes(self) -> int:
        """Factors that this rank has, whose basis or root could not be computed, since construction or load."""
        self._refreshes.join()
        return self._failures.count()

    def _settle(self) -> None:
        """Hears the verdict on the last step, where a device has kept it, and puts what follows behind refreshes."""
        self._refreshes.join()
        self._guard.settle()

    def plan(self, group: dict[str, Any], shape: Sequence[int], *, sharded: bool = False) -> Plan:
        """Returns rule and layout of a tensor in this param group, made from the current settings.

        Args:
            group: The param group.
            shape: Shape of the tensor, or of the largest part that a rank has of it.
            sharded: Whether it is such a part.
        """
        raise TypeError(f"{type(self).__name__} plans nothing; use SOAP or another subclass of BlockOptimizer")

    def plan_of(self, group: dict[str, Any], param: Tensor) -> Plan:
        """Returns rule and layout of what this rank steps of a parameter: its part, or all where it has an owner.

        Ranks decide alike, by the largest part: a smaller one is padded to the same blocks.
        """
        shard = sharding.shard_of(param)
        if math.prod(sharding.stack_sizes(param)) == 1 or self.owned(group, param):
            return self.plan(group, shard.whole)
        plan = self.plan(group, shard.largest, sharded=True)
        if plan.entrywise:
            size = shard.size or (1,)
            return replace(plan, layout=Layout(size, (1,) * len(size), size, ()))
        return replace(plan, layout=plan.layout.fitted(shard.largest, shard.size))

    def owned(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether one rank preconditions the whole of a parameter for all."""
        if group["shard_mode"] != "owner" or sharding.ranks() == 1 or not param.numel():
            return False
        plan = self.plan(group, param.shape)
        return not (sharding.is_sharded(param) and plan.rule.elementwise(plan.layout))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, also after the first step; its settings are checked like the constructor's.

        Raises:
            ValueError: If a setting is wrong, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._made_for[len(self.param_groups) - 1] = [param.shape for param in group["params"]]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group_keys(group, self.defaults)
        check_learning_rate(group["lr"])
        check_number("weight_decay", group["weight_decay"])
        beta1, beta2 = check_pair("betas", group["betas"])
        names = schema.option_fields(self.config)
        values = {key: value for key, value in group.items() if key in names}
        schema.check_values(self.config, {**values, "beta1": beta1, "beta2": beta2})
        for param in group["params"]:
            sharding.check_placements(param)
            # Frozen weights of a quantised model may be integers; they never reach a step.
            if param.is_complex() or (param.requires_grad and not param.is_floating_point()):
                raise ValueError(
                    f"parameters must be real floating point, got {param.dtype} of shape {tuple(param.shape)}; "
                    "hold a complex weight as torch.view_as_real(weight)"
                )

    def _trainable(self) -> Iterator[tuple[int, dict[str, Any], dict[int, Tensor]]]:
        """Yields (number, group, trainable parameters by their place in the optimizer)."""
        first = 0
        for number, group in enumerate(self.param_groups):
            # Counted with the frozen ones: thawing one must move no other's refreshes and background work.
            yield number, group, {first + i: p for i, p in enumerate(group["params"]) if p.requires_grad}
            first += len(group["params"])

    def _find_owners(self) -> Ownership | None:
        """Says who preconditions what; None where every rank steps what it has."""
        if sharding.ranks() == 1 or all(group["shard_mode"] != "owner" for group in self.param_groups):
            return None
        listed = [(group, param) for _, group, places in self._trainable() for param in places.values()]
        if self._owners is None or not self._owners.fits([param for _, param in listed]):
            params, loads = [], []
            for group, param in listed:
                if self.owned(group, param):
                    params.append(param)
                    loads.append((self.plan_of(group, param).work(), self._bytes_of(group, param)))
            dtypes = [state_dtype(param) for param in params]
            among = [param for _, param in listed]
            self._owners = Ownership(params, loads, dtypes, among=among, known=self._owner_of)
            self._owner_of |= self._owners.owner
            self._buckets.clear()
        return self._owners

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        # A view is pickled with its whole stack, once for each parameter in it.
        state = checkpoint.detach_state(super().__getstate__())
        return {**state, "state": defaultdict(dict, state["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A load comes by here too, and changes neither what this was made for nor who owns and measures it.
        self.__dict__.setdefault("_made_for", {})
        self.__dict__.setdefault("_owner_of", {})
        self.__dict__.setdefault("probe", None)
        self._reset_cache()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state: flat tensors by role for each parameter, and the param groups.

        Of sharded parameters it is made of DTensors; with ``shard_mode="owner"`` all ranks must call this together.

        The tensors are copies: the optimizer holds views of stacks, and saving one would write its whole stack.
        """
        self._settle()
        if self._consolidated is not None:
            return self._consolidated
        if self.state and self.spreads_state():
            raise RuntimeError(
                "the state of whole parameters lies with their owners, wanted on one rank: call consolidate() on all "
                "ranks before state_dict(), as SoapTrainer does; the plain Trainer cannot save shard_mode='owner' "
                "under DDP"
            )
        return self._packed_state(to_first=False)

    def consolidate(self) -> None:
        """Brings the state that owners hold to rank 0, whose next :meth:`state_dict` returns it; a step drops it.

        Only for ``shard_mode="owner"`` with whole parameters (DDP); all ranks must call it.
        """
        self._settle()
        if self.spreads_state():
            self._consolidated = self._packed_state(to_first=True)

    def spreads_state(self) -> bool:
        """Whether owners hold state of parameters that are not sharded."""
        owners = self._find_owners()
        return owners is not None and any(not sharding.is_sharded(param) for param in owners.owner)

    def _packed_state(self, *, to_first: bool) -> dict[str, Any]:
        plain = super().state_dict()
        owners, state = self._find_owners(), {}
        for saved, group in zip(plain["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved["params"], group["params"], strict=True):
                if key not in plain["state"]:
                    continue
                plan, wanted, known = self.plan_of(group, param), self._wanted_state(group, param), plain["state"][key]
                owner = self._owner_of.get(param) if owners is not None else None
                if owner is None:
                    state[key] = checkpoint.packed(param, plan, known, wanted)
                else:
                    state[key] = checkpoint.packed_of_owner(param, plan, known, wanted, owner, to_first=to_first)
        return {**plain, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state by copying it, in the dtype it was saved in.

        The learning rate comes from the checkpoint, as a scheduler expects; all other settings stay as they are now.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the groups, a parameter's roles or a shape differ from what the current settings need.
        """
        self._settle()
        # torch casts loaded state to the parameter's dtype, which would round float32 factors of a bf16 model.
        groups = checkpoint.groups_to_load(self.param_groups, state_dict)
        restored, estimated = {}, 0
        self._find_owners()
        for group, param, saved in checkpoint.saved_state(self.param_groups, state_dict):
            plan, wanted, whole = (
                self.plan_of(group, param),
                self._wanted_state(group, param),
                self.owned(group, param),
            )
            if whole:
                saved = checkpoint.gathered(saved)
            if whole and self._owner_of.setdefault(param, 0) != sharding.rank():  # 0 takes what is frozen
                restored[param] = {"step": torch.as_tensor(saved["step"]).max().to(COUNT).cpu()}
                continue
            restored[param], guessed = checkpoint.restored(param, plan, saved, wanted, whole=whole)
            estimated += guessed
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(groups)
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor) and isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(float(group["lr"]))  # whoever holds it goes on with it
        self.state.update(restored)
        if estimated and sharding.rank() == 0:
            logger.warning(
                "%d parameters were saved in other parts (another number of ranks or block size). Momentum carries "
                "over; factors are put together from the old parts, and second moments estimated from them.",
                estimated,
            )

    def fits(self, saved: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
        """Whether state of these shapes was saved by as many ranks and in the same parts as there are now.

        Args:
            saved: Shapes by name of the parameter and role.
        """
        own = [
            checkpoint.packed_shapes(
                param, self.plan_of(group, param), self._wanted_state(group, param), whole=self.owned(group, param)
            )
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        return sorted(sorted(one.items()) for one in own) == sorted(sorted(one.items()) for one in saved.values())

    def _wanted_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """Shapes and dtypes of the state of this rank's part of a parameter, on the meta device."""
        return planned_state(self.plan_of(group, param), param)

    def state_bytes(self) -> int:
        """Returns the bytes of state of all trainable parameters on this rank, whether it was made already or not."""
        return sum(self.state_bytes_of_parameters().values())

    def state_bytes_of_parameters(self) -> dict[Tensor, int]:
        """Returns the bytes of state that this rank keeps of each trainable parameter; see :meth:`state_bytes`."""
        owners = self._find_owners()
        octets = {}
        for _, group, places in self._trainable():
            for param in places.values():
                if owners is not None and param in owners.owner:
                    octets[param] = self._bytes_of(group, param) if owners.owns(param) else COUNT.itemsize
                elif sharding.local(param).numel():
                    octets[param] = self._bytes_of(group, param)
        return octets

    def _bytes_of(self, group: dict[str, Any], param: Tensor) -> int:
        return bytes_of(self._wanted_state(group, param))


def planned_state(plan: Plan, param: Tensor) -> dict[str, Tensor]:
    """Returns shapes and dtypes, on the meta device, of the state that a plan keeps of a parameter."""
    device = torch.device("meta")
    state = plan.allocate(1, dtype=state_dtype(param), device=device)
    return {**state, "step": torch.zeros((), dtype=COUNT, device=device)}


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """Returns the size of tensors."""
    return sum(value.numel() * value.element_size() for value in state.values())
