"""What the tests of sharded training run in every process; see ranks.py."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import Subset

from hf_soap import MARS, SOAP, Shampoo, checkpoint, costs, resume
from hf_soap.stepping import BlockOptimizer

OPTIMIZERS: dict[str, Callable[[Any], BlockOptimizer]] = {
    "soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2),
    "soap, one side, factorized": lambda p: SOAP(
        p, lr=1e-2, precondition_frequency=2, one_sided=True, factorized=True
    ),
    "soap, blocks": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, block_size=4),
    "kl_soap": lambda p: SOAP(p, lr=1e-2, precondition_frequency=2, kl=True),
    "shampoo": lambda p: Shampoo(p, lr=1e-2, precondition_frequency=2, start_step=2),
    "shampoo, late roots": lambda p: Shampoo(
        p, lr=1e-2, precondition_frequency=3, start_step=2, asynchronous=True, delay=2
    ),
    "mars": lambda p: MARS(p, lr=1e-2),
    "mars_lion": lambda p: MARS(p, lr=1e-2, variant="lion"),
    "mars_shampoo": lambda p: MARS(p, lr=1e-2, variant="shampoo"),
    "mars_soap": lambda p: MARS(p, lr=1e-2, variant="soap", precondition_frequency=2),
}


UNEVEN, EVEN = (7, 10, 5, 1), (8, 12, 8, 4)


def network(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = UNEVEN) -> nn.Sequential:
    """By default with rows that 2 and 3 ranks share unevenly, and a last layer of which some have nothing."""
    torch.manual_seed(0)
    first, second, third = (nn.Linear(rows, columns) for rows, columns in itertools.pairwise(sizes))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).to(dtype)


def shard(model: nn.Sequential, mesh: DeviceMesh | None = None) -> nn.Sequential:
    """Shards each layer by itself."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Trains on data that depends on the step alone; every rank has the same batch."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ends = (model[0].in_features, model[4].out_features)
        x, y = (torch.randn(16, n, generator=generator).to(dtype) for n in ends)
        loss = (model(x) - y).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Sets all parameters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = weights[name]
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Asserts equality bit for bit."""
    differ = [name for name, value in want.items() if not torch.equal(value, got[name])]
    assert not differ, f"{what}: {differ} differ"


def resumed_equals_uninterrupted(dtype: str, names: list[str] | None = None) -> None:
    """FULL and SHARDED state dicts of torch.distributed.checkpoint, as accelerate takes them."""
    folder = Path(os.environ["SHARED_FOLDER"])
    for name in names or OPTIMIZERS:
        model = shard(network(getattr(torch, dtype)))
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, range(6))
        weights = whole(model)
        save(model, optimizer, folder)
        losses = train(model, optimizer, range(6, 10))
        want = whole(model)
        for full in (True, False):
            model = shard(network(getattr(torch, dtype)))
            put(model, weights)
            optimizer = OPTIMIZERS[name](model.parameters())
            options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full, cpu_offload=full)
            if full:
                state = torch.load(folder / resume.FULL, weights_only=True) if dist.get_rank() == 0 else {}
            else:
                saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
                dcp.load(saved, storage_reader=dcp.FileSystemReader(folder / resume.SHARDED))
                state = saved["optimizer"]
            set_optimizer_state_dict(model, optimizer, state, options=options)
            assert train(model, optimizer, range(6, 10)) == losses, f"{name}, full={full}"
            assert_equal(whole(model), want, f"{name}, full={full}")
        dist.barrier()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes both kinds of state dict of an optimizer as accelerate does."""
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(full, folder / resume.FULL)
    sharded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(sharded, storage_writer=dcp.FileSystemWriter(folder / resume.SHARDED))
    dist.barrier()


