"""Exact MARS where a rank has no part of what is trained, run in every process; see ranks.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded import whole
from sharded_owners import batch_of
from sharded_trainer import let_accelerate_shard_on_cpus, losses_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_soap import MARS
from hf_soap.distributed import dtensor

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3},
    "lion": {"lr": 1e-3, "variant": "lion", "optimize_1d": True},
    "soap": {"lr": 3e-3, "variant": "soap", "max_precond_dim": 1},  # a part of one row has no factors either
}


def head_alone(*, sharded: bool, labels: int = 2, bias: bool = True) -> Any:
    """A frozen layer, and a head of two labels that is trained: two ranks of three have a row of it."""
    torch.manual_seed(0)
    backbone = nn.Linear(25, 25, dtype=torch.float64).requires_grad_(requires_grad=False)
    model = nn.Sequential(backbone, nn.Tanh(), nn.Linear(25, labels, bias=bias, dtype=torch.float64))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
    return model


def loss_of(model: Any, step: int, among: range) -> Tensor:
    """The mean loss on the samples of some ranks, small enough that nothing is clipped, part by part or whole."""
    x, y = (torch.cat([batch_of(step, rank)[i] for rank in among]) for i in (0, 1))
    loss: Tensor = 0.01 * (model(x) - y[:, :2]).square().mean()
    return loss


def exact_step(model: Any, optimizer: MARS, step: int, among: range) -> None:
    """As a loop of one's own does it."""
    optimizer.zero_grad()
    loss_of(model, step, among).backward()
    with optimizer.at_previous_weights():
        if optimizer.has_previous_weights:
            loss_of(model, step, among).backward()
    for param in model.parameters():
        if param.grad is not None:
            norm = dtensor.local(param.grad).norm()
            assert norm < 1, f"got {norm}: parts are clipped by norms of their own"
    optimizer.step()


def exact_mars_trains_a_head_alone(name: str, steps: int = 8) -> None:
    """By hand, with the closure, and after a load: as one process with the samples of all ranks."""
    ranks, own = range(dist.get_world_size()), range(dist.get_rank(), dist.get_rank() + 1)
    split, closed, alone = head_alone(sharded=True), head_alone(sharded=True), head_alone(sharded=False)
    made = [MARS(m.parameters(), exact=True, **SETTINGS[name]) for m in (split, closed, alone)]
    for step in range(steps):
        for model, optimizer, among in ((split, made[0], own), (alone, made[2], ranks)):
            exact_step(model, optimizer, step, among)

        def again(step: int = step) -> float:
            made[1].zero_grad()
            loss = loss_of(closed, step, own)
            loss.backward()
            return loss.item()

        made[1].step(again)
        assert dtensor.from_all(made[0].has_previous_weights) == [True for _ in ranks]
        if step == steps // 2:
            state = made[0].state_dict()
            made[0] = MARS(split.parameters(), exact=True, **SETTINGS[name])
            assert dtensor.from_all(made[0].has_previous_weights) == [False for _ in ranks]
            made[0].load_state_dict(state)
            assert dtensor.from_all(made[0].has_previous_weights) == [True for _ in ranks]
    for what, model in (("by hand", split), ("by a closure", closed)):
        for key, value in whole(model).items():
            want = alone.get_parameter(key).detach()
            torch.testing.assert_close(
                value, want, rtol=0, atol=1e-10, msg=lambda m, w=what, k=key: f"{name} {w}, {k}: {m}"
            )


def classifier(folder: Path, *, sharded: bool, freeze: bool, **settings: Any) -> Any:
    """SoapTrainer over a tiny GPT-2 with a head of two labels, sharded by FSDP2 or whole."""
    from tiny import VOCABULARY, arguments
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from hf_soap import SoapTrainer

    if sharded:
        let_accelerate_shard_on_cpus()
        wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        settings |= {"fsdp": "full_shard auto_wrap"}
        settings |= {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **wrapped}}
        os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}  # for transformers 4
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    model: Any = GPT2ForSequenceClassification(GPT2Config(num_labels=2, **sizes, **drops)).double()
    if freeze:
        model.transformer.requires_grad_(requires_grad=False)
    rows = [
        {"input_ids": (index + torch.arange(12) * (1 + index % 2)) % VOCABULARY, "labels": index % 2}
        for index in range(60)
    ]
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, **settings}
    settings |= {"per_device_train_batch_size": 12 // dist.get_world_size(), "lr_scheduler_type": "constant"}
    settings["average_tokens_across_devices"] = False  # else the mean over samples is taken for one over tokens
    args = arguments(folder, ddp_backend="gloo" if dist.get_world_size() > 1 else None, **settings)
    return SoapTrainer(model=model, args=args, train_dataset=rows)


def classifier_equals_one_process(run: str, sharded: bool, **settings: Any) -> None:
    """One process leaves the weights that it ends with, and several compare theirs with them."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer = classifier(folder, sharded=sharded, freeze=True, max_grad_norm=0.1, **settings)
    start = whole(trainer.model)
    trainer.train()
    assert trainer.is_fsdp_enabled == sharded
    got, left = whole(trainer.model), folder / "weights.pt"
    assert [name for name, value in got.items() if not torch.equal(value, start[name])] == ["score.weight"]
    if dist.get_world_size() == 1:
        torch.save(got, left)
        return
    for name, value in torch.load(left, weights_only=True).items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def classifier_goes_on(run: str, sharded: bool, resumes: bool = False, **settings: Any) -> None:
    """Trains and leaves its losses, or goes on from the third step with losses near to those."""
    folder = Path(os.environ["SHARED_FOLDER"]) / run
    trainer = classifier(folder, sharded=sharded, freeze=False, **settings)
    left = folder / "losses.pt"
    if not resumes:
        trainer.train()
        if dist.get_rank() == 0:
            torch.save(losses_of(trainer), left)
        return
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    want, got = torch.load(left), losses_of(trainer)
    assert len(got) == len(want) == 6
    assert all(abs(a - b) <= 0.1 * b for a, b in zip(got, want, strict=True)), f"{got}, wanted {want}"
