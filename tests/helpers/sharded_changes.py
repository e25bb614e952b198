"""State that was saved in one layout by one setting and is loaded in another by another, in every process.

No wait here is without end: a collective gives up after a while, and what each rank has come to is exchanged through a
store, which a rank that is stuck in a collective, or has left it by an error, does not disturb.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_loading import Shapes, gathered
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer

SHAPES = ((7, 10), (10,), (5, 7), (5,), (1, 5), (1,), (8, 4), (2, 8), (0, 4), (4, 3, 3))
STEPS = 4

LAYOUTS = {"one": 1, "local on 2": 2, "local on 3": 3, "owner on 2": 2, "owner on 3": 3}
"""Numbers of ranks."""

MAKERS: dict[str, Callable[..., BlockOptimizer]] = {
    "soap": lambda p, **s: SOAP(p, **{"lr": 1e-2, "precondition_frequency": 2, **s}),
    "shampoo": lambda p, **s: Shampoo(p, **{"lr": 1e-2, "precondition_frequency": 2, "start_step": 2, **s}),
    "mars": lambda p, **s: MARS(p, **{"lr": 1e-2, **s}),
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "soap": {
        "": {},
        "factorized": {"factorized": True},
        "one_sided": {"one_sided": True},
        "precondition_1d": {"precondition_1d": True},
        "block_size": {"block_size": 4},
        "merge_dims": {"merge_dims": True},
        "max_precond_dim": {"max_precond_dim": 6},
        "rule=adam": {"rule": "adam"},
        "bfloat16": {"state_dtype": "bfloat16"},
        "pack_factors": {"pack_factors": True},
    },
    "shampoo": {
        "": {},
        "momentum": {"momentum": 0.9},
        "graft=None": {"graft": None},
        "graft=sgd": {"graft": "sgd"},
        "delay": {"asynchronous": True, "delay": 2},
        "kl": {"kl": True, "graft": None},
        "one_sided": {"one_sided": True},
        "precondition_1d": {"precondition_1d": True},
        "max_precond_dim": {"max_precond_dim": 6},
        "rule=adam": {"rule": "adam"},
        "bfloat16": {"state_dtype": "bfloat16"},
        "pack_factors": {"pack_factors": True},
    },
    "mars": {
        "": {},
        "exact": {"exact": True},
        "lion": {"variant": "lion"},
        "shampoo": {"variant": "shampoo"},
        "soap": {"variant": "soap", "precondition_frequency": 2},
        "soap, exact": {"variant": "soap", "precondition_frequency": 2, "exact": True},
        "optimize_1d": {"optimize_1d": True},
        "rule=adam": {"rule": "adam"},
        "bfloat16": {"state_dtype": "bfloat16"},
    },
}
"""What is changed of each optimizer: by itself, from nothing and back."""

KEEPS_ALL = ("", "block_size", "bfloat16", "pack_factors")
"""Changes that say how the same state is cut or kept, and load from any layout into any other."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
        optimizer: Which.
        saved: The option that is set when it is saved.
        loaded: The one that is set when it is loaded.
        source: The layout in which it is saved.
        target: The layout in which it is loaded.
        split: Load DTensors as every rank has them, not whole tensors.
    """

    optimizer: str
    saved: str
    loaded: str
    source: str
    target: str
    split: bool

    @property
    def must_load(self) -> bool:
        """Whether there is no reason to refuse it."""
        return self.saved == self.loaded or {self.saved, self.loaded} <= set(KEEPS_ALL)

    def __str__(self) -> str:
        change = f"{self.saved or 'nothing'} -> {self.loaded or 'nothing'}"
        return f"{self.optimizer}, {change}, {self.source} -> {self.target}{', split' if self.split else ''}"


def cases() -> Iterator[Case]:
    """Yields every combination."""
    for optimizer, options in OPTIONS.items():
        changes = [(option, option) for option in options]
        changes += [pair for option in options if option for pair in (("", option), (option, ""))]
        for (saved, loaded), source, target in itertools.product(changes, LAYOUTS, LAYOUTS):
            if is_refused(optimizer, saved, source) or is_refused(optimizer, loaded, target):
                continue
            # DTensors lie as they were saved where the ranks are as many.
            splits = (False, True) if source.split()[-1] == target.split()[-1] and source != "one" else (False,)
            for split in splits:
                yield Case(optimizer, saved, loaded, source, target, split)


def sample(every: Iterable[Case], seed: int = 0) -> list[Case]:
    """Of each change one case on three ranks, whole or split, from any layout."""
    chosen: dict[tuple[str, str, str], list[Case]] = {}
    for case in every:
        if case.target.endswith("3"):
            chosen.setdefault((case.optimizer, case.saved, case.loaded), []).append(case)
    draw = random.Random(seed)
    return [draw.choice(found) for found in chosen.values()]


def model_of(layout: str) -> Any:
    """Parameters of all shapes, sharded unless one process has them."""
    model = Shapes(SHAPES, torch.float32)
    return model if layout == "one" else fully_shard(model, mesh=init_device_mesh("cpu", (LAYOUTS[layout],)))


def optimizer_of(params: Iterable[nn.Parameter], name: str, option: str, layout: str) -> BlockOptimizer:
    """An optimizer with an option set, for parts or owners."""
    settings = dict(OPTIONS[name][option])
    groups = [{"params": list(params), **({"rule": "adam"} if settings.pop("rule", None) else {})}]
    return MAKERS[name](groups, shard_mode="owner" if layout.startswith("owner") else "local", **settings)


def is_refused(name: str, option: str, layout: str) -> bool:
    """Whether the constructor refuses an option in a layout, on all ranks alike."""
    return bool(OPTIONS[name][option].get("exact")) and layout.startswith("owner")


def give_gradients(params: Iterable[nn.Parameter], step: int) -> None:
    """Gradients that depend on step and shape alone."""
    for param in params:
        generator = torch.Generator().manual_seed(1000 * step + sum(param.shape))
        grad = torch.randn(param.shape, generator=generator)
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if is_split(param) else grad


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def step(optimizer: BlockOptimizer, number: int) -> None:
    """One step, with the correction that exact MARS wants."""
    params = optimizer.param_groups[0]["params"]
    give_gradients(params, number)
    if isinstance(optimizer, MARS) and optimizer.exact:
        with optimizer.at_previous_weights():
            give_gradients(params, number + 500)
    optimizer.step()


def file_of(folder: Path, name: str, option: str, layout: str) -> Path:
    """Where such a state lies."""
    return folder / f"{name}-{option}-{layout}.pt"


def save_states(folder: str, layouts: list[str], only: list[list[str]]) -> None:
    """Saves the state of optimizers with options, as whole tensors, and along what they are split.

    Args:
        folder: Where to.
        layouts: Those that as many ranks have as there are.
        only: (optimizer, option, layout) of those that are wanted.
    """
    for layout, (name, options) in itertools.product(layouts, OPTIONS.items()):
        for option in options:
            if [name, option, layout] not in only:
                continue
            model = model_of(layout)
            optimizer = optimizer_of(model.parameters(), name, option, layout)
            for number in range(STEPS):
                step(optimizer, number)
            state = optimizer.state_dict()
            dims = {
                (place, role): next((p.dim for p in value.placements if isinstance(p, Shard)), -1)
                for place, entry in state["state"].items()
                for role, value in entry.items()
                if isinstance(value, DTensor)
            }
            whole = gathered(state)
            if dtensor.rank() == 0:
                torch.save({"whole": whole, "dims": dims}, file_of(Path(folder), name, option, layout))


def read(folder: Path, case: Case, chosen: list[int]) -> dict[str, Any]:
    """Some of the parameters' saved state, as the case has it."""
    saved = torch.load(file_of(folder, case.optimizer, case.saved, case.source), weights_only=True)
    state: dict[int, dict[str, Any]] = {}
    for place, old in enumerate(chosen):
        entry = saved["whole"]["state"].get(old, {})
        if case.split:
            entry = {
                role: split(value, saved["dims"][old, role]) if (old, role) in saved["dims"] else value
                for role, value in entry.items()
            }
        if entry:
            state[place] = entry
    groups = [{**saved["whole"]["param_groups"][0], "params": list(range(len(chosen)))}]
    return {"state": state, "param_groups": groups}