def save_for_others(names: list[str]) -> None:
    """Trains six steps, and saves what runs on other ranks go on from, and how this one goes on."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        folder.mkdir(exist_ok=True)
        model = shard(network())
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, range(6))
        weights = whole(model)
        save(model, optimizer, folder)
        losses = train(model, optimizer, range(6, 12))
        if dist.get_rank() == 0:
            torch.save({"weights": weights, "losses": losses}, folder / "run.pt")
        dist.barrier()


class Messages(logging.Handler):
    """Collects what a logger says."""

    def __init__(self, logger: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def goes_on_from_others(names: list[str], sharded: bool = True, tolerance: float = 0.02) -> None:
    """Loads what another number of ranks saved: no jump in the loss, momentum intact, one warning."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        run = torch.load(folder / "run.pt", weights_only=True)
        for source in (resume.FULL, resume.SHARDED):
            model = shard(network()) if sharded else network()
            put(model, run["weights"])
            optimizer, said = OPTIMIZERS[name](model.parameters()), Messages("hf_soap.state")
            optimizer.load_state_dict(checkpoint.read(folder / source))
            exact = name in ("mars", "mars_lion", "mars_shampoo")  # no factors: nothing is estimated
            warned = [text for text in said.texts if "saved in other parts" in text]
            assert len(warned) == (0 if exact or dist.get_rank() else 1), f"{name}: {said.texts}"
            losses = train(model, optimizer, range(6, 12))
            for got, want in zip(losses, run["losses"], strict=True):
                assert abs(got - want) <= (1e-6 if exact else tolerance) * want, f"{name}: {losses}, {run['losses']}"


# ---------------------------------------------------------------------------------------------------------------------
# The Trainer
# ---------------------------------------------------------------------------------------------------------------------


