"""What the Trainer does around the optimizer, each feature in a real run.

Gradients and learning rates are written down as the optimizer meets them, and a plain loop with a fresh optimizer must
end at the same bits: so it took those steps, all of them and nothing else. Data, schedule and number of steps must be
those of the Trainer's own AdamW.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import mostly_slow
from replaying import assert_replayable, recorded
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from hf_soap import MARS, SOAP, Shampoo, SoapMetricsCallback, SoapTrainer
from hf_soap.engine.optimizer import unwrapped

FREQUENT = "precondition_frequency=2"
SHORT: dict[str, Any] = {"max_steps": 5, "weight_decay": 0.1}
OURS = {"optim_args": FREQUENT, **SHORT}


def known(changes: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what this version of transformers does not know, or knows by another name."""
    renamed = {"group_by_length": ("train_sampling_strategy", "group_by_length")}
    fields = TrainingArguments.__dataclass_fields__
    pairs = [(k, v) if k in fields else renamed.get(k, (k, v)) for k, v in changes.items()]
    return dict(pairs)


class Halving(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= 0.5


class Stopping(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3

    on_step_end = on_substep_end


FEATURES: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, and an epoch that does not divide": {"gradient_accumulation_steps": 7},
    "no clipping": {"max_grad_norm": 0.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "groups by length": {"group_by_length": True},
    "tokens averaged over devices": {"average_tokens_across_devices": True, "gradient_accumulation_steps": 2},
    "tokens counted": {"include_num_input_tokens_seen": True},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "last batch dropped": {"dataloader_drop_last": True, "per_device_train_batch_size": 20},
    "evaluation on start": {"eval_on_start": True},
    "cache emptied": {"torch_empty_cache_steps": 2},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True},
    "a callback that changes the learning rate": {"extra": {"callbacks": [Halving()]}},
    "a callback that stops": {"extra": {"callbacks": [Stopping()]}, "gradient_accumulation_steps": 2},
}


ALWAYS = {"accumulation, and an epoch that does not divide", "groups by length", "NEFTune", "a callback that stops"}
ALWAYS |= {"cosine", "warmup_stable_decay"}


@pytest.mark.parametrize("feature", mostly_slow(FEATURES, fast=ALWAYS))
def test_the_optimizer_takes_the_steps_of_the_trainer(feature: str, tmp_path: Path) -> None:
    changes = known(FEATURES[feature])
    ours = recorded(tmp_path, **{**OURS, **changes})
    assert_replayable(*ours, precondition_frequency=2)
    adamw = recorded(tmp_path, **{**SHORT, **changes}, optim="adamw_torch")
    assert ours[1].batches == adamw[1].batches
    assert ours[1].rates == adamw[1].rates
    for name in ("global_step", "num_input_tokens_seen", "epoch"):
        assert getattr(ours[0].state, name) == getattr(adamw[0].state, name)


@pytest.mark.parametrize(
    ("optim", "optim_args", "options"),
    [
        ("shampoo", FREQUENT, {"precondition_frequency": 2}),
        ("mars", "gamma=0.05", {"gamma": 0.05}),
    ],
)
def test_the_family_takes_the_steps_of_the_trainer(
    optim: str, optim_args: str, options: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**SHORT, "weight_decay": 0.0, "optim_args": optim_args, "gradient_accumulation_steps": 2}
    trainer, recorder, before = recorded(tmp_path, optim=optim, **changes)
    assert_replayable(trainer, recorder, before, **options)


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("schedule", mostly_slow(SCHEDULES, fast=ALWAYS))
def test_schedules_are_followed(schedule: str, tmp_path: Path) -> None:
    """The rate of the first step is 0 with warmup: it seeds the bases, and the second one moves the weights."""
    changes = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": SCHEDULES[schedule], "warmup_steps": 2}
    ours = recorded(tmp_path, **OURS, **changes)
    assert_replayable(*ours, precondition_frequency=2)
    adamw = recorded(tmp_path, **SHORT, **changes, optim="adamw_torch")
    assert ours[1].rates == adamw[1].rates
    assert len(set(ours[1].rates)) > 1 or schedule == "constant"


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("reduce_lr_on_plateau", {"patience": 0, "factor": 0.5}), ("greedy", {"patience": 0, "factor": 0.5})],
)
def test_schedules_that_follow_the_loss(schedule: str, options: dict[str, Any], tmp_path: Path) -> None:
    """At a rate that is far too high the loss rises and the rate falls."""
    from transformers import SchedulerType

    if schedule not in [kind.value for kind in SchedulerType]:
        pytest.skip(f"this version of transformers has no {schedule}")
    changes = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": options, "learning_rate": 1.0}
    ours = recorded(tmp_path, **{**OURS, **changes}, eval_strategy="steps", eval_steps=1)
    assert_replayable(*ours, precondition_frequency=2)
    assert ours[1].rates[-1] < ours[1].rates[0] == 1.0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", mostly_slow([False, True], fast={False}))
