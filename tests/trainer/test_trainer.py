"""Real runs of the Trainer on a tiny GPT-2."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import assert_same, mostly_slow
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_soap import SOAP, SoapConfig, SoapTrainer, SoapTrainerMixin
from hf_soap.trainer.resume import find_problem, last_complete_checkpoint

FREQUENT = "precondition_frequency=2"


def run(folder: Path, model: nn.Module | None = None, cls: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    """Trains to the end, unless it is told otherwise from a checkpoint, and returns the trainer."""
    resume = changes.pop("resume", None)
    extras = {key: changes.pop(key) for key in ("optimizer_config", "callbacks") if key in changes}
    args = tiny.arguments(folder, **{"optim_args": FREQUENT, "save_steps": 4, **changes})
    trainer = cls(model or tiny.gpt2(), args, train_dataset=tiny.Counting(), **extras)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(trainer: Trainer) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def outcome(trainer: Trainer) -> Any:
    """All that a run leaves: weights and the optimizer's state."""
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return weights, plain(trainer).state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def bf16() -> nn.Module:
    return tiny.gpt2().to(torch.bfloat16)


def lora() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(tiny.gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=False))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        pytest.param(tiny.gpt2, {}, id="plain"),
        pytest.param(bf16, {}, id="bf16 model", marks=pytest.mark.slow),
        pytest.param(tiny.gpt2, {"bf16": True}, id="bf16 autocast", marks=pytest.mark.slow),
        pytest.param(
            tiny.gpt2,
            {
                "gradient_accumulation_steps": 2,
                "max_grad_norm": 0.1,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 3,
                "weight_decay": 0.1,
            },
            id="accumulation, clipping, schedule",
        ),
        pytest.param(lora, {"learning_rate": 1e-2}, id="LoRA"),
        pytest.param(tiny.gpt2, {"optim_args": "stagger=true,block_size=24,precondition_1d=true"}, id="blocks"),
        pytest.param(tiny.gpt2, {"optim": "mars_soap"}, id="MARS-SOAP", marks=pytest.mark.slow),
        pytest.param(
            tiny.gpt2, {"optim": "mars_shampoo", "optim_args": None}, id="MARS-Shampoo", marks=pytest.mark.slow
        ),
        pytest.param(tiny.gpt2, {"optim": "shampoo"}, id="Shampoo", marks=pytest.mark.slow),
        pytest.param(
            tiny.gpt2,
            {"optim": "shampoo", "optim_args": FREQUENT + ",asynchronous=true,delay=1"},
            id="background roots",
        ),
        pytest.param(tiny.gpt2, {"optim": "kl_soap"}, id="KL-SOAP", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    model: Callable[[], nn.Module], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, dropout included."""
    changes = {"save_strategy": "steps", **changes}
    whole = run(tmp_path / "whole", model(), **changes)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = run(tmp_path / "resumed", model(), resume=str(checkpoint), **changes)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert_same(outcome(resumed), outcome(whole))
    untrained = model().state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in whole.model.state_dict().items())
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]


def test_a_resumed_run_follows_the_arguments_of_today(tmp_path: Path) -> None:
    """The checkpoint's refresh frequency came back over the one on the command line."""
    run(tmp_path, save_strategy="steps", max_steps=4)
    resumed = run(tmp_path, max_steps=8, resume=True, optim_args="precondition_frequency=3")
    assert {group["precondition_frequency"] for group in plain(resumed).param_groups} == {3}


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", max_steps=4, optim="adamw_torch", optim_args=None)
    with pytest.raises(ValueError, match=r"does not fit the current settings|param groups of"):
        run(tmp_path, resume=True)


def damaged(folder: Path, damage: str) -> None:
    path = folder / damage.split()[-1]
    if damage.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-20])
    elif damage.startswith("zero"):
        path.write_bytes(bytes(path.stat().st_size))
    elif damage.startswith("empty"):
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, save_strategy="steps")
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        *(f"cut {name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")),
        *(f"no {name}" for name in ("model.safetensors", "trainer_state.json")),
        *(f"zeroed {name}" for name in ("optimizer.pt", "model.safetensors", "trainer_state.json")),
        *(f"empty {name}" for name in ("optimizer.pt", "model.safetensors", "trainer_state.json")),
        "cut trainer_state.json",
    ],
)
def test_a_damaged_checkpoint_is_noticed(
    damage: str, two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job killed while it saved left half a checkpoint, on which every restart failed."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    damaged(tmp_path / "checkpoint-8", damage)
    assert damage.split()[-1].split(".")[0] in find_problem(tmp_path / "checkpoint-8").replace(" weights", "")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (message,) = caplog.messages
    assert f"{tmp_path / 'checkpoint-8'} is incomplete and is skipped" in message


def test_a_damaged_index_of_shards_is_noticed(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints / "checkpoint-8", tmp_path, dirs_exist_ok=True)
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "model-1.safetensors"
    (tmp_path / "model.safetensors").rename(shard)
    name = next(iter(load_file(shard)))
    index.write_text(json.dumps({"weight_map": {name: "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert find_problem(tmp_path) == "model-2.safetensors is missing"
    index.write_text('{"weight_map": {"a": "model.saf')
    assert find_problem(tmp_path).startswith("model.safetensors.index.json: ")


def test_checkpoints_without_optimizer_are_complete(tmp_path: Path) -> None:
    """AdamW went on from one, and this package found none where the option that saved it was no longer set."""
    run(tmp_path, save_strategy="steps", save_only_model=True)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    run(tmp_path, save_strategy="steps", max_steps=9, resume=True)


def test_soap_trainer_resumes_from_the_last_whole_checkpoint(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    whole = torch.load(two_checkpoints / "checkpoint-8" / "optimizer.pt", weights_only=True)
    damaged(tmp_path / "checkpoint-8", "cut optimizer.pt")
    resumed = run(tmp_path, cls=SoapTrainer, resume=True, save_strategy="steps")
    assert "checkpoint-8 is incomplete and is skipped: optimizer.pt is cut off" in caplog.text
    assert_same(plain(resumed).state_dict(), whole)


def test_soap_trainer_says_that_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^No valid checkpoint found in output directory \(.*; pass the folder of one"
    ):
        run(tmp_path, cls=SoapTrainer, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# SoapTrainer
# ---------------------------------------------------------------------------------------------------------------------


def test_a_typed_config_is_the_same_as_the_strings(tmp_path: Path) -> None:
    config = SoapConfig(precondition_frequency=2, adam_modules="wte|wpe", eps=1e-7)
    text = "precondition_frequency=2,adam_modules=wte|wpe,eps=1e-7"
    by_config = run(tmp_path, cls=SoapTrainer, optim=default_optim(), optim_args=None, optimizer_config=config)
    by_text = run(tmp_path, cls=SoapTrainer, optim_args=text)
    by_name = run(tmp_path, optim_args=text)
    assert_same(outcome(by_config), outcome(by_text))
    assert_same(outcome(by_config), outcome(by_name))
    assert by_config.args.to_dict()["optim"] == "soap"
    assert "adam_modules=wte|wpe" in by_config.args.optim_args


def default_optim() -> str:
    return str(TrainingArguments.__dataclass_fields__["optim"].default)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"optim_args": "eps=1e-6"},
            r"got both optimizer_config and optim_args='eps=1e-6', wanted one; drop optim_args",
        ),
        ({"optim": "mars"}, r"got optim='mars' with a config of soap, wanted one optimizer; drop optim"),
        ({"optim": "sgd"}, r"got optim='sgd' with a config of soap, wanted one optimizer; drop optim"),
    ],
)
def test_a_config_that_contradicts_the_arguments(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    """optim="sgd" beside a config of SOAP trained SOAP."""
    args = tiny.arguments(tmp_path, **{"optim": default_optim(), **given})
    before = args.to_dict()
    with pytest.raises(ValueError, match=message):
        SoapTrainer(tiny.gpt2(), args, optimizer_config=SoapConfig())
    assert args.to_dict() == before


def test_arguments_may_be_used_again_with_the_same_config(tmp_path: Path) -> None:
    """The first trainer writes its config into the arguments, which the second took for a contradiction."""
    args = tiny.arguments(tmp_path, optim=default_optim())
    for _ in range(2):
        trainer = SoapTrainer(tiny.gpt2(), args, optimizer_config=SoapConfig(eps=1e-6))
        assert type(trainer.create_optimizer()) is SOAP
    with pytest.raises(ValueError, match=r"got both optimizer_config and optim_args='eps=1e-06'"):
        SoapTrainer(tiny.gpt2(), args, optimizer_config=SoapConfig(eps=1e-7))


@pytest.mark.parametrize("optim", mostly_slow(["soap", "shampoo", "mars", "soap_muon"], fast={"soap", "mars"}))
def test_hidden_matrices_keep_their_norm(optim: str, tmp_path: Path) -> None:
    """Everything else takes ordinary steps, also matrices of adapters that are zero at first."""
    start = {name: param.norm().item() for name, param in tiny.gpt2().named_parameters()}
    trainer = run(tmp_path / "all", optim=optim, optim_args="norm=hyperball", weight_decay=0.5)
    for name, param in trainer.model.named_parameters():
        hidden = ".h." in name and param.dim() == 2
        assert (param.norm().item() == pytest.approx(start[name], rel=1e-5)) == hidden, name
    trained = run(tmp_path / "adapters", optim=optim, optim_args="norm=hyperball", model=lora()).model
    assert all(param.any() for name, param in trained.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("config", [SoapConfig(log_every=3), None])
def test_diagnostics_are_logged(config: SoapConfig | None, tmp_path: Path) -> None:
    """Where they fell on a logging step, its loss was missing: logging anything clears the Trainer's wish to log."""
    changes: dict[str, Any] = (
        {"optimizer_config": config, "optim_args": None} if config else {"optim_args": "log_every=3"}
    )
    trainer = run(tmp_path, cls=SoapTrainer, logging_steps=2, **changes)
    logged = [entry for entry in trainer.state.log_history if "optimizer/seeded_share" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    for entry in logged:
        assert 0 < entry["optimizer/factor_off_diagonal"] < 1
        assert entry["optimizer/seeded_share"] == 1.0
        assert entry["optimizer/skipped_steps"] == 0.0
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6, 8]


def test_skipped_steps_and_unseeded_tensors_are_counted(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            param = kwargs["model"].transformer.wte.weight
            param.grad.mul_(torch.nan if state.global_step in (2, 3) else 1)
            kwargs["model"].transformer.wpe.weight.grad.zero_()

    trainer = run(tmp_path, cls=SoapTrainer, optim_args="log_every=4", callbacks=[Poison()])
    logged = [entry for entry in trainer.state.log_history if "optimizer/skipped_steps" in entry]
    assert [entry["optimizer/skipped_steps"] for entry in logged] == [2.0, 2.0]
    tensors = len(list(trainer.model.parameters()))
    assert logged[-1]["optimizer/seeded_share"] == pytest.approx((tensors - 1) / tensors)
    assert all(param.isfinite().all() for param in trainer.model.parameters())


def test_factors_without_a_basis_have_no_diagonal_to_speak_of(tmp_path: Path) -> None:
    """Shampoo's factors were measured as if they stood in their own eigenbasis."""
    trainer = run(tmp_path, cls=SoapTrainer, optim="shampoo")
    names = {"seeded_share", "skipped_steps", "failed_refreshes"}
    assert trainer.optimizer_diagnostics().keys() == {f"optimizer/{name}" for name in names}


def test_another_optimizer_has_no_diagnostics(tmp_path: Path) -> None:
    trainer = run(tmp_path, cls=SoapTrainer, optim="adamw_torch", optim_args=None, max_steps=1)
    assert trainer.optimizer_diagnostics() == {}


# ---------------------------------------------------------------------------------------------------------------------
# Other trainers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_mixin_over_seq2seq_trainer(tmp_path: Path) -> None:
    class Mixed(SoapTrainerMixin, Seq2SeqTrainer):
        pass

    args = tiny.arguments(tmp_path, Seq2SeqTrainingArguments, optim=default_optim(), predict_with_generate=True)
    config = SoapConfig(precondition_frequency=2, log_every=4)
    trainer = Mixed(tiny.gpt2(), args, train_dataset=tiny.Counting(), optimizer_config=config)
    trainer.train()
    assert type(plain(trainer)) is SOAP
    assert_same(outcome(trainer), outcome(run(tmp_path)))
    assert any("optimizer/seeded_share" in entry for entry in trainer.state.log_history)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_mixin_over_trls_sft_trainer_with_lora(tmp_path: Path) -> None:
    model = tiny.gpt2()
    before = copy.deepcopy(model.state_dict())
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    extra = {"peft_config": lora, "optimizer_config": SoapConfig(precondition_frequency=2, log_every=4)}
    trainer = tiny.sft_trainer(tmp_path, SoapTrainerMixin, model=model, extra=extra, optim=default_optim())
    trainer.train()
    optimizer = plain(trainer)
    assert type(optimizer) is SOAP
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(trained) == 4
    assert all("basis_0" in optimizer.state[p] or "basis_1" in optimizer.state[p] for p in trained)
    assert any("optimizer/seeded_share" in entry for entry in trainer.state.log_history)
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" in name:
            assert value.any(), name
        else:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name


def test_training_learns_and_speaks_of_its_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_soap")
    trainer = run(
        tmp_path, optim_args=None, learning_rate=1e-2, max_steps=60, per_device_train_batch_size=16, logging_steps=10
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert "routes parameters as follows" in caplog.text
    assert "SOAP, 2 sides" in caplog.text
