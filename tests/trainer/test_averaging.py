"""Averages of the weights under a Trainer: what it evaluates, saves, publishes and resumes from."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import assert_same, mostly_slow
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_soap import SOAP, SoapTrainer
from hf_soap.engine.optimizer import unwrapped
from hf_soap.optimizers.names import ENTRIES

AVERAGED = "precondition_frequency=2,average_horizon=3"
STEPS = 8


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


class Watching(TrainerCallback):
    """Keeps the weights after each step, and the losses of evaluations."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.losses: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(trained_weights(kwargs["model"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses[state.global_step] = kwargs["metrics"]["eval_loss"]

    def average(self, steps: int, *, horizon: int = 3, start: int = 0) -> dict[str, Tensor]:
        """The textbook average of the weights after the first steps."""
        average = self.weights[start]
        for seen, weights in enumerate(self.weights[start + 1 : steps], start=2):
            decay = 1 - 1 / min(seen, horizon)
            average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
        return average


def trainer_for(folder: Path, kind: str = "Trainer", *, model: Any = None, **changes: Any) -> tuple[Any, Watching]:
    """A Trainer that evaluates and saves every other step."""
    watching = Watching()
    settings = {"optim_args": AVERAGED, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2, **changes}
    extra = {"callbacks": [watching]}
    if kind == "SFTTrainer":
        datasets = pytest.importorskip("datasets")
        rows = {"input_ids": [tiny.Counting()[i]["input_ids"].tolist() for i in range(8)]}
        extra["eval_dataset"] = datasets.Dataset.from_dict(rows)
        return tiny.sft_trainer(folder, model=model, extra=extra, **settings), watching
    cls, arguments = {
        "Trainer": (Trainer, tiny.TrainingArguments),
        "SoapTrainer": (SoapTrainer, tiny.TrainingArguments),
        "Seq2SeqTrainer": (Seq2SeqTrainer, Seq2SeqTrainingArguments),
    }[kind]
    args = tiny.arguments(folder, arguments, **settings)
    data = {"train_dataset": tiny.Counting(), "eval_dataset": tiny.Counting(8)}
    return cls(model or tiny.gpt2(), args, **data, **extra), watching


def loss_at(weights: dict[str, Tensor], folder: Path, kind: str = "Trainer") -> float:
    """The loss that a fresh trainer finds for weights."""
    trainer, _ = trainer_for(folder, kind)
    trainer.model.load_state_dict(weights, strict=False)
    loss: float = trainer.evaluate()["eval_loss"]
    return loss


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


def raw_after(trainer: Any) -> dict[str, Tensor]:
    """The raw weights of a trainer that has trained."""
    unwrapped(trainer.optimizer).train()
    raw = trained_weights(trainer.model)
    unwrapped(trainer.optimizer).eval()
    return raw


