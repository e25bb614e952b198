"""The Trainer and accelerate over several ranks, run in every process; see ranks.py."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import OPTIMIZERS, Messages, assert_equal, network, put, whole
from tiny import TRANSFORMERS_4, Counting
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset

from hf_soap.engine.optimizer import unwrapped


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
    reshard_after_forward: bool = True,
    **settings: Any,
) -> Any:
    """A Trainer over a tiny GPT-2 with tied embeddings, under FSDP2 where a kind of state dict is named, else DDP."""
    from tiny import arguments, gpt2
    from transformers import Trainer

    from hf_soap import SoapTrainer

    if state_dict_type:
        let_accelerate_shard_on_cpus()
        wrapped: dict[str, Any] = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
        }
        settings |= {"fsdp": "full_shard auto_wrap"}  # the way of transformers 4, which 5 still takes
        wrapped |= {"version": 2, "state_dict_type": state_dict_type, "reshard_after_forward": reshard_after_forward}
        settings |= {"fsdp_config": wrapped}
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
    data = {"train_dataset": Subset(Counting(), range(60)), "eval_dataset": Subset(Counting(), range(8))}
    return (Trainer if plain else SoapTrainer)(model=model, args=args, **data)


def trainer_resumes(run: str, **settings: Any) -> None:
    """Eight steps in one go, and four from the checkpoint at the fourth: equal bit for bit."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer, said = trainer_for(folder, **settings), Messages("hf_soap.trainer.registry")
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


def trainer_averages(run: str, **settings: Any) -> None:
    """The model holds textbook averages at the end, evaluation finds their loss, and a resumed run is the same."""
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        """Keeps the raw weights after each step, and the losses of evaluations."""

        def __init__(self) -> None:
            self.weights: list[dict[str, Any]] = []
            self.losses: dict[int, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.weights.append(whole(kwargs["model"]))

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.losses[state.global_step] = kwargs["metrics"]["eval_loss"]

    def watched() -> tuple[Any, Watching]:
        evaluates = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
        trainer, watching = trainer_for(folder, **settings, **evaluates), Watching()
        trainer.add_callback(watching)
        return trainer, watching

    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer, watching = watched()
    model = copy.deepcopy(trainer.model).eval()
    start = whole(model)
    trainer.train()
    first, *rest = watching.weights
    average = first
    for seen, weights in enumerate(rest, start=2):
        decay = 1 - 1 / min(seen, 3)
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
    got = whole(trainer.model)
    if settings.get("dtype") != "bfloat16":
        for name, value in average.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)
    moved = max(float((got[name] - weight).abs().max()) for name, weight in watching.weights[-1].items())
    assert moved > 1e-3

    losses = [loss_of(model, weights) for weights in (start, got)]
    assert abs(watching.losses[8] / watching.losses[0] - losses[1] / losses[0]) < 1e-4
    again, after = watched()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for one, other in zip(after.weights, watching.weights[4:], strict=True):
        assert_equal(one, other, f"{run}, raw")
    assert_equal(whole(again.model), got, run)
    assert {step: after.losses[step] for step in (6, 8)} == {step: watching.losses[step] for step in (6, 8)}


def averages_are_switched(**settings: Any) -> None:
    """Averages that start or end at a checkpoint change no raw weight."""
    folder = Path(os.environ["SHARED_FOLDER"])
    plain, averaged = "precondition_frequency=2", "precondition_frequency=2,average_horizon=3"
    ends = []
    for run, optim_args, resumes_from in (
        ("plain", plain, None),
        ("averaged", averaged, None),
        ("on", averaged, "plain"),
        ("off", plain, "averaged"),
    ):
        trainer = trainer_for(folder / run, optim_args=optim_args, **settings)
        trainer.train(resume_from_checkpoint=resumes_from and str(folder / resumes_from / "checkpoint-4"))
        optimizer = unwrapped(trainer.optimizer)
        assert optimizer.at_average == (optim_args == averaged)
        optimizer.train()
        ends.append(whole(trainer.model))
    for end in ends[1:]:
        assert_equal(end, ends[0], "raw weights")


