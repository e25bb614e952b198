"""One training run of ``hf-soap compare``: a language model, trained by the Trainer and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from hf_soap import SoapTrainer
from hf_soap.cli.compare.contenders import read_schedule
from hf_soap.cli.compare.corpus import Corpus
from hf_soap.cli.compare.results import EvalPoint, RunResult, RunSettings
from hf_soap.trainer import averaging

OnStep = Callable[[int], None]


class _Blocks(Dataset[dict[str, Tensor]]):
    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks
        self.labels = blocks.clone()
        # The first token is not predicted, but the Trainer would count its label when it averages the losses.
        self.labels[:, 0] = -100

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.labels[index]}


class Clock(TrainerCallback):
    """Measures the time of the steps and of the optimizer in them, and records the evaluations.

    Args:
        on_step: Called with the number of each finished step.
        now: Returns seconds.
    """

    def __init__(self, on_step: OnStep = lambda step: None, now: Callable[[], float] | None = None) -> None:
        self.on_step = on_step
        self.now = now or _now
        self.seconds = 0.0
        self.optimizer_seconds = 0.0
        self.evals: list[EvalPoint] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_began = self.now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer_began = self.now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer_seconds += self.now() - self.optimizer_began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += self.now() - self.step_began
        self.on_step(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evals.append(EvalPoint(state.global_step, self.seconds, kwargs["metrics"]["eval_loss"]))


def train_once(settings: RunSettings, corpus: Corpus, output_dir: Path, on_step: OnStep) -> RunResult:
    """Train one model; equal settings and data give equal bits on one machine's CPU.

    Args:
        settings: What to train, how and for how long.
        corpus: Text to train and to evaluate on.
        output_dir: Folder for the final checkpoint.
        on_step: Called with the number of each finished step.

    Returns:
        The loss curves and their cost. The last loss is NaN if training diverged.

    Raises:
        ValueError: If the Trainer or the optimizer refuses the settings.
    """
    model = _build_model(settings, corpus)
    clock = Clock(on_step)
    trainer = SoapTrainer(  # the Trainer, and exact MARS
        model=model,
        args=_training_arguments(settings, output_dir),
        train_dataset=_Blocks(corpus.train),
        eval_dataset=_Blocks(corpus.held_out),
        processing_class=corpus.tokenizer,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except FloatingPointError:  # the optimizer gives up after many steps with NaN
        clock.evals.append(EvalPoint(settings.steps, clock.seconds, math.nan))
    if clock.evals[-1].step != settings.steps:
        trainer.evaluate()
    assert trainer.optimizer is not None
    averaging.exchange(model, trainer.optimizer, average=False)  # raw weights that only an evaluation needs
    return RunResult(
        settings=settings,
        evals=clock.evals,
        train_losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        seconds=clock.seconds,
        optimizer_seconds=clock.optimizer_seconds,
        state_bytes=state_bytes(trainer.optimizer),
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        checkpoint=output_dir / f"checkpoint-{settings.steps}",
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the size of an optimizer's state."""
    tensors = (leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_settings(settings: RunSettings, corpus: Corpus) -> None:
    """Check settings with model, Trainer and optimizer now, not only after earlier runs have ended.

    Args:
        settings: Settings of one run.
        corpus: The text that it will run on.

    Raises:
        ValueError: If one of them refuses the settings.
    """
    model = _build_model(settings, corpus)
    SoapTrainer.get_optimizer_cls_and_kwargs(_training_arguments(settings, Path()), model)


def _build_model(settings: RunSettings, corpus: Corpus) -> PreTrainedModel:
    set_seed(settings.seed)
    model = _load_model(settings, corpus) if settings.model else _new_model(settings, corpus)
    if not settings.lora_r:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError("--lora-r needs peft: pip install 'hf-soap[peft]'") from error

    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapted: Any = get_peft_model(model, lora)  # it has all that the Trainer needs of a PreTrainedModel
    return adapted  # type: ignore[no-any-return]


def _load_model(settings: RunSettings, corpus: Corpus) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"got the model {settings.model!r}: {error}") from error
    longest, seq_len = getattr(model.config, "max_position_embeddings", None), corpus.train.shape[1]
    if longest is not None and seq_len > longest:
        raise ValueError(f"seq_len must be <= {longest}, the positions of {settings.model}, got {seq_len}")
    return model


def _new_model(settings: RunSettings, corpus: Corpus) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(corpus.tokenizer),
            n_positions=corpus.train.shape[1],
            n_layer=settings.layers,
            n_embd=settings.width,
            n_head=settings.heads,
            # No text is seen twice, so there is no need to regularize.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _training_arguments(settings: RunSettings, output_dir: Path) -> TrainingArguments:
    schedule, schedule_options = read_schedule(settings.schedule)
    return TrainingArguments(
        output_dir=str(output_dir),
        optim=settings.optimizer,
        optim_args=settings.optim_args or None,
        learning_rate=settings.lr,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_options or None,
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=settings.steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
    )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