def let_accelerate_shard_on_cpus() -> None:
    """accelerate attaches FSDP to listed kinds of devices only, and CPUs are not among them: it would run DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = AcceleratorState._shared_state == {}
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if fresh and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def trainer_for(
    folder: Path,
    state_dict_type: str | None = None,
    *,
    dtype: str = "float32",
    lora: bool = False,
    plain: bool = False,
    dropout: bool = True,
    **settings: Any,
) -> Any:
    """A Trainer over a tiny GPT-2 with tied embeddings, under FSDP2 where a kind of state dict is named, else DDP."""
    from tiny import Counting, arguments, gpt2
    from transformers import Trainer

    from hf_soap import SoapTrainer

    if state_dict_type:
        let_accelerate_shard_on_cpus()
        wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        settings |= {"fsdp": "full_shard auto_wrap"}  # the way of transformers 4, which 5 still takes
        settings |= {"fsdp_config": {"version": 2, "state_dict_type": state_dict_type, **wrapped}}
        os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": state_dict_type}  # for transformers 4
    if dist.get_world_size() > 1:
        settings |= {"ddp_backend": "gloo"}
    model: Any = gpt2(**({} if dropout else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)))
    model.to(getattr(torch, dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    rows = 12 // dist.get_world_size()
    if "mars" not in settings.get("optim", ""):
        settings.setdefault("optim_args", "precondition_frequency=2")
    settings = {"per_device_train_batch_size": rows, **settings}
    args = arguments(folder, save_strategy="steps", save_steps=4, logging_steps=1, **settings)
    return (Trainer if plain else SoapTrainer)(model=model, args=args, train_dataset=Subset(Counting(), range(60)))


def trainer_resumes(run: str, **settings: Any) -> None:
    """Eight steps in one go, and four from the checkpoint at the fourth: equal bit for bit."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer, said = trainer_for(folder, **settings), Messages("hf_soap.registry")
    logging.getLogger("hf_soap").setLevel(logging.INFO)
    trainer.train()
    if not dist.get_rank():
        assert sum("on rank 0 of" in text for text in said.texts) == bool(settings.get("state_dict_type"))
    assert trainer.is_fsdp_enabled == bool(settings.get("state_dict_type"))
    want = whole(trainer.model)
    if dist.get_rank() == 0:
        torch.save(losses_of(trainer), folder / "losses.pt")
    dist.barrier()
    trainer = trainer_for(folder, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_equal(whole(trainer.model), want, run)


def losses_of(trainer: Any) -> list[float]:
    """The logged losses, one a step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_goes_on(run: str, tolerance: float = 0.01, **settings: Any) -> None:
    """Resumes from what other ranks or another kind of state dict saved, with the losses that run went on with."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer = trainer_for(folder, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    want, got = torch.load(folder / "losses.pt"), losses_of(trainer)
    assert len(got) == len(want) == 8
    assert all(abs(a - b) <= tolerance * b for a, b in zip(got, want, strict=True)), f"{got}, wanted {want}"


# ---------------------------------------------------------------------------------------------------------------------
# Owners
# ---------------------------------------------------------------------------------------------------------------------


def owned(name: str, params: Any) -> BlockOptimizer:
    """One of the optimizers, with whole matrices on one rank each."""
    optimizer = OPTIMIZERS[name](params)
    for group in optimizer.param_groups:
        group["shard_mode"] = "owner"
    return optimizer


def same_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with gradients that depend on the step and the weights alone, however they are sharded."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, weight in whole(model).items():
            param = model.get_parameter(name)
            grad = (torch.randn(weight.shape, generator=generator, dtype=torch.float64) + weight).to(weight.dtype)
            split = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if split else grad
        optimizer.step()


def owners_equal_one_process(names: list[str] | None = None, dtype: str = "float64", replicas: int = 0) -> None:
    """Whatever the number of ranks: the weights of one process that saw the same gradients, bit for bit.

    With ``replicas`` on a mesh of two dimensions, or, at -1, whole on every rank.
    But for MARS-AdamW and MARS-Lion, which one process steps by fused kernels that round otherwise.
    """
    ranks = dist.get_world_size()
    for name in names or OPTIMIZERS:
        alone, split = network(getattr(torch, dtype)), network(getattr(torch, dtype))
        if replicas > 0:
            mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
            shard(split, mesh)
        elif replicas == 0:
            shard(split)
        reference, optimizer = OPTIMIZERS[name](alone.parameters()), owned(name, split.parameters())
        for model, stepped in ((alone, reference), (split, optimizer)):
            same_gradients(model, stepped, range(8))
        if "mars" not in name:
            assert_equal(whole(split), whole(alone), name)
        for key, value in whole(split).items():
            torch.testing.assert_close(value, whole(alone)[key], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        held = [p for p in split.parameters() if optimizer.state[p].keys() == {"step"}]
        assert held, "every rank holds all state"


def owners_keep_their_matrices() -> None:
    """Freezing one parameter moved the others to new owners, who knew nothing of their state."""
    model, alone = shard(network(torch.float64)), network(torch.float64)
    optimizer, reference = owned("soap", model.parameters()), OPTIMIZERS["soap"](alone.parameters())
    for steps, frozen in ((range(4), False), (range(4, 8), True), (range(8, 12), False)):
        for net, stepped in ((model, optimizer), (alone, reference)):
            net[0].weight.requires_grad_(not frozen)
            same_gradients(net, stepped, steps)
        assert_equal(whole(model), whole(alone), f"frozen={frozen}")
        state = optimizer.state_dict()  # also of what is frozen
        optimizer.load_state_dict(state)


def owned_model(mode: str, name: str) -> tuple[nn.Sequential, BlockOptimizer]:
    """A model under FSDP2, or whole on every rank, and its optimizer."""
    model = network(torch.float64)
    if mode == "fsdp":
        shard(model)
    return model, owned(name, model.parameters())


def owners_save(names: list[str], mode: str) -> None:
    """Trains six steps, saves in every way there is, and notes how the run goes on."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        folder.mkdir(exist_ok=True)
        model, optimizer = owned_model(mode, name)
        same_gradients(model, optimizer, range(6))
        start = whole(model)
        if mode == "fsdp":
            save(model, optimizer, folder)
        else:
            if dist.get_world_size() > 1:
                with pytest.raises(RuntimeError, match=r"call consolidate\(\) on all ranks"):
                    optimizer.state_dict()
                optimizer.consolidate()
            if dist.get_rank() == 0:
                torch.save(optimizer.state_dict(), folder / resume.PLAIN)
        same_gradients(model, optimizer, range(6, 12))
        end = whole(model)
        if dist.get_rank() == 0:
            torch.save({"start": start, "end": end}, folder / "run.pt")
        dist.barrier()


def owners_go_on(names: list[str], mode: str) -> None:
    """Loads each of them: the run goes on bit for bit."""
    for name in names:
        folder = Path(os.environ["SHARED_FOLDER"]) / name
        run = torch.load(folder / "run.pt", weights_only=True)
        ways = [(path, how) for path in sorted(folder.glob("optimizer*")) for how in ("read", "torch")]
        assert ways
        for path, how in ways:
            model, optimizer = owned_model(mode, name)
            put(model, run["start"])
            if how == "read" or path.name == resume.PLAIN or mode != "fsdp":
                optimizer.load_state_dict(checkpoint.read(path))
            elif path.name == resume.FULL:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
                state = torch.load(path, weights_only=True) if dist.get_rank() == 0 else {}
                set_optimizer_state_dict(model, optimizer, state, options=options)
            else:
                saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.load(saved, storage_reader=dcp.FileSystemReader(path))
                set_optimizer_state_dict(model, optimizer, saved["optimizer"])
            same_gradients(model, optimizer, range(6, 12))
            assert_equal(whole(model), run["end"], f"{name} from {path.name}, {how}")


def owners_save_with_plain_trainer() -> None:
    """Only rank 0 is asked for its state there."""
    trainer = trainer_for(Path(os.environ["SHARED_FOLDER"]) / "a", plain=True, optim_args="shard_mode=owner")
    with pytest.raises(ValueError, match=r"shard_mode='owner' under DDP.*SoapTrainer"):
        trainer.create_optimizer()


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def a_nan_on_one_rank_skips_the_step_on_all() -> None:
    """Parameters and state stay as they are everywhere, and training goes on."""
    for mode in ("local", "owner"):
        for name in ("soap", "shampoo", "mars"):
            model = shard(network())
            optimizer = owned(name, model.parameters()) if mode == "owner" else OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(4))
            before, state = whole(model), optimizer.state_dict()
            for param in model.parameters():
                if dist.get_rank() == 1 and param.grad.to_local().numel():  # type: ignore[union-attr]
                    param.grad.to_local().view(-1)[0] = float("nan")  # type: ignore[union-attr]
                    break
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert_equal(whole(model), before, name)
            after = optimizer.state_dict()["state"]
            for key, roles in state["state"].items():
                for role, value in roles.items():
                    one, other = (v.to_local() if isinstance(v, DTensor) else v for v in (value, after[key][role]))
                    assert torch.equal(one, other), f"{name}: {role}"
            same_gradients(model, optimizer, range(5, 6))
            assert optimizer.skipped_steps == 1


COLLECTIVES = (
    "all_gather_single",
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
    "barrier",
)


def a_local_step_has_one_collective() -> None:
    """A scalar that says whether all gradients are finite; none without the check."""
    counts: dict[str, int] = {}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        return counted

    for name in OPTIMIZERS:
        for nonfinite, want in (("skip", {"all_reduce": 1}), ("off", {})):
            model = shard(network())
            optimizer = OPTIMIZERS[name](model.parameters())
            for group in optimizer.param_groups:
                group["nonfinite"] = nonfinite
            same_gradients(model, optimizer, range(2))
            with pytest.MonkeyPatch.context() as patch, CommDebugMode() as functional:
                for collective in COLLECTIVES:
                    if hasattr(dist, collective):
                        patch.setattr(dist, collective, counting(collective, getattr(dist, collective)))
                optimizer.step()
            assert counts == want, f"{name}, nonfinite={nonfinite}: {counts}"
            assert functional.get_total_counts() <= len(want), f"{name}: {functional.get_comm_counts()}"
            counts.clear()


def meshes_of_two_dimensions() -> None:
    """HSDP, tensor parallelism with and without FSDP, and several meshes in one model: parts resume bit for bit."""
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def hsdp(model: nn.Sequential) -> nn.Sequential:
        return shard(model, square)

    def tensor_parallel(model: nn.Sequential) -> nn.Sequential:
        return parallelize_module(model, flat, {"0": ColwiseParallel(), "2": RowwiseParallel()})  # type: ignore[return-value]

    def both(model: nn.Sequential) -> nn.Sequential:
        parallelize_module(model, square["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=square["outer"])
        return model

    def mixed(model: nn.Sequential) -> nn.Sequential:
        fully_shard(model[0], mesh=flat)
        fully_shard(model[2], mesh=square)
        return model

    for cut in (hsdp, tensor_parallel, both, mixed):
        for name in ("soap", "shampoo", "mars"):
            sizes = EVEN if "parallel" in cut.__name__ or cut is both else UNEVEN  # torch's are even
            model = cut(network(sizes=sizes))
            optimizer = OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(6))
            start, state = whole(model), optimizer.state_dict()
            same_gradients(model, optimizer, range(6, 10))
            want = whole(model)
            again = cut(network(sizes=sizes))
            put(again, start)
            optimizer = OPTIMIZERS[name](again.parameters())
            optimizer.load_state_dict(state)
            same_gradients(again, optimizer, range(6, 10))
            assert_equal(whole(again), want, f"{cut.__name__}, {name}")
            losses = train(again, optimizer, [0] * 30)
            assert losses[-1] < losses[0], f"{cut.__name__}, {name}: {losses}"


def a_split_refresh_equals_one_of_its_own() -> None:
    """Under DDP each rank decomposes some factors and gets the others: the same bits as if it did all."""
    for name in OPTIMIZERS:
        results = []
        for split in (False, True):
            model = network()
            optimizer = OPTIMIZERS[name](model.parameters())
            for group in optimizer.param_groups:
                group["distributed_refresh"] = split
            same_gradients(model, optimizer, range(8))
            results.append(whole(model))
        assert_equal(results[1], results[0], name)


def accelerate_alone() -> None:
    """``accelerator.prepare(model, optimizer)`` without a Trainer."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    let_accelerate_shard_on_cpus()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP", reshard_after_forward=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = network()
    prepared, optimizer = accelerator.prepare(model, OPTIMIZERS["soap"](model.parameters()))
    assert all(isinstance(param, DTensor) for param in prepared.parameters())
    losses = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step % 3)
        x, y = (torch.randn(16, n, generator=generator) for n in (7, 1))
        loss = (prepared(x) - y).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def square_network(width: int = 25) -> nn.Sequential:
    """Layers whose factors have full rank where the batch has more rows than the layers are wide."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(3)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def batch_of(step: int, rank: int, width: int = 25) -> tuple[Tensor, Tensor]:
    """The samples of one rank, others on each."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = (torch.randn(64, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


SQUARE: dict[str, Callable[[Any], BlockOptimizer]] = {
    "soap": lambda p: SOAP(p, lr=3e-3, precondition_frequency=5),
    "shampoo": lambda p: Shampoo(p, lr=3e-3, precondition_frequency=5, start_step=5),
    "mars": lambda p: MARS(p, lr=3e-3),
    "mars_shampoo": lambda p: MARS(p, lr=3e-3, variant="shampoo"),
}


def owners_equal_one_process_on_data_of_their_own(steps: int = 30) -> None:
    """Each rank has other samples, and one process has all of them; rounding is all that the two differ by."""
    ranks = dist.get_world_size()
    for name, make in SQUARE.items():
        alone, split = square_network(), shard(square_network())
        reference, optimizer = make(alone.parameters()), make(split.parameters())
        for group in optimizer.param_groups:
            group["shard_mode"] = "owner"
        for step in range(steps):
            x, y = batch_of(step, dist.get_rank())
            optimizer.zero_grad()
            (split(x) - y).square().mean().backward()
            optimizer.step()
            every = [batch_of(step, rank) for rank in range(ranks)]
            x, y = (torch.cat([batch[i] for batch in every]) for i in (0, 1))
            reference.zero_grad()
            (alone(x) - y).square().mean().backward()
            reference.step()
        for key, value in whole(split).items():
            want = alone.get_parameter(key).detach()
            torch.testing.assert_close(value, want, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def exact_mars_equals_a_loop_by_hand(sharded: bool, steps: int = 12) -> None:
    """FSDP2 or DDP, against the equations on one process with the samples of all ranks."""
    ranks, lr, beta1, beta2, gamma = dist.get_world_size(), 3e-3, 0.95, 0.99, 0.025
    model = square_network()
    weights = [param.detach().clone() for param in model.parameters()]
    before, first, second = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    net: Any = shard(model) if sharded else nn.parallel.DistributedDataParallel(model)
    optimizer = MARS(model.parameters(), lr=lr, betas=(beta1, beta2), gamma=gamma, exact=True)
    copy = square_network()

    def gradients_at(points: list[Tensor], step: int) -> list[Tensor]:
        x, y = (torch.cat([batch_of(step, rank)[i] for rank in range(ranks)]) for i in (0, 1))
        for param, point in zip(copy.parameters(), points, strict=True):
            param.data.copy_(point)
        copy.zero_grad()
        (copy(x) - y).square().mean().backward()
        return [param.grad.clone() for param in copy.parameters()]  # type: ignore[union-attr]

    for step in range(steps):
        x, y = batch_of(step, dist.get_rank())
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        with optimizer.at_previous_weights():
            if optimizer.has_previous_weights:
                (net(x) - y).square().mean().backward()
        optimizer.step()

        now = gradients_at(weights, step)
        behind = gradients_at(before, step) if step else [torch.zeros_like(w) for w in weights]
        before = [w.clone() for w in weights]
        for i, weight in enumerate(weights):
            c = now[i] + gamma * beta1 / (1 - beta1) * (now[i] - behind[i])
            c = c / max(1.0, float(c.norm())) if not sharded else c
            if sharded:  # each rank clips its part by the norm of that
                parts = c.tensor_split([-(-25 // ranks) * r for r in range(1, ranks)])
                c = torch.cat([part / max(1.0, float(part.norm())) for part in parts])
            first[i] = beta1 * first[i] + (1 - beta1) * c
            second[i] = beta2 * second[i] + (1 - beta2) * c * c
            debiased = first[i] / (1 - beta1 ** (step + 1))
            weight -= lr * debiased / ((second[i] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
    for value, want in zip(whole(model).values(), weights, strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=1e-9)


def a_rank_without_a_gradient_holds_up_nobody() -> None:
    """Its part of the parameter stays where it is, or, with owners, counts as zero."""
    for mode in ("local", "owner"):
        for name in OPTIMIZERS:
            model = shard(network())
            optimizer = owned(name, model.parameters()) if mode == "owner" else OPTIMIZERS[name](model.parameters())
            same_gradients(model, optimizer, range(4))
            for weight in model.parameters():
                weight.grad = weight.grad.clone() if dist.get_rank() else None  # type: ignore[union-attr]
            optimizer.step()
            for weight in model.parameters():
                weight.grad = None
            optimizer.step()
            same_gradients(model, optimizer, range(4, 8))
            assert all(value.isfinite().all() for value in whole(model).values()), f"{mode}, {name}"


def ranks_plan_alike() -> None:
    """A smaller part found a factor where the largest had none, and one rank ran SOAP while the other ran Adam."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape, settings in (((9, 1), {}), ((1025, 6), {"max_precond_dim": 512}), ((9,), {"precondition_1d": True})):
        param = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        optimizer = SOAP([param], **settings)
        for _ in range(3):
            param.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
            optimizer.step()
        roles: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(roles, {role: tuple(v.shape) for role, v in optimizer.state_dict()["state"][0].items()})
        assert all(other == roles[0] for other in roles), f"{shape}: {roles}"


def a_first_step_at_no_learning_rate_is_taken_by_all() -> None:
    """Warmup starts at 0, and ranks whose part of all gradients is zero left the others alone in an exchange."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SOAP(model.parameters(), lr=0.0, shard_mode="owner")
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def costs_are_those_of_the_optimizer() -> None:
    """The projected state of the rank that has most is what the optimizer counts there."""
    count = dist.get_world_size()
    shapes = [(40, 24), (40, 40), (24, 24), (24,), (64, 8)]
    mesh = init_device_mesh("cpu", (count,))
    for make in (SOAP, Shampoo, MARS):
        for mode in ("local", "owner", "ddp", "ddp, owner"):
            params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
            projected = costs.cost(make(params), ranks=count, mode=mode)
            if "ddp" not in mode:
                params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
            optimizer = make(params, shard_mode="owner" if "owner" in mode else "local")
            for param in params:
                grad = torch.randn(param.shape)
                param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(param, DTensor) else grad
            optimizer.step()
            kept = {v.untyped_storage().data_ptr(): v for s in optimizer.state.values() for v in s.values()}
            octets: list[Any] = [None] * count
            dist.all_gather_object(octets, sum(v.untyped_storage().nbytes() for v in kept.values()))
            far = abs(max(octets) - projected.state) / projected.state
            assert far < 0.03, f"{make.__name__}, {mode}: {octets}, projected {projected.state}"