@pytest.mark.parametrize("kind", ["Trainer", "SoapTrainer", "Seq2SeqTrainer", "SFTTrainer"])
def test_trainers_evaluate_and_save_averages_and_train_raw_weights(kind: str, tmp_path: Path) -> None:
    trainer, watching = trainer_for(tmp_path / "run", kind)
    trainer.train()
    for step in range(2, STEPS + 1, 2):
        want = watching.average(step)
        assert watching.losses[step] == pytest.approx(loss_at(want, tmp_path, kind), rel=1e-5)
        saved = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        assert_near(trained_weights(saved), want)
    assert watching.losses[STEPS] != pytest.approx(loss_at(watching.weights[-1], tmp_path, kind), rel=1e-4)

    assert_near(trained_weights(trainer.model), watching.average(STEPS))
    assert_same(raw_after(trainer), watching.weights[-1])
    trainer.save_model(str(tmp_path / "published"))
    assert_same(
        trained_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "published")), trained_weights(trainer.model)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(watching.losses[STEPS], rel=1e-6)

    plain, without = trainer_for(tmp_path / "plain", kind, optim_args="precondition_frequency=2")
    plain.train()
    assert_same(without.weights, watching.weights)

    resumed, after = trainer_for(tmp_path / "resumed", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(after.weights, watching.weights[4:])
    assert_same(trained_weights(resumed.model), trained_weights(trainer.model))
    assert {step: after.losses[step] for step in (6, 8)} == {step: watching.losses[step] for step in (6, 8)}


@pytest.mark.parametrize("name", mostly_slow(ENTRIES, fast={"soap", "mars_lion", "soap_muon"}))
def test_every_optimizer_averages_and_resumes(name: str, tmp_path: Path) -> None:
    changes = {"optim": name, "optim_args": "average_horizon=3,average_start=3", "eval_strategy": "no"}
    trainer, watching = trainer_for(tmp_path, **changes)
    trainer.train()
    assert_near(trained_weights(trainer.model), watching.average(STEPS, start=3))
    for step in (2, 6):  # before averaging starts, and after
        resumed, after = trainer_for(tmp_path / "resumed", **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(after.weights, watching.weights[step:])
        assert_same(trained_weights(resumed.model), trained_weights(trainer.model))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"eval_steps": 1, "save_steps": 3},
        {"eval_steps": 3, "save_steps": 1},
        {"eval_strategy": "no"},
        {"eval_on_start": True},
        {"bf16": True},
        {"optim": "mars", "optim_args": "exact=true,average_horizon=3"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    kind = "SoapTrainer" if changes.get("optim") == "mars" else "Trainer"
    trainer, watching = trainer_for(tmp_path, kind, **changes)
    trainer.train()
    assert_near(trained_weights(trainer.model), watching.average(STEPS))
    resumed, after = trainer_for(tmp_path / "resumed", kind, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(after.weights, watching.weights[6:])
    assert_same(trained_weights(resumed.model), trained_weights(trainer.model))
    assert_same(unwrapped(resumed.optimizer).state_dict()["state"], unwrapped(trainer.optimizer).state_dict()["state"])
    if "eval_on_start" in changes:
        assert after.losses[6] == pytest.approx(watching.losses[6], rel=1e-6)


def test_weights_in_bfloat16_resume_bit_for_bit(tmp_path: Path) -> None:
    trainer, watching = trainer_for(tmp_path, model=tiny.gpt2().to(torch.bfloat16))
    trainer.train()
    resumed, after = trainer_for(tmp_path / "resumed", model=tiny.gpt2().to(torch.bfloat16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(after.weights, watching.weights[4:])
    assert_same(trained_weights(resumed.model), trained_weights(trainer.model))


def test_the_best_model_is_the_best_average(tmp_path: Path) -> None:
    class Ranking(TrainerCallback):
        """Makes the evaluation at the fourth step the best."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["metrics"]["eval_rank"] = abs(state.global_step - 4)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": False}
    trainer, watching = trainer_for(tmp_path, **best)
    trainer.add_callback(Ranking())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best_average = trained_weights(trainer.model)
    assert_near(best_average, watching.average(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(watching.losses[4], rel=1e-6)
    trainer.save_model(str(tmp_path / "published"))
    assert_same(trained_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "published")), best_average)

    watching.weights.clear()
    trainer.args.load_best_model_at_end = False
    trainer.train()  # continues from the best average, and averages from there
    assert_near(trained_weights(trainer.model), watching.average(STEPS))


def test_a_second_run_continues_from_the_raw_weights(tmp_path: Path) -> None:
    plain, without = trainer_for(
        tmp_path / "plain", lr_scheduler_type="constant", optim_args="precondition_frequency=2"
    )
    plain.train()
    plain.train()
    trainer, watching = trainer_for(tmp_path, lr_scheduler_type="constant")
    trainer.train()
    trainer.train()
    assert_same(watching.weights, without.weights)
    assert_near(trained_weights(trainer.model), watching.average(2 * STEPS))


class Looking(Trainer):
    """Uses the model before the forward pass, as trainers do that train on text of their own."""

    seen: list[dict[str, Tensor]]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append(trained_weights(model))
        return super().training_step(model, *args, **kwargs)


class ByHand(Looking):
    """Calls nothing of the Trainer's own step."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append(trained_weights(model))
        model.train()
        loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("cls", [Looking, ByHand])
def test_a_training_step_of_ones_own_has_raw_weights(cls: Any, tmp_path: Path) -> None:
    watching = Watching()
    settings: dict[str, Any] = {"optim_args": AVERAGED, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3}
    args = tiny.arguments(tmp_path, save_strategy="steps", max_steps=STEPS, learning_rate=1e-2, **settings)
    data = {"train_dataset": tiny.Counting(), "eval_dataset": tiny.Counting(8)}
    trainer = cls(tiny.gpt2(), args, callbacks=[watching], **data)
    trainer.seen = []
    trainer.train()
    assert_same(trainer.seen[1:], watching.weights[:-1])
    assert_near(trained_weights(trainer.model), watching.average(STEPS))


def assert_trains_as_without_averages(callback: Any, folder: Path) -> None:
    runs = []
    for options in (AVERAGED, "precondition_frequency=2"):
        callback.trainer, watching = trainer_for(folder / str(len(runs)), optim_args=options)
        callback.trainer.add_callback(callback)
        callback.trainer.train()
        runs.append(watching.weights)
    assert_same(*runs)


@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate", "on_save", "on_step_end"])
def test_callbacks_may_change_the_weights(event: str, tmp_path: Path) -> None:
    """As without averages: a change is neither lost nor made to the averages."""

    def change(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].transformer.wpe.weight[0].fill_(state.global_step)

    assert_trains_as_without_averages(type("Setting", (TrainerCallback,), {event: change})(), tmp_path)


def test_callbacks_may_evaluate_between_gradients_and_step(tmp_path: Path) -> None:
    class Early(TrainerCallback):
        trainer: Any

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.evaluate()

    assert_trains_as_without_averages(Early(), tmp_path)


def test_an_evaluation_that_fails_leaves_the_raw_weights(tmp_path: Path) -> None:
    class Failing(Trainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

    watching = Watching()
    args = tiny.arguments(tmp_path, optim_args=AVERAGED, eval_strategy="steps", eval_steps=4, max_steps=STEPS)
    data = {"train_dataset": tiny.Counting(), "eval_dataset": tiny.Counting(8)}
    trainer = Failing(tiny.gpt2(), args, callbacks=[watching], **data)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_same(trained_weights(trainer.model), watching.weights[-1])


def test_weights_that_are_loaded_after_training_are_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, watching = trainer_for(tmp_path, lr_scheduler_type="constant", eval_strategy="no")
    trainer.train()
    other = {name: torch.full_like(value, 0.01) for name, value in trained_weights(trainer.model).items()}
    trainer.model.load_state_dict(other, strict=False)
    trainer.args.learning_rate, watching.weights = 0.0, []
    for group in unwrapped(trainer.optimizer).param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    trainer.train()
    assert_same(watching.weights[0], other)
    assert caplog.text.count("were changed while they held their averages") == 1


def test_callbacks_may_evaluate_predict_and_save(tmp_path: Path) -> None:
    class Curious(TrainerCallback):
        def __init__(self, folder: Path) -> None:
            self.folder, self.losses = folder, []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.losses.append(trainer.predict(tiny.Counting(8)).metrics["test_loss"])
            trainer.save_model(str(self.folder / str(state.global_step)))

    trainer, watching = trainer_for(tmp_path, eval_strategy="no", save_strategy="no")
    curious = Curious(tmp_path)
    trainer.add_callback(curious)
    trainer.train()
    for step in range(1, STEPS + 1):
        assert curious.losses[step - 1] == pytest.approx(loss_at(watching.average(step), tmp_path), rel=1e-5)
        saved = GPT2LMHeadModel.from_pretrained(tmp_path / str(step))
        assert_near(trained_weights(saved), watching.average(step))


def test_only_the_model_is_saved(tmp_path: Path) -> None:
    """The checkpoint has the averages alone, from which a run starts anew."""

    class Starting(TrainerCallback):
        weights: dict[str, Tensor]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                self.weights = trained_weights(kwargs["model"])

    trainer, watching = trainer_for(tmp_path, save_only_model=True, eval_strategy="no")
    trainer.train()
    saved = trained_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6"))
    assert_near(saved, watching.average(6))
    for again in (trainer, trainer_for(tmp_path / "resumed")[0]):  # the first has averages, of other weights
        starting = Starting()
        again.add_callback(starting)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert_same(starting.weights, saved)


def test_adapters(tmp_path: Path) -> None:
    def adapted() -> Any:
        return get_peft_model(tiny.gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer, watching = trainer_for(tmp_path, model=adapted(), **best)
    trainer.train()
    step = trainer.state.best_global_step
    assert_near(trained_weights(trainer.model), watching.average(step))
    saved = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "checkpoint-6", is_trainable=True)
    assert_near(trained_weights(saved), watching.average(6))
    resumed, after = trainer_for(tmp_path / "resumed", model=adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(after.weights, watching.weights[4:])


def test_averaging_is_switched_on_and_off_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, without = trainer_for(tmp_path / "plain", optim_args="precondition_frequency=2")
    plain.train()
    on, watching = trainer_for(tmp_path / "on")
    on.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert caplog.text.count("has no averages of the weights") == 1
    assert_same(watching.weights, without.weights[4:])
    assert_near(trained_weights(on.model), watching.average(4))

    off, after = trainer_for(tmp_path / "off", optim_args="precondition_frequency=2")
    off.train(resume_from_checkpoint=str(tmp_path / "on" / "checkpoint-6"))
    assert caplog.text.count("averages of the weights, which average_horizon=0 drops") == 1
    assert_same(after.weights, without.weights[6:])
    assert_same(trained_weights(off.model), without.weights[-1])


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = tiny.gpt2()
    watching = Watching()
    optimizer = SOAP(model.parameters(), lr=1e-2, average_horizon=3)
    data = {"train_dataset": tiny.Counting(), "eval_dataset": tiny.Counting(8)}
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer = Trainer(model, args, callbacks=[watching], optimizers=(optimizer, None), **data)
    trainer.train()
    assert watching.losses[4] == pytest.approx(loss_at(watching.average(4), tmp_path), rel=1e-5)
    assert_near(trained_weights(model), watching.average(STEPS))


def test_a_skipped_step_is_not_averaged(tmp_path: Path) -> None:
    class Spoiling(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                next(kwargs["model"].parameters()).grad.view(-1)[0] = torch.nan

    trainer, watching = trainer_for(tmp_path)
    trainer.add_callback(Spoiling())
    trainer.train()
    assert_same(watching.weights[4], watching.weights.pop(3))
    assert_near(trained_weights(trainer.model), watching.average(STEPS - 1))


def test_a_copied_trainer_has_averages_of_its_own(tmp_path: Path) -> None:
    trainer, _ = trainer_for(tmp_path, eval_strategy="no", save_strategy="no")
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    twin = copy.deepcopy(optimizer)
    averages = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    twin.train()
    now = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    assert_same(now, averages)
    assert optimizer.at_average
    assert not twin.at_average