def split(value: Tensor, dim: int) -> Tensor:
    """Cuts a tensor as DTensor does, or wraps a replica (-1), without asking the other ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = value
    if dim >= 0:
        each = -(-value.shape[dim] // dist.get_world_size())
        first = min(dist.get_rank() * each, value.shape[dim])
        part = value.narrow(dim, first, min(each, value.shape[dim] - first)).contiguous()
    where = [Shard(dim) if dim >= 0 else Replicate()]
    wrapped: Tensor = DTensor.from_local(
        part, mesh, where, run_check=False, shape=value.shape, stride=value.contiguous().stride()
    )
    return wrapped


@dataclasses.dataclass
class Outcome:
    """What became of a load on one rank."""

    kind: str
    text: str = ""
    where: str = ""


def outcome_of(call: Callable[[], None]) -> Outcome:
    """Calls and says how it ended; where is the last lines of the package that an error came by."""
    try:
        call()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/hf_soap/" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))
        return Outcome(type(error).__name__, str(error), where)
    return Outcome("done")


class Exchange:
    """What each rank tells the others, by a store."""

    def __init__(self) -> None:
        self.rank, self.ranks, self.number = dtensor.rank(), dtensor.ranks(), 0
        if self.ranks > 1:
            port: list[Any] = [None]
            if self.rank == 0:
                self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                port = [self.store.port]
            dist.broadcast_object_list(port)
            if self.rank:
                self.store = dist.TCPStore("127.0.0.1", port[0], is_master=False)
            # Longer than a collective waits, which then says where.
            self.store.set_timeout(timedelta(seconds=3 * int(os.environ["RANKS_PATIENCE"])))

    def __call__(self, own: Outcome) -> list[Outcome]:
        """Tells this rank's, and hears all."""
        if self.ranks == 1:
            return [own]
        self.number += 1
        self.store.set(f"{self.number}/{self.rank}", json.dumps(dataclasses.asdict(own)))
        heard = []
        for rank in range(self.ranks):
            try:
                heard.append(Outcome(**json.loads(self.store.get(f"{self.number}/{rank}"))))
            except RuntimeError as error:
                heard.append(Outcome("gone", str(error).partition("\n")[0]))
        self.store.set(f"{self.number}/{self.rank}/heard", "")
        if self.rank == 0 and all(outcome.kind != "gone" for outcome in heard):
            self.store.wait([f"{self.number}/{rank}/heard" for rank in range(self.ranks)])  # it ends with this rank
        return heard


