"""What a Trainer did to its optimizer, written down and done again by a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_soap import MARS, SOAP, Shampoo

CLASSES = {"soap": SOAP, "shampoo": Shampoo, "mars": MARS}


class Recorder(TrainerCallback):
    """Keeps the gradients as they are stepped with, the learning rate of each step, and the batches."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.batches: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        self.batches.append(batch["input_ids"][:, :2].tolist())
        return batch


def recorded(
    folder: Path | str,
    *,
    cls: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    runs: Callable[[Trainer], None] = lambda trainer: trainer.train(),
    extra: dict[str, Any] | None = None,
    arguments: type[TrainingArguments] = TrainingArguments,
    **changes: Any,
) -> tuple[Trainer, Recorder, dict[str, Tensor]]:
    """Trains under a recorder.

    Args:
        folder: For output.
        cls: The trainer's class.
        model: In place of a tiny GPT-2.
        runs: What to do with the trainer.
        extra: More arguments of the trainer.
        arguments: Their class.
        changes: More training arguments.

    Returns:
        The trainer, the recorder, and the weights before training.
    """
    recorder, model = Recorder(), model or tiny.gpt2()
    before = copy.deepcopy(dict(model.named_parameters()))
    rows: Any = [tiny.Counting()[i] for i in range(64)]
    extra = dict(extra or {})
    callbacks = [recorder, *extra.pop("callbacks", [])]
    trainer = cls(
        model,
        tiny.arguments(folder, arguments, **changes),
        train_dataset=rows,  # a list: grouping by length goes over it, and Counting has no end
        eval_dataset=rows[:8],
        data_collator=recorder.collate,
        callbacks=callbacks,
        **extra,
    )
    runs(trainer)
    return trainer, recorder, before


def replayed(trainer: Trainer, recorder: Recorder, before: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Takes the recorded steps in a plain loop with a fresh optimizer and returns the weights."""
    params = {name: nn.Parameter(value.detach().clone()) for name, value in before.items()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": trainer.args.weight_decay},
        {"params": [p for p in params.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = CLASSES[str(trainer.args.optim.value)](groups, lr=trainer.args.learning_rate, **options)
    for grads, rate in zip(recorder.grads, recorder.rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, param in params.items():
            param.grad = grads[name].clone() if name in grads else None
        optimizer.step()
    return params


def assert_replayable(trainer: Trainer, recorder: Recorder, before: dict[str, Tensor], **options: Any) -> None:
    """Asserts that the optimizer took the recorded steps and no others: a plain loop ends at the same bits."""
    after = replayed(trainer, recorder, before, **options)
    assert recorder.grads
    moved = False
    for name, param in trainer.model.named_parameters():
        assert torch.equal(param, after[name]), name
        moved |= not torch.equal(param, before[name])
    assert moved
