"""Compiled models, searches, and loops of one's own: accelerate, averaged weights, torch's schedulers."""

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from helpers import assert_same, gradient, parameters
from replaying import recorded
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from transformers import Trainer

from hf_soap import MARS, SOAP, Shampoo, SoapTrainer
from hf_soap.engine.optimizer import unwrapped

FREQUENT = "precondition_frequency=2"

# ---------------------------------------------------------------------------------------------------------------------
# Compiled models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "optim"), [(Trainer, "soap"), (SoapTrainer, "mars")])
def test_a_compiled_model_trains_and_resumes_like_the_plain_one(
    cls: type[Trainer], optim: str, tmp_path: Path
) -> None:
    options = {"optim": optim, "optim_args": "exact=true" if optim == "mars" else FREQUENT, "max_steps": 6}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "steps", "save_steps": 3}
    model = tiny.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    whole, _, before = recorded(tmp_path, cls=cls, model=copy.deepcopy(model), **options, **compiled)
    plain, _, _ = recorded(tmp_path / "plain", cls=cls, model=copy.deepcopy(model), **options)
    for (name, one), other in zip(whole.model.named_parameters(), plain.model.parameters(), strict=True):
        change = (other - before[name]).norm()
        assert (one - other).norm() < 2e-2 * change, name
    resumed, _, _ = recorded(
        tmp_path / "resumed",
        cls=cls,
        model=copy.deepcopy(model),
        runs=lambda trainer: trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3"),
        **options,
        **compiled,
    )
    assert_same([p.detach() for p in resumed.model.parameters()], [p.detach() for p in whole.model.parameters()])
    saved = type(model).from_pretrained(tmp_path / "checkpoint-6")
    assert_same([p.detach() for p in saved.parameters()], [p.detach() for p in whole.model.parameters()])


def test_names_of_a_compiled_model_are_those_of_the_model(tmp_path: Path) -> None:
    """`adam_modules=^lm_head` matched nothing in a model that the user had compiled."""
    compiled = torch.compile(tiny.gpt2(), backend="eager")
    args = tiny.arguments(tmp_path, optim_args="adam_modules=^transformer.wte")
    optimizer = Trainer(compiled, args, train_dataset=tiny.Counting()).create_optimizer()
    (adam,) = [member for member in optimizer.members() if member.settings["rule"] == "adam"]
    assert adam.param is compiled.get_parameter("_orig_mod.transformer.wte.weight")
    assert adam.name == "transformer.wte.weight"


# ---------------------------------------------------------------------------------------------------------------------
# Searches, and memory
# ---------------------------------------------------------------------------------------------------------------------


def test_trials_of_a_search_know_nothing_of_each_other(tmp_path: Path) -> None:
    """Each equals a run by itself; `log_every` of a trial stayed on in the next ones, and so did models."""
    pytest.importorskip("optuna")
    trials = [
        {"learning_rate": 3e-3, "optim_args": "precondition_frequency=1,log_every=2"},
        {"learning_rate": 1e-2, "optim_args": "asynchronous=true,precondition_frequency=2", "optim": "shampoo"},
        {"learning_rate": 3e-3, "optim_args": "precondition_frequency=3", "optim": "soap"},
    ]
    losses, logged, alive, counts = [], [], [], []

    class Looking(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            optimizer = unwrapped(self.optimizer)
            gc.collect()
            counts.append(sum(ref() is not None for pair in alive for ref in pair))
            alive.append((weakref.ref(optimizer), weakref.ref(self.model)))
            losses.append(self.evaluate()["eval_loss"])
            logged.append(sum("optimizer/step_ms" in entry for entry in self.state.log_history))
            return result

    def trainer(cls: type[Trainer], folder: Path, **changes: Any) -> Trainer:
        data = tiny.Counting()
        args = tiny.arguments(folder, **{"max_steps": 4, **changes})
        return cls(
            args=args, model_init=lambda: tiny.gpt2(), train_dataset=data, eval_dataset=[data[i] for i in range(8)]
        )

    def space(trial: Any) -> dict[str, Any]:
        which = trial.suggest_int("which", 0, 2)
        return trials[trial.number] if which >= 0 else {}

    searched = trainer(Looking, tmp_path / "search")
    searched.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna")
    alone = []
    for number, options in enumerate(trials):
        single = trainer(Trainer, tmp_path / str(number), **options)
        single.train()
        alone.append(single.evaluate()["eval_loss"])
    assert losses == alone
    assert logged == [2, 0, 0]
    assert counts == [0, 0, 0]
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_soap roots"]


@pytest.mark.parametrize(("cls", "optim_args"), [(Trainer, None), (Trainer, "log_every=2"), (SoapTrainer, None)])
def test_a_deleted_trainer_is_freed_at_once(cls: type[Trainer], optim_args: str | None, tmp_path: Path) -> None:
    """As with AdamW. Weights and state of the last run stayed on the device until the collector came by."""
    trainer = cls(
        tiny.gpt2(), tiny.arguments(tmp_path, optim_args=optim_args, max_steps=2), train_dataset=tiny.Counting()
    )
    trainer.train()
    gc.collect()
    alive = [weakref.ref(one) for one in (trainer, trainer.model, unwrapped(trainer.optimizer))]
    gc.disable()
    try:
        del trainer
        assert [ref() is None for ref in alive[:2]] == [True, True]
    finally:
        gc.enable()
    gc.collect()  # torch's schedulers hold an optimizer in a cycle
    assert alive[2]() is None


def test_callbacks_pickle(tmp_path: Path) -> None:
    """Ray pickles the trainer of a search."""
    args = tiny.arguments(tmp_path, optim_args="log_every=2", max_steps=2)
    trainer = SoapTrainer(tiny.gpt2(), args, train_dataset=tiny.Counting())
    for _ in range(2):
        trainer.callback_handler.callbacks = pickle.loads(pickle.dumps(trainer.callback_handler.callbacks))
        trainer.train()
        assert sum("optimizer/step_ms" in entry for entry in trainer.state.log_history) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Loops of one's own
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = [SOAP, Shampoo, MARS]


def problem() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), list(torch.randn(12, 5, 6))


