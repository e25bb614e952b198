"""The torch-facing class: settings, plans, saving and loading; its engine takes the steps."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap.checkpoint import state_dict as checkpoint
from hf_soap.config import options
from hf_soap.config.checks import check_group_keys, check_learning_rate, check_pair
from hf_soap.config.members import OVERRIDES, Member, RateSource, Registered, Roster, check_overrides
from hf_soap.distributed import dtensor
from hf_soap.distributed.owners import Ownership
from hf_soap.engine import averages
from hf_soap.engine.buckets import state_dtype
from hf_soap.engine.loop import Engine
from hf_soap.engine.plan import Plan
from hf_soap.engine.profiling import StepProfiler
from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.base import AT_AVERAGE, AVERAGED
from hf_soap.rules.layout import uncut
from hf_soap.rules.storage import COUNT, is_own

logger = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer in accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


class BlockOptimizer(torch.optim.Optimizer):
    """A torch optimizer that knows by which rule each parameter is updated, and what state that takes.

    Subclasses say which rule a tensor follows and how it is cut (:meth:`plan`). State is made at a parameter's first
    gradient, so that parameters may be moved, replaced or sharded after construction.

    Attributes:
        profiler: Measures the steps; None measures nothing. It is not copied or saved.
    """

    config: type[options.OptimizerConfig]
    read_at_each_step: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    """Settings that say how far a step goes, and not how: they may change at each step."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._registered = Registered()
        self._owner_of: dict[Tensor, int] = {}
        self.profiler: StepProfiler | None = None
        self._reset_cache()
        super().__init__(params, defaults)

    def _reset_cache(self) -> None:
        self._roster_cache: Roster | None = None
        self._owners: Ownership | None = None
        self._owners_roster: Roster | None = None
        self._consolidated: dict[str, Any] | None = None
        self._engine = Engine(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If the parameters hold averages; see :meth:`eval`.
            ValueError: If a gradient is sparse or complex, or a parameter has changed its shape since its state was
                made, before anything changed.
            FloatingPointError: If ``max_skipped_in_a_row`` steps in a row were skipped.
        """
        if self.at_average:
            raise RuntimeError(
                "got a step while the parameters hold the averages of their weights, wanted the raw weights; call "
                "train() of the optimizer before the forward pass"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        if engine.refreshes.in_progress:
            engine.refreshes.join()
        device = next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))
        with nullcontext() if self.profiler is None else self.profiler.stepping(device):
            consolidated, self._consolidated = self._consolidated, None  # a step that fails may change state too
            if not engine.step():
                self._consolidated = consolidated
        if engine.guard.in_a_row:
            engine.guard.raise_after_too_many(self.param_groups)
        return loss

    def know_grad_norm(self, params: Iterable[Tensor], norm: float | Tensor) -> None:
        """Tells the next step the norm of gradients, so that it need not check them for NaN and Inf.

        The Trainer's gradient clipping computes it anyway. Gradients that torch changes in place before the step are
        checked again. Changes through ``grad.data`` or numpy are not noticed.

        Args:
            params: The parameters with these gradients.
            norm: Their common norm, before or after clipping. If it is not finite, the step checks each gradient.
        """
        self._engine.guard.know_norm(params, norm)

    def eval(self) -> None:
        """Puts the averages of the weights into the parameters, to evaluate or save the model, until :meth:`train`.

        Without ``average_horizon``, before ``average_start`` and at a second call, nothing changes. Meanwhile a step
        is an error, and the state has the raw weights too. The Trainer calls this and :meth:`train` itself. ::

            optimizer.eval()
            evaluate(model)
            optimizer.train()

        With FSDP2, call ``reshard()`` of the model first: weights that a forward pass has gathered would stay in use.
        """
        self._exchange(average=True)

    def train(self) -> None:
        """Puts the raw weights back into the parameters, bit for bit; without :meth:`eval`, nothing changes."""
        self._exchange(average=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchange(self, *, average: bool, warns: bool = True) -> None:
        before = [group.get(AT_AVERAGE) for group in self.param_groups]
        averages.exchange(self, average=average, warns=warns)
        if before != [group.get(AT_AVERAGE) for group in self.param_groups]:
            self._consolidated = None

    @property
    def averages_weights(self) -> bool:
        """Whether any param group asks for averages of its weights."""
        return any(group["average_horizon"] for group in self.param_groups)

    @property
    def at_average(self) -> bool:
        """Whether parameters hold their averages."""
        return any(group.get(AT_AVERAGE) for group in self.param_groups)

    def restart_average(self) -> None:
        """Forgets the averages, because other weights were loaded into the parameters; averaging starts again."""
        averages.forget(self)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite, since construction or load."""
        self._engine.refreshes.join()
        return self._engine.guard.skipped

    @property
    def failed_refreshes(self) -> int:
        """Factors that this rank has, whose basis or root could not be computed, since construction or load."""
        self._engine.refreshes.join()
        return self._engine.failures.count()

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns rule and layout of a tensor, made from the current settings.

        Args:
            group: The settings that hold for it.
            shape: Shape of the whole tensor.
            part: Shape of the largest part that a rank has of it, where it is sharded: that is what is laid out.
        """
        raise TypeError(f"{type(self).__name__} plans nothing; use SOAP or another subclass of BlockOptimizer")

    def plan_of(self, settings: Mapping[str, Any], param: Tensor) -> Plan:
        """Returns rule and layout of what this rank steps of a parameter: its part, or all where it has an owner.

        Ranks decide alike, by the largest part: a smaller one is padded to the same blocks.

        Args:
            settings: The settings that hold for the parameter; see :meth:`members`.
            param: The parameter.
        """
        shard = dtensor.shard_of(param)
        if not dtensor.stack_sizes(param):
            return self.plan(settings, shard.whole)
        if self.owned(settings, param):
            return _of_parts(self.plan(settings, shard.whole))
        plan = _of_parts(self.plan(settings, shard.whole, part=shard.largest))
        if plan.entrywise:
            return replace(plan, layout=uncut(shard.size))
        return replace(plan, layout=plan.layout.fitted(shard.largest, shard.size))

    def owned(self, settings: Mapping[str, Any], param: Tensor) -> bool:
        """Whether one rank preconditions the whole of a parameter for all."""
        if settings["shard_mode"] != "owner" or dtensor.ranks() == 1 or not param.numel():
            return False
        plan = self.plan(settings, param.shape)
        return not (dtensor.is_sharded(param) and plan.traits.is_elementwise)

    def rates(self, group: Mapping[str, Any], plan: Plan) -> Rate:
        """Returns learning rate and weight decay of what a group's parameters with this plan do at the next step."""
        return group["lr"], group["weight_decay"]

    def rates_from(self, source: RateSource, plan: Plan) -> Rate:
        """Returns :meth:`rates`, with the entries of a parameter's overrides in place of the group's.

        Args:
            source: Where the rates come from; see :class:`hf_soap.config.members.Member`.
            plan: The plan of the parameter.
        """
        number, entries = source
        if not entries:
            return self.rates(self.param_groups[number], plan)
        own = dict(entries)
        factor = own.pop("lr_factor", 1.0)
        lr, decay = self.rates({**self.param_groups[number], **own}, plan)
        return lr * factor, decay

    def members(self) -> list[Member]:
        """Returns all parameters, frozen ones too, each with the settings that hold for it."""
        return self.roster().members

    def roster(self) -> Roster:
        """Returns the parameters as they are now.

        Raises:
            ValueError: If DeepSpeed or FSDP1 has put flat vectors in their place.
        """
        if self._roster_cache is None or not self._roster_cache.fits(self.param_groups):
            self._registered.update(self.param_groups)
            names = [name for name in self.defaults if name not in self.read_at_each_step]
            self._roster_cache = Roster(self.param_groups, names)
        return self._roster_cache

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, also after the first step; its settings are checked like the constructor's.

        Args:
            param_group: ``params``, and settings that differ from the constructor's. ``overrides`` may hold a mapping
                for each of its parameters, of settings that differ from the group's. ``lr_factor`` is among them, by
                which the learning rate is multiplied, and ``weight_decay``.

        Raises:
            ValueError: If a setting is wrong, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for counted in (AVERAGED, AT_AVERAGE):  # in a group of another optimizer, whose state this one does not have
            group.pop(counted, None)
        try:
            check_overrides(group, self.defaults)
            for own in group.get(OVERRIDES) or [dict[str, Any]()]:
                self._check_group({**group, **own})
                self._refuse_ignored(group, own)
        except Exception:
            self.param_groups.pop()
            raise
        self._registered.add(group)

    def _refuse_ignored(self, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Raises ValueError for options that the rule of a group or of single parameters does not read."""

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group_keys(group, self.defaults)
        check_learning_rate(group["lr"])
        options.check_number("weight_decay", group["weight_decay"])
        if group["differentiable"]:
            raise ValueError(
                f"got differentiable=True, wanted False: {type(self).__name__} changes state and weights in place"
            )
        names = options.option_fields(self.config)
        values = {key: value for key, value in group.items() if key in names}
        if "betas" in group:
            values["beta1"], values["beta2"] = check_pair("betas", group["betas"])
        options.check_values(self.config, values)
        if group["average_start"] and not group["average_horizon"]:
            raise ValueError(
                f"got average_start={group['average_start']} without average_horizon, wanted both or neither; set "
                "average_horizon to the number of steps to average over"
            )
        for param in group["params"]:
            dtensor.check_placements(param)
            # Frozen weights of a quantised model may be integers; they never reach a step.
            if param.is_complex() or (param.requires_grad and not param.is_floating_point()):
                raise ValueError(
                    f"parameters must be real floating point, got {param.dtype} of shape {tuple(param.shape)}; "
                    "hold a complex weight as torch.view_as_real(weight)"
                )

    def find_owners(self) -> Ownership | None:
        """Says who preconditions what; None where every rank steps what it has."""
        if dtensor.ranks() == 1 or all(group["shard_mode"] != "owner" for group in self.param_groups):
            return None
        roster = self.roster()
        trained = roster.trained
        if self._owners is not None and roster is not self._owners_roster:
            owned = [member.param for member in trained if self.owned(member.settings, member.param)]
            self._owners = self._owners if self._owners.owns_exactly(owned) else None
            self._owners_roster = roster
        if self._owners is None or not self._owners.fits([member.param for member in trained]):
            params, loads = [], []
            for member in trained:
                if self.owned(member.settings, member.param):
                    params.append(member.param)
                    loads.append((self.plan_of(member.settings, member.param).work(), self._bytes_of(member)))
            dtypes = [state_dtype(param) for param in params]
            among = [member.param for member in trained]
            self._owners = Ownership(params, loads, dtypes, among=among, known=self._owner_of)
            self._owner_of |= self._owners.owner
            self._owners_roster = roster
            self._engine.bucketing.clear()
        return self._owners

    def __getstate__(self) -> dict[str, Any]:
        self._engine.refreshes.join()
        # A view is pickled with its whole stack, once for each parameter in it.
        state = checkpoint.detach_state(super().__getstate__())
        # Owners are decided once, and a copy must not decide otherwise than its state is distributed.
        return {**state, "state": defaultdict(dict, state["state"]), "_owner_of": dict(self._owner_of)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # load_state_dict calls this too. It keeps registered parameters, owners and profiler.
        self.__dict__.setdefault("_registered", Registered())
        self.__dict__.setdefault("_owner_of", {})
        self.__dict__.setdefault("profiler", None)
        self._reset_cache()

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state: flat tensors by role for each parameter, and the param groups.

        Of sharded parameters it is made of DTensors; with ``shard_mode="owner"`` all ranks must call this together.

        The tensors are copies: the optimizer holds views of stacks, and saving one would write its whole stack.
        """
        self._engine.refreshes.join()
        if self._consolidated is not None:
            return self._consolidated
        if self.spreads_state() and any(isinstance(key, Tensor) for key in self.state):
            raise RuntimeError(
                "the state of whole parameters lies with their owners, wanted on one rank: call consolidate() on all "
                "ranks before state_dict(), as SoapTrainer does; the plain Trainer cannot save shard_mode='owner' "
                "under DDP"
            )
        return self._state_dict(to_first=False)

    def consolidate(self) -> None:
        """Brings the state that owners hold to rank 0, whose next :meth:`state_dict` returns it; a step drops it.

        Only for ``shard_mode="owner"`` with whole parameters (DDP); all ranks must call it.
        """
        self._engine.refreshes.join()
        if self.spreads_state():
            self._consolidated = self._state_dict(to_first=True)

    def spreads_state(self) -> bool:
        """Whether owners hold state of parameters that are not sharded."""
        owners = self.find_owners()
        return owners is not None and any(not dtensor.is_sharded(param) for param in owners.owner)

    def _state_dict(self, *, to_first: bool) -> dict[str, Any]:
        # A hook like any other, but the first, so that those of the user see what is saved.
        handle = self.register_state_dict_post_hook(lambda _, plain: self._packed(plain, to_first), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _packed(self, plain: dict[str, Any], to_first: bool) -> dict[str, Any]:
        owners = self.find_owners()
        keys = [key for group in plain["param_groups"] for key in group["params"]]
        # In the order of the groups: ranks gather what they have in the order in which they find it.
        state = {key: plain["state"][key] for key in keys if key in plain["state"]}
        for key, member in zip(keys, self.members(), strict=True):
            known = checkpoint.packed_averages(member.param, state.get(key, {}))
            if not any(map(is_own, known)):
                if known:
                    state[key] = known
                continue
            plan, wanted = self.plan_of(member.settings, member.param), self.wanted_state(member)
            owner = self._owner_of.get(member.param) if owners is not None else None
            if owner is None:
                state[key] = checkpoint.packed(member.param, plan, known, wanted)
            else:
                state[key] = checkpoint.packed_of_owner(member.param, plan, known, wanted, owner, to_first=to_first)
        others = {key: value for key, value in plain["state"].items() if key not in state}
        groups = checkpoint.saved_groups(plain["param_groups"])
        return {**plain, "state": {**state, **others}, "param_groups": groups}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state by copying it, in the dtype it was saved in.

        The learning rate comes from the checkpoint, as a scheduler expects, and so do betas that one cycles; all other
        settings stay as they are now. All ranks that share parameters must call this together.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the groups, a parameter's roles or a shape differ from what the current settings need; on
                all ranks, where one finds that.
        """
        self._engine.refreshes.join()
        self._exchange(average=False, warns=False)  # what is loaded may say nothing of the raw weights
        states: dict[Tensor, dict[str, Any]] = {}
        rates = [group["lr"] for group in self.param_groups]

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # torch casts loaded state to the parameter's dtype, which would round float32 factors of a bf16 model.
            given = checkpoint.regrouped(self.param_groups, given)
            found, ours = self._restored(given)
            groups = checkpoint.merged_groups(self.param_groups, given["param_groups"], self.defaults)
            for param, kept in checkpoint.restored_averages(self.members(), given).items():
                found.setdefault(param, {}).update(kept)
            states.update(found)
            return {"state": checkpoint.foreign_state(given["state"], ours), "param_groups": groups}

        def put(_: torch.optim.Optimizer) -> None:
            shared = Counter(map(id, rates))
            for group, rate in zip(self.param_groups, rates, strict=True):
                if isinstance(rate, Tensor) and isinstance(group["lr"], Tensor) and shared[id(rate)] == 1:
                    group["lr"] = rate.fill_(float(group["lr"]))  # other holders of the tensor see the new value
            for param, state in states.items():
                self.state[param].update(state)

        # Hooks like any other, but between those of the user, who see what was saved and what was loaded.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restored(self, state_dict: dict[str, Any]) -> tuple[dict[Tensor, dict[str, Any]], set[Any]]:
        """Returns the family's state in a state dict by parameter, and the keys under which it was."""
        checkpoint.refuse_float8(state_dict)
        owners = self.find_owners()
        members = {member.param: member for member in self.members()}
        jobs, keys = [], set()
        for param, key, saved in checkpoint.saved_state(self.param_groups, state_dict):
            keys.add(key)
            member, owner = members[param], None
            if self.owned(member.settings, param):
                owner = self._owner_of.setdefault(param, 0)  # 0 takes what is frozen
            plan = self.plan_of(member.settings, param)
            jobs.append(
                checkpoint.Saved(member, plan, saved, self.wanted_state(member), owner, self.bare_plan(member))
            )
        spread = owners is not None or any(dtensor.is_sharded(param) for param in members)
        spread = spread or any(
            dtensor.is_sharded(v) for job in jobs for v in job.saved.values() if isinstance(v, Tensor)
        )
        ours = checkpoint.is_of_family(state_dict["param_groups"])
        if not jobs and not ours:
            checkpoint.refuse_state_of_others(state_dict, self.members())
        states, estimated = checkpoint.restored(jobs, together=spread and dtensor.ranks() > 1, ours=ours)
        if estimated and dtensor.rank() == 0:
            logger.warning(
                "%d parameters were saved in other parts (another number of ranks or block size). Momentum carries "
                "over; factors are put together from the old parts, and second moments estimated from them.",
                estimated,
            )
        return states, keys

    def bare_plan(self, member: Member) -> Plan:
        """What the settings of a parameter would make of it if no side had a factor."""
        return self.plan({**member.settings, "max_precond_dim": 0}, member.param.shape)

    def fits(self, saved: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
        """Whether state of these shapes was saved by as many ranks and in the same parts as there are now.

        Parameters of which nothing was saved had no gradient by then, and say nothing.

        Args:
            saved: Shapes by name of the parameter and role.
        """
        own = [self._packed_shapes(member) for member in self.members() if member.param.requires_grad]
        mine, theirs = (Counter(tuple(sorted(one.items())) for one in shapes) for shapes in (own, saved.values()))
        sharded = any(dtensor.is_sharded(member.param) for member in self.members())
        return mine == theirs if sharded else theirs <= mine

    def _packed_shapes(self, member: Member) -> dict[str, tuple[int, ...]]:
        plan, whole = self.plan_of(member.settings, member.param), self.owned(member.settings, member.param)
        return checkpoint.packed_shapes(member.param, plan, self.wanted_state(member), whole=whole)

    def wanted_state(self, member: Member) -> dict[str, Tensor]:
        """Shapes and dtypes of the state of this rank's part of a parameter, on the meta device."""
        return planned_state(self.plan_of(member.settings, member.param), member.param)

    def state_bytes(self) -> int:
        """Returns the bytes of state of all trainable parameters on this rank, whether it was made already or not."""
        return sum(self.state_bytes_of_parameters().values())

    def state_bytes_of_parameters(self) -> dict[Tensor, int]:
        """Returns the bytes of state that this rank keeps of each trainable parameter; see :meth:`state_bytes`."""
        owners = self.find_owners()
        sizes = {}
        for member in self.roster().trained:
            param = member.param
            if owners is not None and param in owners.owner:
                sizes[param] = self._bytes_of(member) if owners.owns(param) else COUNT.itemsize
            elif dtensor.local(param).numel():
                sizes[param] = self._bytes_of(member)
            kept = averages.bytes_of_average(member.settings, param, dtensor.local(param).shape)
            sizes[param] = sizes.get(param, 0) + kept
        return sizes

    def _bytes_of(self, member: Member) -> int:
        return bytes_of(self.wanted_state(member))


def _of_parts(plan: Plan) -> Plan:
    """Returns the plan of a parameter of which several ranks have parts."""
    step = plan.weight_step
    return replace(plan, weight_step=replace(step, summed=True)) if step.is_relative else plan


def planned_state(plan: Plan, param: Tensor) -> dict[str, Tensor]:
    """Returns shapes and dtypes, on the meta device, of the state that a plan keeps of a parameter."""
    device = torch.device("meta")
    state = plan.allocate(1, dtype=state_dtype(param), device=device)
    return {**state, "step": torch.zeros((), dtype=COUNT, device=device)}


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """Returns the size of tensors."""
    return sum(value.numel() * value.element_size() for value in state.values())