def loss_of(model: Any, weights: dict[str, Any]) -> float:
    """The loss of a plain model with these weights, on the rows that the trainers evaluate."""
    rows = [Counting()[i] for i in range(8)]
    put(model, weights)
    with torch.no_grad():
        return float(model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss)


def losses_of(trainer: Any) -> list[float]:
    """The logged losses, one a step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_goes_on(run: str, tolerance: float = 0.01, **settings: Any) -> None:
    """Resumes from what other ranks or another kind of state dict saved, with the losses that run went on with."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer, checkpoint = trainer_for(folder, **settings), folder / "checkpoint-4"
    if TRANSFORMERS_4 and dist.get_rank() == 0:  # which goes on with the batch size of each device that it finds there
        state = checkpoint / "trainer_state.json"
        saved = json.loads(state.read_text())
        state.write_text(json.dumps({**saved, "train_batch_size": trainer.args.train_batch_size}))
        for sums in checkpoint.glob("checksums_*.json"):
            sums.unlink()
    dist.barrier()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    want, got = torch.load(folder / "losses.pt"), losses_of(trainer)
    assert len(got) == len(want) == 8
    assert all(abs(a - b) <= tolerance * b for a, b in zip(got, want, strict=True)), f"{got}, wanted {want}"


def owners_save_with_plain_trainer() -> None:
    """Only rank 0 is asked for its state there."""
    trainer = trainer_for(Path(os.environ["SHARED_FOLDER"]) / "a", plain=True, optim_args="shard_mode=owner")
    with pytest.raises(ValueError, match=r"shard_mode='owner' under DDP.*SoapTrainer"):
        trainer.create_optimizer()


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


def nodes_read_their_own(folder: str) -> None:
    """Each rank is a node with a folder of its own, and the newest checkpoint of the second is damaged."""
    from hf_soap.trainer import resume

    rank = dist.get_rank()
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    own = Path(folder) / f"node-{rank}"
    trainer = trainer_for(own, save_on_each_node=True)  # saves at the steps 4 and 8
    trainer.train()
    for weights in (Path(folder) / "node-0").glob(
        "*/model.safetensors"
    ):  # transformers 5 saves them on one node alone
        if rank == 1:
            shutil.copy(weights, own / weights.parent.name)
    newest = own / "checkpoint-8"
    for name in ("optimizer.pt", f"rng_state_{rank}.pth", "scheduler.pt"):
        intact = (newest / name).read_bytes()
        assert resume.choose(trainer, True) == str(newest)
        if rank == 1:
            damaged = bytearray(intact)
            damaged[len(intact) // 2] ^= 1
            (newest / name).write_bytes(damaged)
        assert resume.choose(trainer, True) == str(own / "checkpoint-4"), name
        (newest / name).write_bytes(intact)


def adamw_takes_none_of_ours(state_dict_type: str) -> None:
    """Each of ours is told to AdamW by name, and removing what the error names lets it go on with the weights."""
    folder, file = Path(os.environ["SHARED_FOLDER"]), {"FULL_STATE_DICT": "optimizer.bin"}
    for optim, name in (("soap", "SOAP"), ("shampoo", "Shampoo"), ("mars_adamw", "MARS")):
        own = folder / optim
        trainer_for(own, state_dict_type, optim=optim, optim_args=None, max_steps=4).train()
        named = file.get(state_dict_type, "optimizer_0")
        said = rf"^got a checkpoint of {name}, wanted one of AdamW, in .*, remove {named} from the folder: AdamW"
        adamw = {"optim": "adamw_torch", "optim_args": None, "plain": True, "max_steps": 5}
        with pytest.raises(ValueError, match=said):
            trainer_for(own, state_dict_type, **adamw).train(resume_from_checkpoint=True)
        dist.barrier()
        if dist.get_rank() == 0:
            found = own / "checkpoint-4" / named
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        dist.barrier()
        trainer = trainer_for(own, state_dict_type, **adamw)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 5