@pytest.mark.parametrize("cls", CLASSES)
def test_accelerates_loop_equals_a_plain_one_and_resumes(cls: type[Any], tmp_path: Path) -> None:
    """Accumulation, a schedule, and `save_state` and `load_state` in the middle."""

    def run(last: int, resume: bool = False) -> nn.Module:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, batches = problem()
        optimizer = cls(model.parameters(), lr=1e-2)
        schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if resume:
            accelerator.load_state(str(tmp_path / cls.__name__))
        for number in range(6 if resume else 0, last):
            with accelerator.accumulate(model):
                accelerator.backward(model(batches[number]).square().mean())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if number == 5 and not resume:
                accelerator.save_state(str(tmp_path / cls.__name__), safe_serialization=False)
        return model

    model, batches = problem()
    optimizer = cls(model.parameters(), lr=1e-2)
    schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    for first in range(0, 12, 2):
        for batch in batches[first : first + 2]:
            (model(batch).square().mean() / 2).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    wanted = [p.detach() for p in model.parameters()]
    assert_same([p.detach() for p in run(12).parameters()], wanted)
    assert_same([p.detach() for p in run(12, resume=True).parameters()], wanted)


SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 3),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 9),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [4]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    ),
    "SWALR": lambda optimizer: swa_utils.SWALR(optimizer, 1e-4, anneal_epochs=3),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_set_what_they_set_for_adamw_and_resume(name: str, cls: type[Any]) -> None:
    rates: dict[str, list[Any]] = {}
    ends = []
    for kind in (cls, torch.optim.AdamW, "resumed"):
        params = parameters([(6, 6), (5,)])
        make = cls if kind == "resumed" else kind
        optimizer = make(params, lr=3e-3, betas=(0.9, 0.95))
        schedule = SCHEDULERS[name](optimizer)
        seen = rates.setdefault(str(kind), [])
        for step in range(8):
            if kind == "resumed" and step == 4:
                saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
                optimizer = make(params, lr=3e-3, betas=(0.9, 0.95))
                schedule = SCHEDULERS[name](optimizer)
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
                if name in ("OneCycleLR", "CyclicLR"):  # settings are not loaded, and these two cycle one
                    optimizer.param_groups[0]["betas"] = saved[0]["param_groups"][0]["betas"]
            for place, param in enumerate(params):
                param.grad = gradient(param, place, step)
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
            optimizer.step()
            schedule.step()
        ends.append([p.detach() for p in params])
    assert rates[str(cls)] == rates[str(torch.optim.AdamW)] == rates["resumed"]
    assert len({lr for lr, _ in rates[str(cls)]}) > 1
    assert_same(ends[2], ends[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_averaged_weights_do_not_touch_the_run(cls: type[Any]) -> None:
    """`AveragedModel` copies the model at first and reads it after each step."""
    ends, averages = [], []
    for averages_too in (True, False):
        model, batches = problem()
        optimizer = cls(model.parameters(), lr=1e-2)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        by_hand = [p.detach().clone() for p in model.parameters()]
        for number, batch in enumerate(batches):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if averages_too:
                averaged.update_parameters(model)
                for mean, param in zip(by_hand, model.parameters(), strict=True):
                    mean.lerp_(param.detach(), 0.5 if number else 1.0)
        ends.append([p.detach() for p in model.parameters()])
        averages.append((list(averaged.module.parameters()), by_hand))
    assert_same(*ends)
    for got, wanted in zip(*averages[0], strict=True):
        torch.testing.assert_close(got, wanted)