@pytest.mark.parametrize(("optim", "optim_args"), [("soap", FREQUENT), ("mars", "exact=true")])
def test_gradient_checkpointing_changes_nothing(optim: str, optim_args: str, reentrant: bool, tmp_path: Path) -> None:
    """Bit for bit, dropout included, also where exact MARS computes it again at the previous weights."""
    weights = []
    for changes in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer, _, before = recorded(
            tmp_path, cls=SoapTrainer, optim=optim, **{**OURS, "optim_args": optim_args}, **changes
        )
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert any(not torch.equal(p, q) for p, q in zip(weights[0], before.values(), strict=True))
    for plain, checkpointed in zip(*weights, strict=True):
        assert torch.equal(plain, checkpointed)


def test_the_best_model_is_loaded_and_the_optimizer_goes_on_from_the_last(tmp_path: Path) -> None:
    """As with AdamW: `load_best_model_at_end` changes the weights alone."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer, _, _ = recorded(tmp_path, **{**OURS, **changes}, learning_rate=0.3, load_best_model_at_end=True, seed=3)
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert best < 5
    assert trainer.evaluate()["eval_loss"] == losses[best]
    assert {int(state["step"]) for state in unwrapped(trainer.optimizer).state.values()} == {5}


@pytest.mark.parametrize("cls", [Trainer, SoapTrainer])
def test_a_second_training_goes_on_as_with_adamw(cls: type[Trainer], tmp_path: Path) -> None:
    def twice(trainer: Trainer) -> None:
        trainer.train()
        trainer.train()

    ours = recorded(tmp_path, cls=cls, runs=twice, **OURS)
    assert_replayable(*ours, precondition_frequency=2)
    adamw = recorded(tmp_path, runs=twice, **SHORT, optim="adamw_torch")
    assert ours[1].rates == adamw[1].rates
    counts = [{int(s["step"]) for s in unwrapped(one[0].optimizer).state.values()} for one in (ours, adamw)]
    assert counts == [{10}, {10}]


def test_a_model_init_starts_the_optimizer_afresh(tmp_path: Path) -> None:
    trainer = Trainer(
        args=tiny.arguments(tmp_path, **OURS), model_init=lambda: tiny.gpt2(), train_dataset=tiny.Counting()
    )
    trainer.train()
    first = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(value, first[name]) for name, value in trainer.model.state_dict().items())


def test_model_only_checkpoints_are_resumed_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer and the schedule silently began anew in the middle of the run."""
    caplog.set_level(logging.WARNING, "hf_soap")
    recorded(tmp_path, **OURS, save_strategy="steps", save_steps=3, save_only_model=True)
    resumed, recorder, _ = recorded(
        tmp_path, **OURS, runs=lambda trainer: trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    )
    assert "has no optimizer (was it removed, or saved with save_only_model=True?): SOAP starts with" in caplog.text
    assert resumed.state.global_step == 5
    assert recorder.rates[0] == resumed.args.learning_rate
    assert {int(state["step"]) for state in unwrapped(resumed.optimizer).state.values()} == {2}