def load_states(folder: str, chosen: list[dict[str, Any]], start: list[int], report: str, *, each: bool) -> None:
    """Works through cases from a place on; leaves after each what became of it in a file of this rank.

    A group of processes that does not agree is given
    up: a collective of it may still be under way.

    Args:
        folder: Where the states lie.
        chosen: The cases, whose target has as many ranks as there are processes.
        start: Place of the first case, and of its first parameter, or -1 for all.
        report: Name of the file.
        each: Load each parameter by itself where all at once are refused.
    """
    exchange, models = Exchange(), dict[str, Any]()
    with Path(f"{report}-{dtensor.rank()}").open("w") as file:
        for number, case in list(enumerate(Case(**entries) for entries in chosen))[start[0] :]:
            if case.target not in models:
                models[case.target] = model_of(case.target)
            params = list(models[case.target].parameters())
            for which in range(start[1] if number == start[0] else -1, len(SHAPES)):
                state, problem = result_of(case, params, which, Path(folder), exchange)
                print(json.dumps([number, which, state, problem]), file=file, flush=True)
                if state == "broken" and dtensor.ranks() > 1:
                    file.close()
                    os._exit(0)
                if which < 0 and (state == "loaded" or not each):
                    break


def result_of(
    case: Case, params: list[nn.Parameter], which: int, folder: Path, exchange: Exchange
) -> tuple[str, str | None]:
    """Loads a case and goes on; says whether it was loaded, refused, split or broken, and what is wrong with that."""
    chosen = list(range(len(SHAPES))) if which < 0 else [which]
    optimizer = optimizer_of([params[i] for i in chosen], case.optimizer, case.loaded, case.target)
    state = read(folder, case, chosen)
    outcomes = exchange(outcome_of(lambda: optimizer.load_state_dict(state)))
    kinds = {outcome.kind for outcome in outcomes}
    if kinds == {"ValueError"}:
        return "refused", problem_of_refusal(outcomes, case, [tuple(SHAPES[i]) for i in chosen])
    if kinds != {"done"}:  # where all are through, or have raised, no collective is under way
        return "split" if kinds == {"done", "ValueError"} else "broken", f"ranks do not agree: {told(outcomes)}"
    outcomes = exchange(outcome_of(lambda: goes_on(optimizer, chosen, params)))
    kinds = {outcome.kind for outcome in outcomes}
    if kinds != {"done"}:  # assertions come after the last collective
        return "split" if kinds <= {"done", "AssertionError"} else "broken", f"it does not go on: {told(outcomes)}"
    return "loaded", None


def told(outcomes: list[Outcome]) -> str:
    """What the ranks came to, for people."""
    return "; ".join(f"rank {rank}: {o.kind} {o.text[:200]} [{o.where}]" for rank, o in enumerate(outcomes))


def problem_of_refusal(outcomes: list[Outcome], case: Case, shapes: list[tuple[int, ...]]) -> str | None:
    """Says what is wrong with errors that all ranks raised, or None."""
    text = outcomes[0].text
    if case.must_load:
        return f"nothing speaks against it, and it is refused: {told(outcomes)}"
    if len({outcome.text for outcome in outcomes}) > 1:
        return f"ranks say different things: {told(outcomes)}"
    if not any(str(shape) in text for shape in shapes):
        return f"no parameter is named: {told(outcomes)}"
    if len(outcomes) > 1 and not re.search(r"\brank \d", text):
        return f"no rank is named: {told(outcomes)}"
    return None


def goes_on(optimizer: BlockOptimizer, chosen: list[int], params: list[nn.Parameter]) -> None:
    """Two steps: finite, near to where they began, and counted alike."""
    with torch.no_grad():
        for param in params:
            dtensor.local(param).fill_(0.5)
    for number in range(STEPS, STEPS + 2):
        step(optimizer, number)
    for place in chosen:
        part, shape = dtensor.local(params[place]).detach(), SHAPES[place]
        far = (part - 0.5).abs().max() if part.numel() else torch.zeros(())
        assert far < 0.5, f"a parameter of shape {shape} went {far} far in two steps of 0.01"
        plan = optimizer.plan_of(optimizer.param_groups[0], params[place])
        if part.numel() or (params[place].numel() and plan.entrywise):  # the count of such is saved once for all ranks
            count = optimizer.state[params[place]]["step"]
            assert count == STEPS + 2, f"a parameter of shape {shape} counts {count} steps"