def test_optim_target_modules_are_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They were ignored without a word, and a run meant for attention alone preconditioned everything."""
    caplog.set_level(logging.WARNING, "hf_soap")
    ours = recorded(tmp_path, **OURS, optim_target_modules=["c_attn", "features-of-this-test"])
    assert_replayable(*ours, precondition_frequency=2)
    assert "optim_target_modules=['c_attn', 'features-of-this-test'] is for GaLore and similar" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Ways of making the optimizer
# ---------------------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_the_user_asked_for_early_is_the_one_that_steps(tmp_path: Path) -> None:
    made = []

    def early(trainer: Trainer) -> None:
        made.append(trainer.create_optimizer())
        trainer.train()

    ours = recorded(tmp_path, runs=early, **OURS)
    assert unwrapped(ours[0].optimizer) is made[0]
    assert_replayable(*ours, precondition_frequency=2)


@pytest.mark.parametrize("cls", [SOAP, Shampoo, MARS])
def test_a_class_with_its_arguments_gets_the_decay_groups(cls: type[Any], tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` with any of the classes: the Trainer's groups, and no routing by names."""
    args = tiny.arguments(tmp_path, optim="adamw_torch", **SHORT)
    extra = {"optimizer_cls_and_kwargs": (cls, {"lr": 3e-3})}
    trainer = Trainer(tiny.gpt2(), args, train_dataset=tiny.Counting(), **extra)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert type(optimizer) is cls
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(10, 0.1), (18, 0.0)]
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}
    assert len(trainer.get_learning_rates()) == 2


class WithItsOwn(Trainer):
    def create_optimizer(self, *args: Any) -> Any:
        self.optimizer = self.optimizer or SOAP(self.model.parameters(), lr=1e-3, precondition_frequency=2)
        return self.optimizer


def test_diagnostics_of_an_optimizer_that_a_subclass_makes(tmp_path: Path) -> None:
    """The callback learnt its trainer in `create_optimizer`, which the subclass has replaced: nothing was logged."""
    args = tiny.arguments(tmp_path, optim="adamw_torch", **SHORT)
    trainer = WithItsOwn(tiny.gpt2(), args, train_dataset=tiny.Counting(), callbacks=[SoapMetricsCallback(every=2)])
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "optimizer/step_ms" in e] == [2, 4]


def test_seq2seq_trainer_takes_the_same_steps(tmp_path: Path) -> None:
    ours = recorded(tmp_path, cls=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments, **OURS)
    plain = recorded(tmp_path, **OURS)
    for one, other in zip(ours[0].model.parameters(), plain[0].model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_norm_of_clipping_spares_the_check_of_the_gradients(max_grad_norm: float, tmp_path: Path) -> None:
    checked: list[int] = []

    def spoil_third(optimizer: Any, *_: Any) -> None:
        if len(checked) == 2:
            optimizer.roster().trained[0].param.grad.fill_(torch.nan)
        found, _ = optimizer._engine.guard._gradients(optimizer.param_groups, "SOAP")
        checked.append(sum(map(len, found)))

    args = tiny.arguments(tmp_path, optim="soap", max_grad_norm=max_grad_norm, **OURS)
    trainer = Trainer(tiny.gpt2(), args, train_dataset=tiny.Counting())
    unwrapped(trainer.create_optimizer()).register_step_pre_hook(spoil_third)
    trainer.train()
    assert unwrapped(trainer.optimizer).skipped_steps == 1
    assert checked == [0, 0, 1, 0, 0]


class Hiding(TrainerCallback):
    """Changes a gradient so that torch does not notice."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].transformer.wte.weight.grad.data[0, 0] = torch.nan


class ClippingSome(Trainer):
    """Clips the gradients of the blocks alone, and has NaN in another."""

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.state.global_step == 2:
            model.transformer.wte.weight.grad[0, 0] = torch.nan
        blocks = [param for name, param in model.named_parameters() if ".h." in name]
        return self.accelerator.clip_grad_norm_(blocks, self.args.max_grad_norm)


@pytest.mark.parametrize(("cls", "callbacks"), [(Trainer, [Hiding()]), (ClippingSome, [])])
def test_gradients_are_checked_where_clipping_does_not_show_them(cls: Any, callbacks: Any, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim="soap", max_grad_norm=1.0, **OURS)
    trainer = cls(tiny.gpt2(), args, train_dataset=tiny.Counting(), callbacks=callbacks)
    trainer.train()
    assert unwrapped(trainer.optimizer).skipped_steps == 1
    assert all(param.isfinite().all() for param in trainer.model.parameters())
